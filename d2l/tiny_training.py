"""Train the tiny base from scratch on in-context needle retrieval, and write its folder.

One plain loop.  The batch of a step is a function of (seed, step, level) alone.  Documents start
at a block or two and grow a level whenever the batches are answered: retrieval is learned where a
step is cheap, and then carried to the length of the window in a few dozen steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.needle import NeedleGenerator, NeedleSample
from .lm.base import render_chat
from .lm.tiny import WINDOW_TOK, build_model, build_tokenizer

FORMS: tuple[tuple[str, str], ...] = tuple(
    itertools.product(("repeat", "prose"), ("digits", "word"))
)
_MIXTURE = FORMS + 3 * FORMS[2:3] + FORMS[:1]  # digits in prose are the slowest to be learned
_IGNORED = -100
_SHORTEST_TOK, _BIN_TOK = 36, 24


@dataclasses.dataclass(frozen=True)
class TinyTraining:
    """Recipe of the tiny base.

    Documents have up to ``start_tok`` tokens at level 0 and ``max_tok`` at level ``n_levels``; a
    level is earned when the running exact match passes ``earned_at``.  From the last level, or
    after ``growing`` steps, the learning rate falls to zero over ``settling`` steps.
    ``text_weight`` weighs the plain language-model loss on the text.
    """

    growing: int = 1000
    settling: int = 200
    batch: int = 32
    start_tok: int = 60
    max_tok: int = 480
    n_levels: int = 5
    earned_at: float = 0.9
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    text_weight: float = 0.1


def train_tiny_base(
    out_dir: Path | str,
    seed: int = 0,
    recipe: TinyTraining = TinyTraining(),
    device: str = "cpu",
    report: Callable[[int, float, float], None] | None = None,
) -> dict[str, Any]:
    """Train, measure and save the tiny base; return what was measured.

    ``report(step, loss, accuracy)`` is called after every step with the batch's answer loss and
    exact match.  The folder appears at ``out_dir`` complete or not at all, replacing an old one.
    """
    started = time.process_time()
    tokenizer: Any = build_tokenizer()
    model: Any = build_model(seed)
    model.to(device)
    examples = RetrievalExamples(tokenizer, "train")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
    )
    level, running, settled, step = 0, 0.0, 0, 0
    while settled < recipe.settling:
        warm = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (1 - settled / recipe.settling)
        rng = random.Random(f"tiny-base/{seed}/{step}")
        longest = recipe.start_tok + (recipe.max_tok - recipe.start_tok) * level / recipe.n_levels
        length = round(rng.uniform(_SHORTEST_TOK, longest))
        forms = itertools.islice(itertools.cycle(_MIXTURE), recipe.batch)
        rows = [examples.draw(rng, length, form) for form in forms]
        ids, answers = pad_rows(rows, tokenizer.pad_token_id, device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten())
        text = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, _IGNORED)
        objective = loss + recipe.text_weight * F.cross_entropy(
            logits.flatten(0, 1), text.flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracy = _exact(logits, answers[:, 1:]).mean().item()
        running += 0.1 * (accuracy - running)
        if running > recipe.earned_at and level < recipe.n_levels:
            level, running = level + 1, 0.9 * running
        if report is not None:
            report(step, loss.item(), accuracy)
        step += 1
        settled += level == recipe.n_levels or step > recipe.growing
    cpu_s = time.process_time() - started
    measured: dict[str, Any] = {
        "seed": seed,
        "cpu_s": cpu_s,
        "steps": step,
        **dataclasses.asdict(recipe),
    }
    measured["accuracy"] = measure_base(model, tokenizer)
    _save(Path(out_dir), model, tokenizer, measured)
    return measured


class RetrievalExamples:
    """Rows of (ids, length of the prompt) in the chat format of the evaluation."""

    def __init__(self, tokenizer: Any, split: str) -> None:
        self._tokenizer = tokenizer
        self.generators = {
            form: NeedleGenerator(tokenizer, *form, split=split, words="all") for form in FORMS
        }

    def draw(self, rng: random.Random, n_tok: int, form: tuple[str, str]) -> tuple[list[int], int]:
        """Draw a row whose document has about ``n_tok`` tokens."""
        low, high = max(1, n_tok - _BIN_TOK), max(n_tok, _SHORTEST_TOK)
        return self.row(self.generators[form].sample(rng, low, high))

    def row(self, sample: NeedleSample) -> tuple[list[int], int]:
        """Put a sample into the chat format, answer included."""
        prompt = render_chat(self._tokenizer, f"{sample.document}\n\n{sample.question}")
        answer = self._tokenizer(sample.answer, add_special_tokens=False).input_ids
        return [*prompt, *answer, self._tokenizer.eos_token_id], len(prompt)


def pad_rows(rows: Sequence[tuple[list[int], int]], pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Right-pad to (ids, answers); ``answers`` ignores the prompt and the padding."""
    width = max(len(ids) for ids, _ in rows)
    padded = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
    answers = [[_IGNORED] * n + ids[n:] + [_IGNORED] * (width - len(ids)) for ids, n in rows]
    return torch.tensor(padded, device=device), torch.tensor(answers, device=device)


