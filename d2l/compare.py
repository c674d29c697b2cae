"""Ask three ways and time each: the bare base, the document in its prompt, the document inside.

Also which chunk of a document an answer came from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .adapter import Adapter
from .model import DocToLoRA

MIB = 2.0**20


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
    first = clock.ticks[1] if len(clock.ticks) > 1 else ended
    return Answer(name, texts[0], first - began, ended - began, kept / MIB)


def compare(
    model: DocToLoRA, question: str, adapter: Adapter, document: str, **options: Any
) -> list[Answer]:
    """Ask the bare base, the base with ``document`` in its prompt, and the base with ``adapter``.

    A document beyond the base's window is put into the prompt all the same, as far as it fits
    at its beginning: what a user without Doc-to-LoRA would have.  ``options`` go to ``generate``.
    """
    room = model.base.window - len(model.base.tokenizer(question).input_ids) - 160
    ids = model.base.tokenizer(document, add_special_tokens=False).input_ids
    fits = document if len(ids) <= room else model.base.tokenizer.decode(ids[:room])
    return [
        timed(model, "base", question, **options),
        timed(model, "in context", f"{fits}\n\n{question}", **options),
        timed(model, "D2L", question, adapter, **options),
    ]


def influence(
    model: DocToLoRA, question: str, answer: str, adapter: Adapter, parts: Sequence[Sequence[int]]
) -> list[float]:
    """Return how much each part of the adapter's chunks supports an answer, in nats.

    ``log p(answer | adapter) - log p(answer | adapter without the part)``: positive where the part
    made the answer likelier.  ``parts`` lists positions in ``adapter.chunks``.
    """
    adapters = [adapter, *(adapter.muted(part) for part in parts)]
    whole, *others = model.log_likelihood([question] * len(adapters), answer, adapters)
    return [whole - other for other in others]
