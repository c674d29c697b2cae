"""Ask three ways and time each: document internalised, bare base, document in the prompt.

Also which chunks of a document an answer came from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapter import Adapter
from .model import DocToLoRA

_PARTS_AT_ONCE = 8


@dataclass(frozen=True)
class Answer:
    """An answer, the seconds to its first and last token, and what generation had to keep.

    ``mib`` counts the KV cache that generation ended with, and the adapter.
    """

    name: str
    text: str
    first_token_s: float
    total_s: float
    mib: float


class _Clock:
    """A streamer that notes when the prompt and then each token came."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, _: Any) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed(
    model: DocToLoRA, name: str, prompt: str, adapter: Adapter | None = None, **options: Any
) -> Answer:
    """Answer a prompt and measure it; tokenizing counts, making the adapter does not."""
    clock, began = _Clock(), time.perf_counter()
    texts, cache = model.answer([prompt], adapter, streamer=clock, **options)
    ended = time.perf_counter()
    kept = cache + (adapter.nbytes if adapter else 0)
    return Answer(name, texts[0], clock.ticks[1] - began, ended - began, kept / 2**20)


def compare(
    model: DocToLoRA, question: str, adapter: Adapter | None, document: str, **options: Any
) -> Iterator[Answer]:
    """Yield the answers of "D2L", "base" and "in context", the slowest last.

    In context the document stands before the question; of one beyond the base's window the
    beginning that fits is kept.  ``options`` go to HF ``generate``.
    """
    yield timed(model, "D2L", question, adapter, **options)
    yield timed(model, "base", question, **options)
    yield timed(model, "in context", in_context(model, question, document, **options), **options)


def in_context(
    model: DocToLoRA, question: str, document: str, max_new_tokens: int = 128, **_: Any
) -> str:
    """Put a document before a question, cut so that both and the answer fit the base's window."""
    tokenizer = model.base.tokenizer
    frame = len(model.prompt_ids(f".\n\n{question}"))
    room = max(0, model.base.window - frame - max_new_tokens)
    ids = tokenizer(document, add_special_tokens=False).input_ids
    return f"{document if len(ids) <= room else tokenizer.decode(ids[:room])}\n\n{question}"


@torch.no_grad()
def influence(
    model: DocToLoRA, question: str, answer: str, adapter: Adapter, parts: Sequence[Sequence[int]]
) -> list[float]:
    """Return how much each part of a document supports an answer, in nats.

    ``log p(answer | adapter) - log p(answer | adapter without the part)``: positive where the part
    made the answer likelier.  A part is a list of positions in ``adapter.chunks``.

    Raises IndexError for a chunk that is not there.
    """
    (whole,) = model.log_likelihood(question, answer, [adapter])
    found = []
    for i in range(0, len(parts), _PARTS_AT_ONCE):
        without = [adapter.muted(part) for part in parts[i : i + _PARTS_AT_ONCE]]
        found += [whole - other for other in model.log_likelihood(question, answer, without)]
    return found