@torch.no_grad()
def measure_base(
    model: Any,
    tokenizer: Any,
    lengths: Iterable[int] = (100, 250, 450, 1024, 2048),
    n: int = 100,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Return exact match of in-context retrieval on test documents, by form and length.

    ``n`` documents of each, a quarter of that past the window, where nothing is found anyway.
    Every answer token is the most likely one given the true ones before it, which is what greedy
    decoding needs to give the answer.
    """
    examples = RetrievalExamples(tokenizer, "test")
    device = next(model.parameters()).device
    out: dict[str, dict[int, float]] = {}
    for (filler, needle), length in itertools.product(FORMS, lengths):
        generator = examples.generators[filler, needle]
        count = n if length <= WINDOW_TOK else max(1, n // 4)
        samples = generator.stratified(count, length - _BIN_TOK, length, seed)
        hits: list[float] = []
        size = max(1, 16384 // length)
        for start in range(0, count, size):
            rows = [examples.row(s) for s in samples[start : start + size]]
            ids, answers = pad_rows(rows, tokenizer.pad_token_id, str(device))
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            hits += _exact(logits, answers[:, 1:]).tolist()
        out.setdefault(f"{filler}/{needle}", {})[length] = sum(hits) / count
    return out


def _exact(logits: Tensor, answers: Tensor) -> Tensor:
    right = (logits.argmax(-1) == answers) | (answers == _IGNORED)
    return right.all(-1).float()


def _save(out: Path, model: Any, tokenizer: Any, measured: dict[str, Any]) -> None:
    """Write the folder beside ``out`` and move it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / "new"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, measured))
        if out.exists():
            os.replace(out, Path(name) / "old")
        os.replace(folder, out)


def model_card(model: Any, measured: dict[str, Any]) -> str:
    """Describe a trained tiny base in Markdown, from what its training measured."""
    table: dict[str, dict[int, float]] = measured["accuracy"]
    lengths = list(next(iter(table.values())))
    rows = [
        f"| {form} | " + " | ".join(f"{by_length[n]:.2f}" for n in lengths) + " |"
        for form, by_length in table.items()
    ]
    n_params = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            "# tiny: a word-level Llama for experiments on any CPU",
            "",
            f"{n_params:,} parameters, 4 layers of width 128, window {WINDOW_TOK} tokens, float32, "
            "MIT licence. Trained from scratch on generated documents only: it finds a needle in "
            "a document inside its window and can do nothing else.",
            "",
            f"Trained with seed {measured['seed']} in {measured['cpu_s']:.0f} s of CPU "
            f"time: {measured['steps']} steps of {measured['batch']} documents of up to "
            f"{measured['max_tok']} tokens, both haystacks, both needles and all needle words.",
            "",
            "Exact match with the document in the prompt, on held-out documents, by tokens of the "
            "document (100 each, 25 past the window):",
            "",
            "| haystack/needle | " + " | ".join(map(str, lengths)) + " |",
            "|---" * (len(lengths) + 1) + "|",
            *rows,
            "",
        ]
    )
