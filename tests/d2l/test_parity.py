"""Agreement with golden data of the published implementation, stage by stage (settings a, b, c).

Set ``D2L_GOLDEN_DIR`` to the folder of the golden data; without it these tests are skipped.
"""

from __future__ import annotations

import itertools
import json
import os
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from d2l_kernels import Segments, topk_distill
from double import Double
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from d2l.checkpoint import load_model
from d2l.config import ChunkConfig
from d2l.data.example import Batch, Example, Query
from d2l.lm.base import LanguageModel
from d2l.lm.hooks import applied, decoder_of, instrument
from d2l.lora import ChunkLora, LoraBatch, route_packed, route_rows
from d2l.losses import average, lora_l1, shift
from d2l.model import DocToLoRA, target_shapes
from d2l.published import convert, read_published, shapes, to_published
from d2l.train import Objective, TrainConfig

GOLDEN = os.environ.get("D2L_GOLDEN_DIR")
SETTINGS = os.environ.get("D2L_GOLDEN_SETTINGS", "a,b,c").split(",")
TOLERANCE, EXACT = 1e-5, 1e-9

pytestmark = pytest.mark.skipif(not GOLDEN, reason="D2L_GOLDEN_DIR is not set")


def golden(name: str) -> Path:
    return Path(GOLDEN or "") / name


def padded(loras: LoraBatch, module: str) -> list[torch.Tensor]:
    """A and B of shape (doc, layer, max rank, d), zero rows at the end."""
    widest = max(loras.rank.lengths)

    def pad(t: torch.Tensor) -> torch.Tensor:
        pieces = t.split(loras.rank.lengths, 1)
        return torch.stack([F.pad(p, (0, 0, 0, widest - p.shape[1])) for p in pieces])

    return [pad(loras.A[module]), pad(loras.B[module])]


