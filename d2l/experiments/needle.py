"""The needle-in-a-haystack run that figures share: its config, training and evaluation.

Which values a figure uses, and what it draws of the result, stands with the figure.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from ..config import ChunkConfig, HypernetConfig
from ..data.example import Example
from ..data.needle import Filler, Needle, NeedleGenerator, NeedleSample, Words
from ..data.needle_training import NeedleStream, NeedleTraining
from ..evaluate import Score, answer_in_context, answer_internalized, answer_without_context
from ..lm.base import LanguageModel
from ..model import DocToLoRA
from ..train import TrainConfig
from ..train import train as fit
from .shipped import Curve, fresh

N_WITHOUT_CONTEXT = 200


@dataclasses.dataclass(frozen=True)
class NeedleEval:
    """Lengths (documents of 0.9 to 1 times so many tokens) and documents per length."""

    lengths: tuple[int, ...] = ()
    n_docs: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    n_context: tuple[int, ...] = ()
    variant_lengths: tuple[int, ...] = ()
    n_variant: int = 0
    batch: int = 4
    max_new_tokens: int = 8
    seed: int = 1234


@dataclasses.dataclass(frozen=True)
class NeedleRun:
    """Everything that a run depends on."""

    base: str
    dtype: Literal["float32", "bfloat16"]
    hypernet: HypernetConfig
    chunk: ChunkConfig
    train_chunk: ChunkConfig
    stream: NeedleStream
    train: TrainConfig
    eval: NeedleEval

    @property
    def train_tok(self) -> int:
        """Longest text seen in training: a whole document, or the chunks of a composition."""
        composed = self.train_chunk.max_tok if self.stream.compose_share else 0
        return max(self.stream.max_tok, composed)


VARIANTS: tuple[tuple[Filler, Needle, Words], ...] = (
    ("prose", "digits", "seen"),
    ("repeat", "word", "seen"),
    ("repeat", "word", "heldout"),
    ("prose", "word", "seen"),
)


def trained(wanted: NeedleRun, base: LanguageModel, folder: Path) -> DocToLoRA:
    """Train, or resume, in ``folder``; the model's initialisation depends on the seed alone."""
    most = wanted.stream.max_chunks if wanted.stream.compose_share else None
    model = fresh(wanted, base, trained_chunks=most)
    stream = NeedleTraining(base.tokenizer, wanted.stream, wanted.train_chunk, wanted.train.seed)

    def held_out(_: int) -> dict[str, float]:
        out = {}
        for n_tok in (wanted.stream.max_tok, 16 * wanted.stream.max_tok):
            samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, 20, shift=10_000)
            own, wrong = answer_internalized(model, samples, **_decoding(wanted))
            out |= {f"exact_{n_tok}": own.hits / own.n, f"wrong_{n_tok}": wrong.hits / wrong.n}
        return out

    def examples(step: int, level: float) -> list[Example]:
        return stream.batch(step, wanted.train.docs_per_step, level)

    fit(model, examples, wanted.train, folder, evaluate=held_out)
    return model


