"""The training loop: resuming, several processes, accumulation, losses, schedule."""

import csv
import math
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import train_tiny
from tiny_models import chunks, doc_to_lora

from d2l.data.example import Batch, Example, Query
from d2l.train import (
    Objective,
    Patience,
    TrainConfig,
    learning_rate,
    pad_queries,
    parameter_groups,
    read_curve,
    train,
)

SCRIPT = Path(train_tiny.__file__)
ROOT = SCRIPT.parents[2]


def start(*arguments, **environment) -> subprocess.Popen:
    paths = [str(p) for p in (ROOT, ROOT / "kernels", SCRIPT.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["hypernet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("finished")
    train_tiny.run(folder)
    return folder


def test_a_run_logs_and_leaves_a_checkpoint(finished):
    rows = curve(finished)
    assert [int(r["step"]) for r in rows] == list(range(1, 7))
    assert [r["probe"] for r in rows] == ["1", "2", "3", "4", "5", "6"]
    assert list((finished / "tensorboard").iterdir())
    assert not list(finished.glob("*.part"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns(tmp_path, optimizer):
    config = TrainConfig(
        steps=20, docs_per_step=4, optimizer=optimizer, lr=2e-2, warmup=1, log_every=1
    )
    train(doc_to_lora(), lambda step, level: train_tiny.examples(0, level), config, tmp_path)
    losses = [float(row["loss"]) for row in curve(tmp_path)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("eval_every", [1, 2, 3, 4, 5])
def test_evaluations_and_log_lines_may_fall_on_any_steps(tmp_path, eval_every):
    config = TrainConfig(steps=7, docs_per_step=1, log_every=3, eval_every=eval_every)
    train(
        doc_to_lora(),
        lambda step, level: train_tiny.examples(0, level),
        config,
        tmp_path,
        evaluate=lambda done: {"probe": float(done)},
    )
    rows = curve(tmp_path)
    evaluated = {s for s in range(1, 8) if s % eval_every == 0 or s == 7}
    assert [int(r["step"]) for r in rows] == sorted(evaluated | {3, 6})
    assert {int(r["step"]) for r in rows if r["probe"]} == evaluated
    assert all(float(r["probe"]) == float(r["step"]) for r in rows if r["probe"])
    assert all(r["loss"] for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("kill_at", "dropout", "kept"), [("step", 0.0, 2), ("save", 0.2, 2)])
def test_a_killed_run_ends_with_the_same_weights(finished, tmp_path, kill_at, dropout, kept):
    process = start(tmp_path / "killed", kill_at, TINY_DROPOUT=str(dropout))
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, complaint
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == kept
    train_tiny.run(tmp_path / "killed", dropout=dropout)
    if dropout:
        finished = tmp_path / "whole"
        train_tiny.run(finished, dropout=dropout)
    expected, found = weights(finished), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert curve(tmp_path / "killed") == curve(finished)


def in_two_processes(folder: Path, **environment) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        **environment,
    }  # fmt: skip
    both = [start(folder, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(2)]
    complaints = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], complaints


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_losses_of_one(finished, tmp_path, optimizer):
    in_two_processes(tmp_path / "two", TINY_OPTIMIZER=optimizer)
    if optimizer != "adamw":
        finished = tmp_path / "one"
        train_tiny.run(finished, optimizer=optimizer)
    for one, two in zip(curve(finished), curve(tmp_path / "two"), strict=True):
        for column in ("loss", "l1", "train_exact"):
            assert float(two[column]) == pytest.approx(float(one[column]), abs=1e-5), column
        assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-4)
    expected, found = weights(finished), weights(tmp_path / "two")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_accumulation_equals_one_large_batch(finished, tmp_path):
    train_tiny.run(tmp_path, docs_per_micro_batch=4)
    for one, two in zip(curve(finished), curve(tmp_path), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), abs=1e-5)
        assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-4)
    expected, found = weights(finished), weights(tmp_path)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_another_configuration_does_not_resume(finished, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="another configuration"):
        train_tiny.run(tmp_path, lr=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = doc_to_lora()
    torch.nn.init.constant_(model.hypernet.scaler_B["down_proj"], float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, train_tiny.examples, train_tiny.CONFIG, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_curriculum_is_earned(tmp_path):
    seen = []

    def examples(step, level):
        seen.append(level)
        return train_tiny.examples(step, level)

    common = {"steps": 4, "docs_per_step": 4, "lr": 0.0, "min_lr": 0.0, "warmup": 0}
    for curriculum, exact, expected in (
        (0, 0.0, [1, 1, 1, 1]),
        (2, 0.0, [0, 0.5, 1, 1]),
        (2, 0.9, [0, 0, 0, 0]),
    ):
        config = TrainConfig(**common, curriculum=curriculum, curriculum_exact=exact)
        seen.clear()
        train(doc_to_lora(), examples, config, tmp_path / f"{curriculum}-{exact}")
        assert seen == expected


SCORES = (0.5, 0.7, 0.7, 0.6, 0.9, 1.0)  # the best of the first four is that of step 2


def stopping(folder, scores=SCORES, **changes):
    """Train with scripted scores; return the weights after every step and those at the end."""
    model = doc_to_lora()
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(done: int) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in model.hypernet.state_dict().items()})
        return {"score": scores[done - 1], "other": -scores[done - 1]}

    config = TrainConfig(**{**vars(train_tiny.CONFIG), "stop_on": "score", **changes})
    train(model, train_tiny.examples, config, folder, evaluate=evaluate)
    return seen, model.hypernet.state_dict()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("patience", "steps", "best"), [(1, 3, 2), (2, 4, 2), (3, 6, 6), (9, 6, 6), (0, 6, 6)]
)
def test_training_stops_early_with_the_best_weights(tmp_path, patience, steps, best):
    seen, final = stopping(tmp_path, patience=patience)
    assert len(seen) == steps
    assert same(final, seen[best - 1])
    assert steps == best or not same(final, seen[-1])
    config = TrainConfig(**{**vars(train_tiny.CONFIG), "stop_on": "score", "patience": patience})
    assert Patience(config, read_curve(tmp_path)).over == (steps < 6)
    again, resumed = stopping(tmp_path, patience=patience)
    assert not again
    assert same(resumed, final)


def test_an_interrupted_run_stops_where_it_would_have(tmp_path):
    _, whole = stopping(tmp_path / "whole", patience=2)
    with pytest.raises(IndexError):  # dies in the third evaluation
        stopping(tmp_path / "cut", SCORES[:2], patience=2)
    seen, resumed = stopping(tmp_path / "cut", patience=2)
    assert len(seen) == 2
    assert same(resumed, whole)


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    """What is watched falls from the start, so the weights of the first step are the best."""
    in_two_processes(tmp_path / "two", TINY_PATIENCE="2")
    one = train_tiny.run(tmp_path / "one", patience=2).hypernet.state_dict()
    assert len(curve(tmp_path / "one")) == len(curve(tmp_path / "two")) == 3
    best = torch.load(tmp_path / "two" / "best.pt", weights_only=True)
    for key in one:
        torch.testing.assert_close(best[key], one[key], rtol=1e-3, atol=1e-5)


def test_patience_needs_something_to_go_by(tmp_path):
    with pytest.raises(ValueError, match=r"'scor' is not measured, only \['other', 'score'\]"):
        stopping(tmp_path / "named", patience=1, stop_on="scor")
    with pytest.raises(ValueError, match="'score' is nan"):
        stopping(tmp_path / "nan", (math.nan,), patience=1)
    for missing in ({"eval_every": 0}, {"stop_on": ""}):
        with pytest.raises(ValueError, match="patience 1 needs eval_every"):
            stopping(tmp_path / "none", patience=1, **missing)
    assert not (tmp_path / "none").exists()


# the objective


def example(seed: int, n_chunks: int = 1, teacher=None) -> Example:
    ids = [tuple(c.tolist()) for c in chunks(*[4] * n_chunks, 3, 2, seed=seed)]
    query = Query(ids[-2], ids[-1], *(teacher or (None, None)))
    return Example(tuple(ids[:-2]), (query,))


def objective(model=None, **changes) -> Objective:
    return Objective(model or doc_to_lora(), TrainConfig(**changes)).eval()


@torch.no_grad()
def test_a_certain_teacher_is_cross_entropy():
    plain = example(0)
    answer = plain.queries[0].answer
    certain = (tuple((0.0,) for _ in answer), tuple((t,) for t in answer))
    taught = example(0, teacher=certain)
    ce = objective(loss="ce")(Batch.of([plain]), 1, 2)
    kl = objective(loss="kl")(Batch.of([taught]), 1, 2)
    assert kl["loss"].item() == pytest.approx(ce["loss"].item(), abs=1e-6)
    unsure = tuple((math.log(0.5),) for _ in answer), certain[1]
    half = objective(loss="kl")(Batch.of([example(0, teacher=unsure)]), 1, 2)
    assert half["loss"].item() == pytest.approx(ce["loss"].item() / 2, abs=1e-6)


def test_kl_needs_a_teacher():
    with pytest.raises(ValueError, match="needs the teacher's top-k"):
        objective(loss="kl")(Batch.of([example(0)]), 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("averaging", ["per_ctx", "per_token"])
def test_the_loss_is_that_of_each_document_alone(averaging):
    loss = objective(averaging=averaging)
    documents = [example(i, n_chunks=i + 1) for i in range(3)]
    together = loss(Batch.of(documents), 3, 6)["loss"]
    apart = sum(loss(Batch.of([d]), 3, 6)["loss"] for d in documents)
    assert together.item() == pytest.approx(apart.item(), abs=1e-5)


@torch.no_grad()
def test_a_weight_of_two_is_the_chunk_twice():
    one, model = example(0, n_chunks=2), doc_to_lora()
    a, b = one.chunks
    twice = Example((a, b, b), one.queries)
    weighted = Example((a, b), one.queries, weights=(1.0, 2.0))
    loss = objective(model)
    expected = loss(Batch.of([twice]), 1, 2)["loss"].item()
    assert loss(Batch.of([weighted]), 1, 2)["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert loss(Batch.of([one]), 1, 2)["loss"].item() != pytest.approx(expected, abs=1e-4)


def test_total_adds_the_weighted_l1():
    out = objective(l1=0.5)(Batch.of([example(0)]), 1, 2)
    assert out["total"].item() == pytest.approx(out["loss"].item() + 0.5 * out["l1"].item())
    assert out["l1"].item() > 0


@torch.no_grad()
def test_hits_count_whole_answers():
    model = doc_to_lora()
    batch = Batch.of([example(0), example(1)])
    assert objective(model)(batch, 2, 4)["hits"].item() == 0
    ids, mask, _ = pad_queries(batch, 0)
    best = model.base.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    torch.nn.init.zeros_(model.hypernet.scaler_B["down_proj"])
    torch.nn.init.zeros_(model.hypernet.bias_B["down_proj"])
    query = batch.queries[0]
    answer = (int(best[0, len(query.prompt) - 1]),)
    right = Example(example(0).chunks, (Query(query.prompt, answer),))
    assert objective(model)(Batch.of([right, example(1)]), 2, 3)["hits"].item() == 1


def test_queries_are_padded_on_the_right():
    ids, mask, labels = pad_queries(Batch.of([example(0), example(1)]), 0)
    assert ids.shape == mask.shape == labels.shape == (2, 5)
    short = Example(((5, 6),), (Query((9,), (8,)),))
    ids, mask, labels = pad_queries(Batch.of([short, example(1)]), 0)
    assert ids[0].tolist() == [9, 8, 0, 0, 0]
    assert mask[0].tolist() == [1, 1, 0, 0, 0]
    assert labels[0].tolist() == [-100, 8, -100, -100, -100]


# schedule and optimiser


def test_the_schedule_warms_up_and_ends_at_the_floor():
    config = TrainConfig(steps=100, warmup=10, lr=1e-2, min_lr=1e-4)
    rates = [learning_rate(s, config) for s in range(101)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_only_matrices_are_decayed():
    module = objective(doc_to_lora(chunk_gate=True, ridge=True))
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, kept = (
        {names[id(p)].removeprefix("hypernet.") for p in group["params"]}
        for group in parameter_groups(module, 0.01)
    )
    assert len(decayed) + len(kept) == len(names)
    assert all(p.ndim >= 2 for p in parameter_groups(module, 0.01)[0]["params"])
    assert {"head", "mlps.0.W1", "perceiver.projection.gate.weight"} <= decayed
    assert {"perceiver.encoder.blocks.0.mlp.gate.weight", "mlps.0.W2"} <= decayed
    assert {"gate_weight", "gate_bias", "mlps.0.b1", "mlps.0.norm_in.weight"} <= kept
    assert "scaler_ridge" in kept
    assert {"scaler_A.down_proj", "bias_B.down_proj", "perceiver.decoder.latents"} <= kept


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_vectors_move_at_their_own_rate(tmp_path, optimizer):
    """A step is proportional to its rate, so a quarter of it is a quarter of the way."""
    moved = []
    for share in (1.0, 0.25):
        model = doc_to_lora()
        before = {n: p.detach().clone() for n, p in model.hypernet.named_parameters()}
        config = TrainConfig(
            steps=1, docs_per_step=4, optimizer=optimizer, lr=1e-2, warmup=1, vector_lr=share,
            weight_decay=0.0,
        )  # fmt: skip
        train(model, train_tiny.examples, config, tmp_path / f"{share}")
        after = dict(model.hypernet.named_parameters())
        moved.append({n: after[n].detach() - old for n, old in before.items()})
    whole, quarter = moved
    vectors = {
        n.removeprefix("hypernet.")
        for n in whole
        if not torch.allclose(quarter[n], whole[n], rtol=1e-3, atol=1e-6)
    }
    assert {"scaler_A.down_proj", "perceiver.decoder.latents", "mlps.0.norm_in.weight"} <= vectors
    assert not {"head", "mlps.0.W1"} & vectors
    for name in vectors:
        torch.testing.assert_close(quarter[name], whole[name] / 4, rtol=1e-3, atol=1e-6)


def test_noise_on_the_question_is_bounded_and_for_training_alone():
    model, batch, seen = doc_to_lora(), Batch.of([example(0)]), []
    lm = model.base.model
    hook = lm.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given), with_kwargs=True
    )
    noisy = objective(model, neftune=5.0)
    quiet = noisy(batch, 1, 2)["loss"].item()
    assert quiet == objective(model)(batch, 1, 2)["loss"].item()
    noisy.train()
    assert noisy(batch, 1, 2)["loss"].item() != quiet
    hook.remove()
    given = [g for g in seen if g.get("inputs_embeds") is not None]
    assert len(given) == 1
    ids, _, _ = pad_queries(batch, 0)
    noise = (given[0]["inputs_embeds"] - lm.get_input_embeddings()(ids)).abs()
    most = 5.0 / math.sqrt(ids.shape[1] * noise.shape[2])
    assert most / 2 < noise.max().item() <= most * (1 + 1e-5)
