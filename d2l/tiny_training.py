"""Train a tiny base from scratch on a task with documents in its prompt, and write its folder.

One plain loop for every task.  The batch of a step is a function of (seed, step, level) alone.
Documents start small and grow a level whenever the batches are answered: retrieval is learned where
a step is cheap, and then carried to the length of the window in a few dozen steps.
"""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from .muon import OPTIMIZERS, Optimizer

IGNORED = -100
Row = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and for each answer in them its first position and the one after its last."""


@runtime_checkable
class Task(Protocol):
    """What a tiny base is trained on."""

    name: str
    tokenizer: Any

    def build(self, seed: int) -> Any:
        """Return the untrained model."""
        ...

    def rows(self, rng: random.Random, level: float, n_rows: int) -> list[Row]:
        """Draw a batch at a level of the curriculum from 0 to 1."""
        ...

    def measure(self, model: Any) -> dict[str, Any]:
        """Measure the trained model on held-out documents."""
        ...

    def card(self, model: Any, measured: dict[str, Any]) -> str:
        """Describe the trained model in Markdown."""
        ...


@dataclasses.dataclass(frozen=True)
class TinyTraining:
    """Recipe of a tiny base.

    A level is earned when the running exact match passes ``earned_at``.  From the last level, or
    after ``growing`` steps, the learning rate falls to zero over ``settling`` steps.
    ``text_weight`` weighs the plain language-model loss on the text.  ``optimizer`` "muon" moves
    all matrices but the embedding by `muon.Muon`.
    """

    optimizer: Optimizer = "adamw"
    growing: int = 1000
    settling: int = 200
    batch: int = 32
    n_levels: int = 5
    earned_at: float = 0.9
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    text_weight: float = 0.1


def train_tiny(
    task: Task,
    out_dir: Path | str,
    seed: int = 0,
    recipe: TinyTraining = TinyTraining(),
    device: str = "cpu",
    report: Callable[[int, float, float, float], None] | None = None,
) -> dict[str, Any]:
    """Train, measure and save a tiny base; return what was measured.

    ``report(step, level, loss, accuracy)`` is called after every step with the batch's answer loss
    and exact match.  The folder appears at ``out_dir`` complete or not at all, replacing an old
    one.
    """
    started = time.process_time()
    model: Any = task.build(seed)
    model.to(device)
    optimizer = optimizer_of(model, recipe)
    pad = task.tokenizer.pad_token_id
    level, running, settled, step = 0, 0.0, 0, 0
    while settled < recipe.settling:
        warm = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (1 - settled / recipe.settling)
        rng = random.Random(f"{task.name}/{seed}/{step}")
        rows = task.rows(rng, level / recipe.n_levels, recipe.batch)
        ids, answers = pad_rows(rows, pad, device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten())
        text = ids[:, 1:].masked_fill(ids[:, 1:] == pad, IGNORED)
        objective = loss + recipe.text_weight * F.cross_entropy(
            logits.flatten(0, 1), text.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        hits = exact(logits, ids, rows)
        accuracy = sum(hits) / len(hits)
        running += 0.1 * (accuracy - running)
        if report is not None:
            report(step, level / recipe.n_levels, loss.item(), accuracy)
        if running > recipe.earned_at and level < recipe.n_levels:
            level, running = level + 1, 0.9 * running
        step += 1
        settled += level == recipe.n_levels or step > recipe.growing
    measured: dict[str, Any] = {
        "seed": seed,
        "cpu_s": time.process_time() - started,
        "steps": step,
        **dataclasses.asdict(recipe),
    }
    measured["accuracy"] = task.measure(model.eval())
    _save(Path(out_dir), model, task, measured)
    return measured


def optimizer_of(model: Any, recipe: TinyTraining) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of ``model``; its norms and embedding are AdamW's anyway."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim == 2 and "embed" not in name].append(p)
    return OPTIMIZERS[recipe.optimizer](
        [{"params": ps, "matrices": matrices} for matrices, ps in groups.items()],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
    )


def pad_rows(rows: Sequence[Row], pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Right-pad to (ids, answers); ``answers`` ignores all that is no answer."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
    answers = torch.full_like(ids, IGNORED)
    for i, (_, spans) in enumerate(rows):
        for start, stop in spans:
            answers[i, start:stop] = ids[i, start:stop]
    return ids.to(device), answers.to(device)


def exact(logits: Tensor, ids: Tensor, rows: Sequence[Row]) -> list[bool]:
    """Tell for each answer whether all its tokens are the most likely ones.

    ``logits`` leave out the last position.  Every token is judged given the true ones before it,
    which is what greedy decoding needs to give the answer.
    """
    right = (logits.argmax(-1) == ids[:, 1:]).tolist()
    return [
        all(right[i][start - 1 : stop - 1])
        for i, (_, spans) in enumerate(rows)
        for start, stop in spans
    ]


def _save(out: Path, model: Any, task: Task, measured: dict[str, Any]) -> None:
    """Write the folder beside ``out`` and move it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / "new"
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(task.card(model, measured))
        if out.exists():
            os.replace(out, Path(name) / "old")
        os.replace(folder, out)