def measure(
    wanted: NeedleRun, model: DocToLoRA, *, seed: int, with_base: bool = True
) -> pd.DataFrame:
    """Evaluate every series at every length; one row each, columns as in ``data.csv``.

    ``with_base`` adds the base with and without context, which no training seed changes.  Without
    context the length plays no part: one row with ``haystack_tok`` 0.
    """
    e = wanted.eval
    rows: list[dict[str, Any]] = []
    pairs = [*zip(e.lengths, e.n_docs, strict=True)]
    context = dict(zip(e.context_lengths, e.n_context, strict=True))
    bar = tqdm(total=sum(e.n_docs) + with_base * sum(e.n_context), desc="evaluate", unit="doc")

    def add(series: str, n_tok: float, score: Score) -> None:
        rows.append({"series": series, "haystack_tok": round(n_tok), **score.row(), "seed": seed})

    for n_tok, n in pairs:
        samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, n)
        mean = sum(s.n_tok for s in samples) / n
        own, wrong = answer_internalized(model, samples, **_decoding(wanted))
        add("d2l", mean, own)
        add("wrong_document", mean, wrong)
        bar.update(n)
    for n_tok, n in context.items() if with_base else ():
        samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, n)
        decoding = _decoding(wanted) | {"batch": max(1, min(e.batch, 8192 // n_tok))}
        mean = sum(s.n_tok for s in samples) / n
        add("base_with_context", mean, answer_in_context(model, samples, **decoding))
        bar.update(n)
    if with_base:
        n = min(N_WITHOUT_CONTEXT, 10 * max(e.n_docs))
        samples = _documents(model, wanted, "repeat", "digits", "seen", e.lengths[0], n)
        add("base_without_context", 0, answer_without_context(model, samples, **_decoding(wanted)))
    bar.close()
    return pd.DataFrame(rows)


def measure_variants(wanted: NeedleRun, model: DocToLoRA, *, seed: int) -> pd.DataFrame:
    """Evaluate other haystacks and needles, named as trained on or not."""
    rows = []
    for filler, needle, words in VARIANTS:
        for n_tok in wanted.eval.variant_lengths:
            samples = _documents(model, wanted, filler, needle, words, n_tok, wanted.eval.n_variant)
            own, wrong = answer_internalized(model, samples, **_decoding(wanted))
            mean = round(sum(s.n_tok for s in samples) / len(samples))
            what = {
                "filler": filler,
                "needle": needle if words == "seen" else f"{needle} ({words})",
            }
            for series, score in (("d2l", own), ("wrong_document", wrong)):
                rows.append(
                    {**what, "series": series, "haystack_tok": mean, **score.row(), "seed": seed}
                )
    return pd.DataFrame(rows)


def _documents(
    model: DocToLoRA,
    wanted: NeedleRun,
    filler: Filler,
    needle: Needle,
    words: Words,
    n_tok: int,
    n: int,
    *,
    shift: int = 0,
) -> list[NeedleSample]:
    """Draw ``n`` test documents of 0.9 to 1 times ``n_tok`` tokens, depths in turn."""
    generator = NeedleGenerator(
        model.base.tokenizer, filler=filler, needle=needle, split="test", words=words
    )
    seed = wanted.eval.seed + shift + n_tok
    return generator.stratified(n, min(int(0.9 * n_tok), n_tok - 28), n_tok, seed)


def _decoding(wanted: NeedleRun) -> dict[str, int]:
    return {"batch": wanted.eval.batch, "max_new_tokens": wanted.eval.max_new_tokens}


def card(wanted: NeedleRun, model: DocToLoRA, curve: Curve, which: str) -> str:
    """Write the model card from the run itself."""
    last = {k: v for row in curve for k, v in row.items()}
    held_out = [k for k in last if k.startswith(("exact_", "wrong_"))]
    n_params = sum(p.numel() for p in model.hypernet.parameters())
    stream, fit_ = wanted.stream, wanted.train
    steps = f"{curve[-1]['step']:.0f}"
    if curve[-1]["step"] < fit_.steps:
        steps += f" (stopped early: the recipe has {fit_.steps})"
    shown = "\n".join(f"| {k} | {last[k]:.2f} |" for k in held_out)
    return f"""# Needle hypernetwork for {wanted.base} ({which}, seed {fit_.seed})

Turns a document into LoRA factors for `{", ".join(wanted.hypernet.lora.target_modules)}` of
a frozen `{wanted.base}`, which then recalls the magic number or word of a haystack without having
it in its context.  It was trained for that task alone and is no general question answerer.

- Parameters: {n_params / 1e6:.2f} M, stored as bfloat16 safetensors. Licence: MIT.
- Base fingerprint: `{model.base.fingerprint}`. Another base is refused or warned about.
- Data: generated, stream seed {fit_.seed}; {steps} steps of {fit_.docs_per_step} documents.
  Whole documents have at most {stream.max_tok} tokens and are cut into up to 8 chunks;
  {stream.compose_share:.0%} are one chunk of up to {wanted.train_chunk.max_tok} tokens joined with
  repeated chunks of filler, up to {stream.max_chunks} chunks in all.  {stream.prose_share:.0%} have
  prose haystacks, {stream.word_share:.0%} word needles.
- Everything else: `config.json`. Training curve: `curve.csv`. Make it again:
  `just train {which} --seed {fit_.seed}`.

Held-out documents at the last step (exact match with the right and with the wrong document's
adapter, 20 documents each, by haystack length in tokens; the full evaluation is in `results/`):

| measure | value |
|---|---|
{shown}
"""
