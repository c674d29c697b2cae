"""Measure what a figure shows: exact match with its interval, memory of generation, time to adapt.

Memory is counted in bytes of the tensors that generation must keep (the KV cache it ends with, and
the adapter), which is exact and the same on every device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .data.needle import NeedleSample
from .intervals import wilson
from .lm.base import LanguageModel
from .model import DocToLoRA

MIB = 1024.0**2


@dataclass(frozen=True)
class Score:
    """Exact matches of one series at one length, and what generation had to keep."""

    hits: int
    n: int
    gen_memory_mib: float
    adapter_mib: float = 0.0
    internalize_s: float = 0.0
    n_chunks: int = 0

    def row(self) -> dict[str, float]:
        """Return the columns of a results table that a score determines."""
        low, high = wilson(self.hits, self.n)
        return {
            "n_chunks": self.n_chunks,
            "n": self.n,
            "accuracy": self.hits / self.n,
            "ci_low": low,
            "ci_high": high,
            "gen_memory_mib": self.gen_memory_mib,
            "adapter_mib": self.adapter_mib,
            "internalize_s": self.internalize_s,
        }


def matches(reply: str, expected: str) -> bool:
    """Compare the last word of a reply, without a full stop, with the expected answer.

    A model that was asked for the number alone may still answer with the sentence that holds it;
    the same rule serves every series.
    """
    words = reply.split()
    return bool(words) and words[-1].removesuffix(".") == expected


def answer_in_context(
    model: DocToLoRA, samples: Sequence[NeedleSample], *, batch: int, max_new_tokens: int
) -> Score:
    """Let the base answer with the document in its prompt."""
    prompts = [f"{s.document}\n\n{s.question}" for s in samples]
    return _answer(model, prompts, samples, batch, max_new_tokens)


def answer_without_context(
    model: DocToLoRA, samples: Sequence[NeedleSample], *, batch: int, max_new_tokens: int
) -> Score:
    """Let the base answer the bare question."""
    return _answer(model, [s.question for s in samples], samples, batch, max_new_tokens)


def _answer(
    model: DocToLoRA,
    prompts: Sequence[str],
    samples: Sequence[NeedleSample],
    batch: int,
    max_new_tokens: int,
) -> Score:
    hits, cache_mib = 0, 0.0
    for i in range(0, len(samples), batch):
        answers, cache = model.answer(prompts[i : i + batch], max_new_tokens=max_new_tokens)
        hits += sum(map(matches, answers, [s.answer for s in samples[i : i + batch]]))
        cache_mib = max(cache_mib, cache / len(answers) / MIB)
    return Score(hits, len(samples), cache_mib)


def answer_internalized(
    model: DocToLoRA, samples: Sequence[NeedleSample], *, batch: int, max_new_tokens: int
) -> tuple[Score, Score]:
    """Internalise each document and ask about it; also ask about every document its neighbour.

    Returns the score with the right adapter and with the wrong one (the adapter of the next
    document of the batch, whose answer differs).  The first document is internalised alone, with
    every chunk encoded, for ``internalize_s``.
    """
    if batch < 2:
        raise ValueError("the wrong-document control needs at least two documents in a batch")
    began = time.perf_counter()
    one = model.internalize_batch([samples[0].document], dedupe=False)[0]
    _synchronize(model.base)
    seconds = time.perf_counter() - began
    n_chunks = len(one.chunks)
    hits = wrong_hits = wrong_n = 0
    cache_mib = 0.0
    for i in range(0, len(samples), batch):
        part = samples[i : i + batch]
        adapters = model.internalize_batch([s.document for s in part])
        questions = [s.question for s in part]
        answers, cache = model.answer(questions, adapters, max_new_tokens=max_new_tokens)
        hits += sum(map(matches, answers, [s.answer for s in part]))
        cache_mib = max(cache_mib, cache / len(part) / MIB)
        others = [(d + 1) % len(part) for d in range(len(part))]
        asked = [d for d, o in enumerate(others) if part[o].answer != part[d].answer]
        if asked:
            answers, _ = model.answer(
                [questions[d] for d in asked],
                [adapters[others[d]] for d in asked],
                max_new_tokens=max_new_tokens,
            )
            wrong_hits += sum(map(matches, answers, [part[d].answer for d in asked]))
            wrong_n += len(asked)
    adapter_mib = one.nbytes / MIB
    own = Score(hits, len(samples), cache_mib, adapter_mib, seconds, n_chunks)
    return own, Score(wrong_hits, wrong_n, cache_mib, adapter_mib, seconds, n_chunks)


def _synchronize(base: LanguageModel) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