class Setting:
    """One golden setting: base, hypernetwork, inputs and expected outputs."""

    def __init__(self, name: str) -> None:
        record = json.loads(golden("golden.json").read_text())
        self.name, self.spec = name, record["settings"][name]
        self.io = load_file(golden(f"io_{name}.safetensors"))
        base_config = record["base_models"][self.spec["base"]]
        config = AutoConfig.for_model(base_config["model_type"]).from_dict(base_config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        weights = load_file(golden(f"base_{self.spec['base']}.safetensors"))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        instrument(model.eval().requires_grad_(False))
        tokenizer = SimpleNamespace(pad_token_id=base_config["pad_token_id"])
        self.base = LanguageModel(model, tokenizer, self.spec["base"])
        self.config, state = convert(
            load_file(golden(self.spec["hypernet_file"])), self.spec["config"]
        )
        assert target_shapes(self.base, self.config) == shapes(self.spec["config"])
        self.model = DocToLoRA(self.base, self.config, ChunkConfig())
        self.model.hypernet.load_state_dict(state)
        self.hypernet = self.model.hypernet.eval()

    def double(self) -> Setting:
        self.base.model.double()
        self.hypernet.double()
        return self

    def packed(self, key: str) -> torch.Tensor:
        return self.io[f"in.packed.{key}"]

    def padded(self, key: str) -> torch.Tensor:
        return self.io[f"in.padded.{key}"]

    @cached_property
    def chunks(self) -> list[torch.Tensor]:
        return pieces(self.packed("ctx_ids"), self.packed("ctx_position_ids"))

    @property
    def n_chunks(self) -> list[int]:
        return self.packed("n_ctx_chunks").tolist()

    @property
    def n_queries(self) -> list[int]:
        return self.packed("n_queries").tolist()

    @cached_property
    def queries(self) -> list[torch.Tensor]:
        return pieces(self.packed("input_ids"), self.packed("position_ids"))

    @cached_property
    def labels(self) -> list[torch.Tensor]:
        return pieces(self.packed("labels"), self.packed("position_ids"))

    @property
    def n_labels(self) -> list[int]:
        return [int((labels != -100).sum()) for labels in self.labels]

    @property
    def tok_per_doc(self) -> list[int]:
        lengths = iter(map(len, self.queries))
        return [sum(itertools.islice(lengths, n)) for n in self.n_queries]

    @property
    def doc_of_query(self) -> list[int]:
        return [d for d, n in enumerate(self.n_queries) for _ in range(n)]

    def features(self, layout: str, chunks: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        self.model.encoder(chunks or self.chunks, found.append, layout=layout)
        return found

    def factors(self, layout: str = "packed"):
        return self.hypernet(self.features(layout), Segments.of(map(len, self.chunks)))

    def loras(self, layout: str = "packed"):
        return self.hypernet.compose(self.factors(layout), self.n_chunks)

    def packed_inputs(self) -> dict:
        ids, positions = self.packed("input_ids"), self.packed("position_ids")
        return {"input_ids": ids, "position_ids": positions, "use_cache": False}

    def losses(self, loras, kind: str) -> torch.Tensor:
        """Loss of every labelled token, in order."""
        with applied(self.base.model, route_packed(loras, self.tok_per_doc)):
            decoder, _ = decoder_of(self.base.model)
            hidden = decoder(**self.packed_inputs()).last_hidden_state
        at, target = shift(self.packed("labels"))
        teacher = torch.zeros(len(target), 1), target[:, None]
        if kind == "kl":
            teacher = (self.packed("logprobs_vals")[0], self.packed("logprobs_indices")[0])
        head = self.base.model.get_output_embeddings().weight
        softcap = getattr(self.base.model.config, "final_logit_softcapping", None)
        return topk_distill(hidden[0, at], head, *teacher, softcap)[0]


def pieces(row: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    return list(row[0].tensor_split(starts[1:]))


@pytest.fixture(params=SETTINGS)
def setting(request) -> Setting:
    torch.manual_seed(0)
    return Setting(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance=TOLERANCE) -> None:
    """Bound the absolute error; of a scalar above 1 (a gradient's norm) the relative one."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    error = (actual.double() - expected.double()).abs().max().item()
    if os.environ.get("D2L_SHOW_ERRORS"):
        print(f"{what:60s} {error:.1e}")
    tolerance *= max(1.0, expected.abs().max().item()) if expected.ndim == 0 else 1.0
    assert error <= tolerance, f"{what}: maximal error {error:.2e}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_features(setting, layout):
    expected = setting.io["out.ctx_features"]
    found = torch.stack(setting.features(layout))
    close(
        found, expected[0] if expected.ndim == 4 else expected, f"{setting.name} features {layout}"
    )


@torch.no_grad()
def test_every_stage(setting):
    hypernet, io = setting.hypernet, setting.io
    seen: dict[str, list[torch.Tensor]] = {
        "projected": [],
        "block": [],
        "encoder": [],
        "decoder": [],
    }
    perceiver = hypernet.perceiver
    watched = [("projected", perceiver.projection), ("encoder", perceiver.encoder)]
    watched += [("block", block) for block in dict.fromkeys(perceiver.encoder.blocks)]
    for name, module in [*watched, ("decoder", perceiver.decoder)]:
        module.register_forward_hook(lambda m, a, out, name=name: seen[name].append(out))
    segments = Segments.of(map(len, setting.chunks))
    latents = [perceiver(f, segments) for f in setting.features("packed")]

    def stage(name: str, found: torch.Tensor) -> None:
        close(found, io[f"out.{name}"], f"{setting.name} {name}")

    stage("projected", torch.cat(seen["projected"])[None])
    stage("perceiver_encoder", torch.cat(seen["encoder"]))
    stage("perceiver_decoder", torch.cat(seen["decoder"]))
    n_blocks = len(perceiver.encoder.blocks)
    for i in range(n_blocks):
        stage(f"perceiver_encoder_layer{i}", torch.cat(seen["block"][i::n_blocks]))

    x = hypernet.assemble(latents)
    stage("lora_emb", x)
    for mlp in hypernet.mlps:
        x = mlp(x)
    stage("lora_emb_mlp", x)
    unit = F.normalize(x, dim=-1)
    stage("lora_emb_unit", unit)
    stage("flat_loras", torch.einsum("clmrd,lmdf->clmrf", unit, hypernet.head))

    factors = hypernet.generate(hypernet.assemble(latents))
    merged = hypernet.compose(factors, setting.n_chunks)
    rank = (max(setting.n_chunks) + 1) * setting.config.lora.rank
    for module in hypernet.targets.modules:
        A, B = (F.pad(t, (0, 0, 0, rank - t.shape[2])) for t in padded(merged, module))
        stage(f"lora.{module}.A", factors.A[module])
        stage(f"lora.{module}.B", factors.B[module])
        stage(f"merged.{module}.A", A)
        stage(f"merged.{module}.B", B)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_logits_packed(setting, layout):
    model = setting.base.model
    with applied(model, route_packed(setting.loras(layout), setting.tok_per_doc)):
        close(
            model(**setting.packed_inputs()).logits,
            setting.io["out.logits_packed"],
            "logits packed",
        )
    base_only = model(**setting.packed_inputs()).logits
    close(base_only, setting.io["out.logits_packed_base_only"], "logits of the base")
    assert (base_only - setting.io["out.logits_packed"]).abs().max() > 1


@torch.no_grad()
def test_logits_padded(setting):
    model, mask = setting.base.model, setting.padded("attention_mask")
    with applied(model, route_rows(setting.loras("padded"), setting.doc_of_query)):
        logits = model(input_ids=setting.padded("input_ids"), attention_mask=mask).logits
    keep = mask.bool()
    close(logits[keep], setting.io["out.logits_padded"][keep], "logits padded")


@torch.no_grad()
def test_generation(setting):
    ids, expected = setting.padded("gen_input_ids"), setting.io["out.generated_ids"]
    with applied(setting.base.model, route_rows(setting.loras(), setting.doc_of_query)):
        found = setting.base.model.generate(
            input_ids=ids,
            attention_mask=setting.padded("gen_attention_mask"),
            max_new_tokens=expected.shape[1] - ids.shape[1],
            do_sample=False,
        )
    assert found.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_losses(setting, kind):
    """The published evaluation quirks (L1 not divided, CE over all tokens) are computed here."""
    loras, n_docs = setting.loras(), len(setting.n_chunks)
    per_token = setting.losses(loras, kind)
    l1 = lora_l1(loras, padded=True)
    if not setting.config.use_bias:
        l1 = l1 * max(setting.n_chunks) / (max(setting.n_chunks) + 1)
    for averaging, phase in itertools.product(("per_ctx", "per_token"), ("train", "eval")):
        expected = setting.spec["losses"][f"{kind}.{averaging}.{phase}"]
        denominator = None
        if (kind, averaging, phase) == ("ce", "per_token", "eval"):
            denominator = setting.packed("labels").numel()
        main = average(per_token, setting.n_labels, setting.n_queries, averaging, denominator)
        norm = l1 / n_docs if phase == "train" else l1
        found = {"main": main, "l1_norm": norm, "total": main + expected["l1_coef"] * norm}
        for key, value in found.items():
            close(value, torch.tensor(expected[key]), f"{kind}.{averaging}.{phase} {key}")


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_gradients(setting, kind):
    expected_norms = setting.spec["grad_norms"][f"{kind}.per_ctx.train"]
    coefficient = setting.spec["losses"][f"{kind}.per_ctx.train"]["l1_coef"]
    loras, n_docs = setting.loras(), len(setting.n_chunks)
    l1 = lora_l1(loras, padded=True)
    if not setting.config.use_bias:
        l1 = l1 * max(setting.n_chunks) / (max(setting.n_chunks) + 1)
    main = average(setting.losses(loras, kind), setting.n_labels, setting.n_queries, "per_ctx")
    (main + coefficient * l1 / n_docs).backward()
    grads = {n: p.grad for n, p in setting.hypernet.named_parameters()}
    assert all(g is not None for g in grads.values())
    found = to_published(setting.hypernet, grads)
    assert found.keys() == expected_norms.keys()
    for key, norm in expected_norms.items():
        close(found[key].norm(), torch.tensor(norm), f"{kind} |grad {key}|")
    stored = {
        k.removeprefix(f"grad.{kind}."): k for k in setting.io if k.startswith(f"grad.{kind}.")
    }
    for key, name in stored.items():
        close(found[key], setting.io[name], f"{kind} grad {key}")


@torch.no_grad()
@pytest.mark.parametrize("averaging", ["per_ctx", "per_token"])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_the_training_objective_gives_the_same_loss(setting, kind, averaging):
    """Padded queries, deduplicated chunks and hidden states without logits change nothing."""
    chunks, queries = iter(setting.chunks), iter(zip(setting.queries, setting.labels, strict=True))
    rows = zip(
        setting.packed("logprobs_vals")[0].tolist(),
        setting.packed("logprobs_indices")[0].tolist(),
        strict=True,
    )
    examples = []
    for n_chunks, n_queries in zip(setting.n_chunks, setting.n_queries, strict=True):
        asked = []
        for ids, labels in itertools.islice(queries, n_queries):
            answer = labels[labels != -100].tolist()
            n_prompt = int((labels != -100).nonzero()[0])
            assert labels[n_prompt : n_prompt + len(answer)].tolist() == answer
            teacher = list(itertools.islice(rows, len(answer)))
            asked.append(
                Query(
                    tuple(ids[:n_prompt].tolist()),
                    tuple(answer),
                    tuple(tuple(lp) for lp, _ in teacher),
                    tuple(tuple(ix) for _, ix in teacher),
                )
            )
        own = tuple(tuple(c.tolist()) for c in itertools.islice(chunks, n_chunks))
        examples.append(Example(own, tuple(asked)))
    objective = Objective(setting.model, TrainConfig(loss=kind, averaging=averaging)).eval()
    out = objective(Batch.of(examples), len(examples), sum(setting.n_labels))
    expected = setting.spec["losses"][f"{kind}.{averaging}.train"]["main"]
    close(out["loss"], torch.tensor(expected), f"objective {kind}.{averaging}")


@torch.no_grad()
def test_float64_packed_is_padded_is_one_document_at_a_time(setting):
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            self_consistent(setting.double())
    finally:
        torch.set_default_dtype(torch.float32)


def self_consistent(setting: Setting) -> None:
    model = setting.base.model
    with applied(model, route_packed(setting.loras("packed"), setting.tok_per_doc)):
        packed = model(**setting.packed_inputs()).logits[0]
    assert packed.dtype == torch.float64
    close(packed[None], setting.io["out.logits_packed"], "float64 logits")
    mask = setting.padded("attention_mask")
    with applied(model, route_rows(setting.loras("padded"), setting.doc_of_query)):
        padded = model(input_ids=setting.padded("input_ids"), attention_mask=mask).logits
    close(padded[mask.bool()], packed, "float64 padded = packed", EXACT)

    chunks, queries, alone = iter(setting.chunks), iter(setting.queries), []
    for n_chunks, n_queries in zip(setting.n_chunks, setting.n_queries, strict=True):
        parts = []
        for chunk in itertools.islice(chunks, n_chunks):
            parts.append(
                setting.hypernet(setting.features("padded", [chunk]), Segments.of([len(chunk)]))
            )
        joined = ChunkLora.pick(parts, [(i, 0) for i in range(n_chunks)])
        loras = setting.hypernet.compose(joined, [n_chunks])
        for ids in itertools.islice(queries, n_queries):
            with applied(model, route_rows(loras, [0])):
                alone.append(model(input_ids=ids[None]).logits[0])
    close(torch.cat(alone), packed, "float64 one at a time = packed", EXACT)


@torch.no_grad()
def test_a_released_checkpoint_becomes_a_working_model(tmp_path):
    setting = Setting("a")
    folder = tmp_path / "imported"
    read_published(golden("checkpoint_ab/pytorch_model.bin")).saved("golden").save(folder)
    model = load_model(folder, setting.base, strict=True)
    assert model.config == setting.config
    loras = model.hypernet.compose(model.encode([c.tolist() for c in setting.chunks]), [1, 1])
    close(padded(loras, "down_proj")[0], setting.io["out.merged.down_proj.A"], "imported A")
    close(padded(loras, "down_proj")[1], setting.io["out.merged.down_proj.B"], "imported B")
