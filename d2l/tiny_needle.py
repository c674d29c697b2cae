"""The tiny base that finds a needle: a Llama trained on both haystacks and both needles."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable
from typing import Any

import torch

from .data.needle import NeedleGenerator, NeedleSample
from .lm.base import render_chat
from .lm.tiny import WINDOW_TOK, build_model, build_tokenizer
from .tiny_training import Row, TinyTraining, exact, pad_rows

FORMS: tuple[tuple[str, str], ...] = tuple(
    itertools.product(("repeat", "prose"), ("digits", "word"))
)
_MIXTURE = FORMS + 3 * FORMS[2:3] + FORMS[:1]  # digits in prose are the slowest to be learned
_SHORTEST_TOK, _BIN_TOK = 36, 24
RECIPE = TinyTraining(optimizer="muon", settling=80, learning_rate=2e-3)


@dataclasses.dataclass
class NeedleTask:
    """Needles in documents of up to ``start_tok`` tokens at level 0 and ``max_tok`` at level 1."""

    name: str = "tiny-base"
    start_tok: int = 60
    max_tok: int = 480

    def __post_init__(self) -> None:
        self.tokenizer: Any = build_tokenizer()
        self._generators = {
            (split, form): NeedleGenerator(self.tokenizer, *form, split=split, words="all")
            for split in ("train", "test")
            for form in FORMS
        }

    def build(self, seed: int) -> Any:
        """Return the untrained model."""
        return build_model(seed, self.tokenizer)

    def rows(self, rng: random.Random, level: float, n_rows: int) -> list[Row]:
        """Draw documents of about the same length, the forms in turn."""
        longest = self.start_tok + (self.max_tok - self.start_tok) * level
        n_tok = round(rng.uniform(_SHORTEST_TOK, longest))
        low, high = max(1, n_tok - _BIN_TOK), max(n_tok, _SHORTEST_TOK)
        forms = itertools.islice(itertools.cycle(_MIXTURE), n_rows)
        return [self.row(self._generators["train", form].sample(rng, low, high)) for form in forms]

    def row(self, sample: NeedleSample) -> Row:
        """Put a sample into the chat format, answer included."""
        prompt = render_chat(self.tokenizer, f"{sample.document}\n\n{sample.question}")
        answer = self.tokenizer(sample.answer, add_special_tokens=False).input_ids
        ids = [*prompt, *answer, self.tokenizer.eos_token_id]
        return ids, [(len(prompt), len(ids))]

    @torch.no_grad()
    def measure(
        self,
        model: Any,
        lengths: Iterable[int] = (100, 250, 450, 1024, 2048),
        n: int = 100,
        seed: int = 0,
    ) -> dict[str, dict[int, float]]:
        """Return exact match of in-context retrieval on test documents, by form and length.

        ``n`` documents of each, a quarter of that past the window, where nothing is found anyway.
        """
        out: dict[str, dict[int, float]] = {}
        for form, length in itertools.product(FORMS, lengths):
            count = n if length <= WINDOW_TOK else max(1, n // 4)
            generator = self._generators["test", form]
            samples = generator.stratified(count, length - _BIN_TOK, length, seed)
            hits: list[bool] = []
            size = max(1, 16384 // length)
            for start in range(0, count, size):
                rows = [self.row(s) for s in samples[start : start + size]]
                ids, _ = pad_rows(rows, self.tokenizer.pad_token_id, str(model.device))
                hits += exact(model(input_ids=ids, use_cache=False).logits[:, :-1], ids, rows)
            out.setdefault("/".join(form), {})[length] = sum(hits) / count
        return out

    def card(self, model: Any, measured: dict[str, Any]) -> str:
        """Describe the trained base in Markdown, from what its training measured."""
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
                f"{n_params:,} parameters, 4 layers of width 128, window {WINDOW_TOK} tokens, "
                "float32, MIT licence. Trained from scratch on generated documents only: it finds "
                "a needle in a document inside its window and can do nothing else.",
                "",
                f"Trained with seed {measured['seed']} in {measured['cpu_s']:.0f} s of CPU "
                f"time: {measured['steps']} steps of {measured['batch']} documents of up to "
                f"{self.max_tok} tokens, both haystacks, both needles and all needle words.",
                "",
                "Exact match with the document in the prompt, on held-out documents, by tokens of "
                "the document (100 each, 25 past the window):",
                "",
                "| haystack/needle | " + " | ".join(map(str, lengths)) + " |",
                "|---" * (len(lengths) + 1) + "|",
                *rows,
                "",
            ]
        )
