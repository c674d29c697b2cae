"""The training loop: one explicit loop on accelerate, resumable bit for bit.

Data are a pure function of the step, the schedule too, so a checkpoint holds weights, optimiser
state and the step, and is written atomically as one file.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from d2l_kernels import topk_distill
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .config import config_id
from .data.example import Batch, Example
from .lm.base import LanguageModel
from .lm.hooks import applied, decoder_of
from .lora import ChunkLora, LoraBatch, route_rows
from .losses import Averaging, average, lora_l1, shift
from .model import DocToLoRA
from .muon import OPTIMIZERS, Optimizer

_EVERY_STEP = {"step", "loss", "l1", "train_exact", "grad_norm", "lr", "level"}
_NO_DECAY = ("scaler", "bias", "norm", "latents", "gate_weight", "gain")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule and loss; the defaults are the published ones (spec section 8).

    The curriculum's level goes from 0 to 1 in ``curriculum`` steps, but only in steps before which
    the smoothed exact match of training batches was at least ``curriculum_exact``: each step of it
    is earned.  0 means level 1 throughout.

    With ``patience`` training stops once that many evaluations in a row were no better than the
    best before them, by the measure that ``stop_on`` names (more is better), and ends with the
    weights of the best one.  0 trains all ``steps``.

    ``optimizer`` "muon" moves matrices by `muon.Muon`, at the same learning rate.  Gains, norms,
    biases and latents move at ``vector_lr`` times that rate, whatever moves them.

    ``neftune`` adds uniform noise of at most ``neftune / sqrt(n_tok d)`` to the embeddings of a
    question and its answer (NEFTune, arXiv 2310.05914; spec section 8).
    """

    steps: int = 1000
    docs_per_step: int = 32
    docs_per_micro_batch: int = 32
    optimizer: Optimizer = "adamw"
    lr: float = 4e-5
    vector_lr: float = 1.0
    min_lr: float = 1e-7
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    curriculum: int = 0
    curriculum_exact: float = 0.7
    loss: Literal["ce", "kl"] = "ce"
    averaging: Averaging = "per_ctx"
    l1: float = 0.0
    neftune: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10
    eval_every: int = 0
    patience: int = 0
    stop_on: str = ""


class Objective(nn.Module):
    """Loss of a batch.  Only the hypernetwork is a submodule: base and encoder stay outside."""

    def __init__(self, model: DocToLoRA, config: TrainConfig) -> None:
        super().__init__()
        self.hypernet = model.hypernet
        self.__dict__["model"], self.config = model, config

    def forward(self, batch: Batch, n_docs: int, n_labels: int) -> dict[str, Tensor]:
        """Return ``total``, ``loss``, ``l1`` (divided by the window's counts) and ``hits``.

        ``n_docs`` and ``n_labels`` count the whole accumulation window over all processes.
        ``hits`` counts the queries whose every answer token is the argmax under teacher forcing.
        """
        model: DocToLoRA = self.__dict__["model"]
        loras = self.adapters(batch)
        noise = self.config.neftune if self.training else 0.0
        per_token, hits = answer_loss(
            model.base, batch, loras, self.config.loss, training=self.training, neftune=noise
        )
        counts = [len(q.answer) for q in batch.queries]
        denominator = n_docs if self.config.averaging == "per_ctx" else n_labels
        loss = average(per_token, counts, batch.queries_per_doc, self.config.averaging, denominator)
        l1 = lora_l1(loras) / n_docs
        return {"total": loss + self.config.l1 * l1, "loss": loss, "l1": l1, "hits": hits.sum()}

    def adapters(self, batch: Batch) -> LoraBatch:
        """Encode the distinct chunks once and compose every document's adapter."""
        model: DocToLoRA = self.__dict__["model"]
        distinct: ChunkLora = model.encode(batch.distinct)
        batch = batch.read([len(model.sentences(chunk)) for chunk in batch.distinct])
        device = model.base.device
        factors = distinct.take(torch.tensor(batch.chunk_of, device=device))
        weights = torch.tensor(batch.weights, device=device)
        loras = model.hypernet.compose(factors, batch.n_chunks, weights)
        return loras.map(lambda t: t.to(model.base.model.dtype))


