"""Training of the runs about facts: its stages, and how it is watched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..chunking import PUBLISHED_CHUNK_PROBS
from ..data.example import Example
from ..data.fact_training import FactPool, FactTraining, titles_for
from ..data.record import Record
from ..lm.base import LanguageModel
from ..model import DocToLoRA
from ..qa_metrics import score
from ..teacher import HfTeacher
from ..teaching import taught
from ..train import train as fit
from .facts import FactRun, Stage, documents
from .shipped import fresh

NEXT = 7
"""How far the seed of a stage's documents lies behind that of the stage before."""
_MOST_SENTENCES = 12
"""Sentences that training composes, where they are read apart (2 of 512 documents had more)."""


def trained(wanted: FactRun, base: LanguageModel, folder: Path) -> DocToLoRA:
    """Train, or resume, in ``folder``; the model's initialisation depends on the seed alone.

    Stages before the last lie in ``folder / "stage0"`` and so on.  Every stage has other documents:
    those of the run's seed and `NEXT` for each stage before it.
    """
    most = max(PUBLISHED_CHUNK_PROBS) if wanted.stream.cut_share else 1
    if wanted.chunk.sentences:
        most = _MOST_SENTENCES
    model = fresh(wanted, base, trained_chunks=most)
    last = Stage(wanted.stream, wanted.train, wanted.chunk)
    n_stages = 1 + len(wanted.before)
    if not 1 <= wanted.averaged <= n_stages:
        raise ValueError(f"averaged is 1 to the {n_stages} stages, not {wanted.averaged}")
    ends: list[dict[str, Tensor]] = []
    for i, stage in enumerate((*wanted.before, last)):
        place = folder if stage is last else folder / f"stage{i}"
        _fit(model, wanted, stage, place, wanted.train.seed + NEXT * i)
        ends = [*ends, copy.deepcopy(model.hypernet.state_dict())][-wanted.averaged :]
    mean = {k: torch.stack([end[k] for end in ends]).mean(0) for k in ends[0]}
    model.hypernet.load_state_dict(mean)
    return model


def _fit(model: DocToLoRA, wanted: FactRun, stage: Stage, folder: Path, seed: int) -> None:
    """Train a stage; ``seed`` is that of its documents."""
    model.chunk = stage.chunk
    base, length = model.base, wanted.eval.max_new_tokens
    teacher = HfTeacher(base) if stage.train.loss == "kl" else None
    watched = on_the_way(dataclasses.replace(wanted, stream=stage.stream))

    @functools.cache
    def in_context(name: str) -> float:
        return quick_recall(model, watched[name], None, length)

    def held_out(_: int) -> dict[str, float]:
        scores = {}
        for name, records in watched.items():
            own, wrong = quick_scores(model, records, length)
            scores |= {f"held_out{name}": own, f"held_out{name}_wrong": wrong}
            scores[f"relative{name}"] = own / in_context(name) if in_context(name) else math.nan
        return scores

    def examples(step: int, level: float) -> list[Example]:
        drawn = stream.drawn(step, range(stage.train.docs_per_step), level)
        batch = [example for _, example in drawn]
        return batch if teacher is None else taught(batch, [r for r, _ in drawn], teacher)

    source = (base.tokenizer, stage.stream, stage.chunk, seed)
    with stream_of(source, base.device) as stream:
        fit(model, examples, stage.train, folder, evaluate=held_out)


@contextmanager
def stream_of(source: tuple[Any, ...], device: torch.device) -> Iterator[FactTraining | FactPool]:
    """Draw documents in this process, beside a GPU in as many as there are cores to spare."""
    here = FactTraining(*source)  # beside a GPU too: what is wrong with its data is said here
    if device.type == "cpu":
        yield here
        return
    pool = FactPool(max(1, (os.cpu_count() or 1) - 2), *source)
    try:
        yield pool
    finally:
        pool.close()


def quick_scores(
    model: DocToLoRA, records: Sequence[Record], max_new_tokens: int
) -> tuple[float, float]:
    """Return mean recall with the right and with another document's adapter, one batch each."""
    own = model.internalize_batch(r.document for r in records)
    right, wrong = (
        quick_recall(model, records, adapters, max_new_tokens)
        for adapters in (own, [*own[1:], own[0]])
    )
    return right, wrong


def quick_recall(
    model: DocToLoRA,
    records: Sequence[Record],
    adapters: Sequence[Adapter] | None,
    max_new_tokens: int,
) -> float:
    """Return mean recall of the first questions, asked in one batch.

    Without ``adapters`` the base has the documents in its prompts.
    """
    asked = [r.questions[0] for r in records]
    texts = [q.text for q in asked]
    if adapters is None:
        texts = [f"{r.document}\n\n{text}" for r, text in zip(records, texts, strict=True)]
    answers = model.generate(texts, adapters, max_new_tokens=max_new_tokens)
    pairs = zip(answers, asked, strict=True)
    return statistics.fmean(score(a, q.answers).recall for a, q in pairs)


def on_the_way(wanted: FactRun) -> dict[str, list[Record]]:
    """Draw the held-out documents that training is watched with, by set ("": encyclopedia)."""
    invented = dataclasses.replace(wanted, eval=dataclasses.replace(wanted.eval, public=""))
    found = {"": documents(invented, wanted.stream.max_facts, 40, shift=10_000)}
    for name in wanted.stream.mix:
        pool = titles_for(name, "watch")
        found[f"_{name}"] = random.Random(name).sample(pool, min(80, len(pool)))
    return found