def answer_loss(
    base: LanguageModel,
    batch: Batch,
    loras: LoraBatch,
    kind: Literal["ce", "kl"],
    *,
    training: bool = False,
    neftune: float = 0.0,
) -> tuple[Float[Tensor, " label"], Bool[Tensor, " query"]]:
    """Return the loss of every answer token, and which queries are answered exactly.

    ``ce`` predicts the answer itself, ``kl`` the teacher's top-k (spec section 6).  A query is
    answered when its every answer token is the argmax under teacher forcing.  ``neftune`` as in
    `TrainConfig`.

    Raises ValueError for ``kl`` when a query has no teacher.
    """
    lm = base.model
    ids, mask, labels = pad_queries(batch, base.tokenizer.pad_token_id or 0)
    ids, mask, labels = (t.to(base.device) for t in (ids, mask, labels))
    doc_of_row = [d for d, n in enumerate(batch.queries_per_doc) for _ in range(n)]
    with applied(lm, route_rows(loras, doc_of_row, training=training)):
        decoder, _ = decoder_of(lm)
        inputs = {"input_ids": ids}
        if neftune:
            embedded = lm.get_input_embeddings()(ids)
            most = neftune / math.sqrt(embedded[0].numel())
            inputs = {"inputs_embeds": embedded + torch.empty_like(embedded).uniform_(-most, most)}
        hidden = decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
    at, target = shift(labels)
    rows = hidden.flatten(0, 1)[at]
    head = lm.get_output_embeddings().weight
    softcap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    per_token, best = topk_distill(rows, head, *_targets(batch, target, kind), softcap)
    counts = torch.tensor([len(q.answer) for q in batch.queries], device=best.device)
    query = torch.repeat_interleave(counts, output_size=len(best))
    missed = torch.zeros_like(counts).index_add_(0, query, (best != target).long())
    return per_token, missed == 0


def _targets(batch: Batch, target: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and ids of what each labelled row should predict."""
    if kind == "ce":
        return torch.zeros_like(target, dtype=torch.float32)[:, None], target[:, None]
    if any(q.teacher_logprob is None or q.teacher_idx is None for q in batch.queries):
        raise ValueError("loss 'kl' needs the teacher's top-k for every query; one has none")
    logprob = [row for q in batch.queries for row in q.teacher_logprob or ()]
    index = [row for q in batch.queries for row in q.teacher_idx or ()]
    device = target.device
    return torch.tensor(logprob, device=device), torch.tensor(index, device=device)


def pad_queries(batch: Batch, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad prompt + answer of every query; labels are -100 outside the answer."""
    width = max(len(q.prompt) + len(q.answer) for q in batch.queries)
    ids, mask, labels = [], [], []
    for q in batch.queries:
        before, n = len(q.prompt), len(q.prompt) + len(q.answer)
        ids.append([*q.prompt, *q.answer, *[pad] * (width - n)])
        mask.append([1] * n + [0] * (width - n))
        labels.append([-100] * before + [*q.answer] + [-100] * (width - n))
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm up linearly, then follow a cosine from ``lr`` down to ``min_lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters: norms, biases, scalers, latents and gates are not decayed."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    kept = [
        p for n, p in named if any(part in n for part in _NO_DECAY) or n.endswith((".b1", ".b2"))
    ]
    chosen = set(map(id, kept))
    decayed = [p for _, p in named if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay, "matrices": True},
        {"params": kept, "weight_decay": 0.0, "matrices": False},
    ]


def train(
    model: DocToLoRA,
    examples: Callable[[int, float], Sequence[Example]],
    config: TrainConfig,
    run_dir: Path,
    *,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Train ``model.hypernet`` in place; ``examples(step, level)`` gives the global batch of a
    step at a level of the curriculum.

    Resumes from ``run_dir/checkpoint.pt`` when it is there.  Writes ``curve.csv`` and TensorBoard
    files beside it, and with ``patience`` the best weights as ``best.pt``.  The result does not
    depend on interruptions, nor (up to summation order) on the number of processes.

    Raises ValueError when the checkpoint belongs to another configuration, the batch does not
    divide by the number of processes, or ``patience`` has nothing to go by; FloatingPointError when
    a loss is not finite.
    """
    if config.patience and not (evaluate and config.eval_every and config.stop_on):
        raise ValueError(f"patience {config.patience} needs eval_every and stop_on to be set")
    accelerator = accelerator or Accelerator(cpu=model.base.device.type == "cpu")
    n_proc, rank = accelerator.num_processes, accelerator.process_index
    if config.docs_per_step % n_proc:
        raise ValueError(
            f"docs_per_step {config.docs_per_step} must be a multiple of the {n_proc} processes"
        )
    objective = Objective(model, config)
    groups = parameter_groups(objective, config.weight_decay)
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr, betas=config.betas)
    identity = config_id(config) + config_id(model.config)
    start, pace = _resume(run_dir, identity, objective, optimizer, _Pace(config))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    best = run_dir / "best.pt"
    log = _Log(run_dir, start, config, enabled=accelerator.is_main_process)
    patience = Patience(config, log.rows if accelerator.is_main_process else ())
    wrapped.train()
    last = start if _any(accelerator, patience.over) else config.steps
    for step in range(start, last):
        window = list(examples(step, pace.level))
        local = window[rank * len(window) // n_proc : (rank + 1) * len(window) // n_proc]
        n_labels = sum(len(q.answer) for e in window for q in e.queries)
        size = config.docs_per_micro_batch
        micros = [local[i : i + size] for i in range(0, len(local), size)]
        sums = torch.zeros(4, dtype=torch.float64)
        torch.manual_seed((config.seed << 32) + step * n_proc + rank)  # dropout follows the step
        for i, micro in enumerate(micros):
            ready = i == len(micros) - 1
            with accelerator.no_sync(wrapped) if not ready else nullcontext():
                out = wrapped(Batch.of(micro), len(window), n_labels)
                accelerator.backward(out["total"] * n_proc)
            sums += torch.stack(
                [out[k].detach().double().cpu() for k in ("total", "loss", "l1", "hits")]
            )
        reduced: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
        sums = reduced.cpu()
        if not sums.isfinite().all():
            raise FloatingPointError(
                f"step {step}: the loss is {sums[0].item()}; lower the learning rate"
            )
        norm: Any = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            share = 1.0 if group["matrices"] else config.vector_lr
            group["lr"] = learning_rate(step, config) * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_queries = sum(len(e.queries) for e in window)
        row = {
            "loss": sums[1].item(),
            "l1": sums[2].item(),
            "train_exact": sums[3].item() / n_queries,
            "grad_norm": float(norm),
            "lr": learning_rate(step, config),
            "level": pace.level,
        }
        pace.update(row["train_exact"])
        done = step + 1
        scores: dict[str, float] = {}
        if (
            evaluate
            and config.eval_every
            and (done % config.eval_every == 0 or done == config.steps)
        ):
            if accelerator.is_main_process:
                wrapped.eval()
                scores = evaluate(done)
                wrapped.train()
            accelerator.wait_for_everyone()
        log.step(done, row, scores)
        if patience.is_better(row | scores):
            _write(objective.hypernet.state_dict(), best)
        over = bool(config.patience) and _any(accelerator, patience.over)
        if done % config.checkpoint_every == 0 or done == config.steps or over:
            if accelerator.is_main_process:
                _save(run_dir, identity, done, objective, optimizer, pace)
            accelerator.wait_for_everyone()
        if over:
            break
    if config.patience:
        objective.hypernet.load_state_dict(torch.load(best, map_location="cpu", weights_only=True))
    log.close()


def _any(accelerator: Accelerator, here: bool) -> bool:
    """Tell whether something holds in any process."""
    found: Any = accelerator.reduce(torch.tensor(float(here), device=accelerator.device))
    return bool(found)


class Patience:
    """Which evaluation was the best so far, by ``stop_on``, and whether it is time to stop.

    ``rows`` are those of a run so far.  Scores are compared as ``curve.csv`` shows them.
    """

    def __init__(self, config: TrainConfig, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self.config, self.best, self.waited = config, -math.inf, 0
        for row in rows:
            self.is_better(row)

    def is_better(self, row: Mapping[str, float]) -> bool:
        """Take a row; tell whether it holds an evaluation that is better than all before it.

        Raises ValueError for an evaluation without ``stop_on``, or in which it is no number.
        """
        if not self.config.patience or row.keys() <= _EVERY_STEP:
            return False
        if self.config.stop_on not in row:
            there = sorted(row.keys() - _EVERY_STEP)
            raise ValueError(f"stop_on {self.config.stop_on!r} is not measured, only {there}")
        score = float(f"{row[self.config.stop_on]:.6g}")
        if math.isnan(score):
            raise ValueError(f"stop_on {self.config.stop_on!r} is nan: there is no best to keep")
        better = score > self.best
        self.best, self.waited = max(score, self.best), 0 if better else self.waited + 1
        return better

    @property
    def over(self) -> bool:
        """Tell whether training stops here."""
        return 0 < self.config.patience <= self.waited


def read_curve(run_dir: Path) -> list[dict[str, float]]:
    """Read ``curve.csv``: one mapping per logged step, empty cells left out."""
    with (run_dir / "curve.csv").open() as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


class _Pace:
    """The level of an earned curriculum, and the smoothed exact match that earns it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.level, self.exact = (0.0 if config.curriculum else 1.0), 0.0

    def update(self, exact: float) -> None:
        """Take the exact match of a step's batch."""
        self.exact = 0.9 * self.exact + 0.1 * exact
        if self.config.curriculum and self.exact >= self.config.curriculum_exact:
            self.level = min(1.0, self.level + 1.0 / self.config.curriculum)


def _save(
    run_dir: Path, identity: str, step: int, objective: Objective, optimizer: Any, pace: _Pace
) -> None:
    state = {
        "identity": identity,
        "step": step,
        "hypernet": objective.hypernet.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pace": (pace.level, pace.exact),
    }
    _write(state, run_dir / "checkpoint.pt")


def _write(state: dict[str, Any], path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)


def _resume(
    run_dir: Path, identity: str, objective: Objective, optimizer: Any, pace: _Pace
) -> tuple[int, _Pace]:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return 0, pace
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise ValueError(
            f"{path} was written by another configuration ({state['identity']}, this run is "
            f"{identity}): choose another folder or delete it"
        )
    objective.hypernet.load_state_dict(state["hypernet"])
    optimizer.load_state_dict(state["optimizer"])
    pace.level, pace.exact = state["pace"]
    return int(state["step"]), pace


class _Log:
    """Progress bar, ``curve.csv`` and TensorBoard; rows after the resumed step are dropped."""

    def __init__(self, run_dir: Path, start: int, config: TrainConfig, *, enabled: bool) -> None:
        self.path, self.every, self.enabled = run_dir / "curve.csv", config.log_every, enabled
        self.rows: list[dict[str, float]] = []
        self.recent: list[dict[str, float]] = []
        self.began = time.monotonic()
        if not enabled:
            return
        if self.path.exists() and start:
            self.rows = [r for r in read_curve(run_dir) if r["step"] <= start]
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start)
        self.bar = tqdm(total=config.steps, initial=start, desc="train", dynamic_ncols=True)

    def step(self, done: int, row: dict[str, float], scores: dict[str, float]) -> None:
        """Take one step's numbers; write their mean where ``log_every`` or an evaluation is."""
        if not self.enabled:
            return
        self.recent.append(row)
        self.bar.update(1)
        if done % self.every and not scores and done != self.bar.total:
            return
        mean = {k: sum(r[k] for r in self.recent) / len(self.recent) for k in row}
        mean = {"step": done, **mean, **scores}
        self.recent = []
        self.rows.append(mean)
        self.bar.set_postfix({k: f"{mean[k]:.3g}" for k in ("loss", "train_exact")})
        for key, value in mean.items():
            self.board.add_scalar(key, value, done)
        columns = list(dict.fromkeys(k for r in self.rows for k in r))
        part = self.path.with_suffix(".csv.part")
        with part.open("w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in r.items()} for r in self.rows)
        os.replace(part, self.path)

    def close(self) -> None:
        """Close bar and board."""
        if self.enabled:
            self.bar.close()
            self.board.close()
