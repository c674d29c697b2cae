"""The fact-internalising run that figures and tables share: its config, documents and methods.

Documents come from the invented encyclopedia, or a public set; `measuring` asks every method of
`d2l.baselines` the same questions about the same held-out ones.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from ..baselines import (
    DistillConfig,
    Method,
    Reply,
    Setting,
    compressed,
    d2l_batched,
    d2l_iterative,
    d2l_routed,
    d2l_with_truncated_context,
    distilled,
    in_context,
    retrieved,
    truncated_context,
    without_context,
)
from ..baselines.setting import reply_to
from ..config import ChunkConfig, HypernetConfig
from ..data.encyclopedia import LEXICONS, EncyclopediaGenerator
from ..data.fact_training import (
    TRAINING_SETS,
    FactStream,
    titles_for,
)
from ..data.public import load
from ..data.record import Record
from ..meter import Meter
from ..model import DocToLoRA
from ..routing import PART_TOK
from ..train import TrainConfig
from .shipped import Curve

Metric = Literal["f1", "recall"]
Methods = Callable[["FactRun", Sequence[Record]], dict[tuple[str, str], Method]]


@dataclasses.dataclass(frozen=True)
class FactEval:
    """Held-out documents: how many of each number of facts, and how each method is asked.

    ``metric`` is what ``relative`` compares (the paper: F1, recall for verbose models).  Slow
    methods (distillation) see the first ``n_slow`` documents only, other alternatives than the base
    and D2L the first ``n_alternatives`` (None: all); memory is counted on the first ``n_metered``.
    ``kinds`` of questions take turns.  ``rivals`` of the documents is that of the training stream
    where it is None.  ``public`` names a public set that is asked about instead (of SQuAD the
    titles held out for tests), in as many documents as ``n_docs`` first says; their number of facts
    counts as 0.  ``routed`` asks the best part of a document too, as adapter and in the prompt.
    """

    n_facts: tuple[int, ...] = (8,)
    n_docs: tuple[int, ...] = (50,)
    n_questions: int = 4
    n_slow: int = 5
    n_alternatives: int | None = None
    n_metered: int = 2
    rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
    cd_queries: tuple[int, ...] = (20,)
    cd_epochs: int = 300
    cd_lr: float = 1e-4
    metric: Metric = "f1"
    kinds: tuple[str, ...] = ("recall",)
    rivals: bool | None = None
    public: str = ""
    forms: str = "test"
    routed: bool = False
    max_new_tokens: int = 16
    seed: int = 4321


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training: other documents, cut otherwise, from where the one before ended."""

    stream: FactStream
    train: TrainConfig
    chunk: ChunkConfig


@dataclasses.dataclass(frozen=True)
class FactRun:
    """Everything that a run depends on; the stages ``before`` are trained before the last one.

    Of the last ``averaged`` stages the mean of the weights that each ended with is what is kept.
    """

    base: str
    dtype: Literal["float32", "bfloat16"]
    hypernet: HypernetConfig
    chunk: ChunkConfig
    stream: FactStream
    train: TrainConfig
    eval: FactEval
    before: tuple[Stage, ...] = ()
    averaged: int = 1


def counts(wanted: FactRun) -> list[tuple[int, int]]:
    """List numbers of facts with their numbers of documents; a public set has one, of 0 facts."""
    e = wanted.eval
    return [(0, e.n_docs[0])] if e.public else list(zip(e.n_facts, e.n_docs, strict=True))


def documents(wanted: FactRun, n_facts: int, n: int, *, shift: int = 0) -> list[Record]:
    """Draw held-out documents: names of the test split, in the forms that the config names.

    Raises what `d2l.data.public.load` raises where they are those of a public set.
    """
    e = wanted.eval
    if e.public:
        return public_documents(e.public, n, e.n_questions, e.seed + shift)
    generator = EncyclopediaGenerator(
        "test",
        vocabulary=wanted.stream.vocabulary,
        forms=e.forms,
        values=wanted.stream.values,
        words=wanted.stream.words,
        distractors=wanted.stream.distractors,
        rivals=wanted.stream.rivals if e.rivals is None else e.rivals,
    )
    rng = random.Random(f"held-out/{e.seed + shift}/{n_facts}")
    n_questions = min(e.n_questions, n_facts)
    return [generator.sample(rng, n_facts, n_questions, e.kinds) for _ in range(n)]


def public_documents(name: str, n: int, n_questions: int, seed: int) -> list[Record]:
    """Draw documents of a public set, each with up to ``n_questions`` of its questions.

    Of a set that training may see, only the titles held out for tests.
    """
    found = titles_for(name, "test") if name in TRAINING_SETS else load(name, "validation")
    rng = random.Random(f"{name}/{seed}")
    return [
        dataclasses.replace(
            record,
            questions=tuple(rng.sample(record.questions, min(n_questions, len(record.questions)))),
        )
        for record in rng.sample(found, min(n, len(found)))
    ]


def asker(wanted: FactRun, records: Iterable[Record]) -> Any:
    """Return ``ask(document, n)``: questions in training forms about the facts of a record.

    They stand for what a capable model would ask: a base made from scratch writes none.  There are
    a few for each fact, so a document may have fewer than ``n``.
    """
    by_document = {r.document: r for r in records}
    lexicon = LEXICONS[wanted.stream.vocabulary]
    known = {a.name: a for listed in lexicon.attributes.values() for a in listed}

    def ask(document: str, n: int) -> list[str]:
        found = [
            form.text.format(e=fact.entity, n=known[fact.attribute].noun)
            for fact in by_document[document].facts
            if fact.attribute in known
            for form in known[fact.attribute].questions.of("train")
        ]
        random.Random(document).shuffle(found)
        return found[:n]

    return ask


def wrong_document(records: Sequence[Record], *, in_context: bool = False) -> Method:
    """Return the control: D2L with the adapter of the next document of ``records``.

    With ``in_context`` the right document stands in the prompt.
    """
    next_one = following(records)

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        model = setting.hypernet
        assert model is not None
        base = setting.base
        loras = model.internalize(next_one[document]).batch(base.device, base.model.dtype)
        context = document if in_context else ""
        return [
            reply_to(setting, document, q, Meter(), context=context, loras=loras) for q in questions
        ]

    return method


def reading(method: Method, other: Callable[[str], str]) -> Method:
    """Return ``method`` with another text in place of each document."""
    return lambda setting, document, questions: method(setting, other(document), questions)


def following(records: Sequence[Record]) -> dict[str, str]:
    """Map every document to the next one."""
    return {r.document: records[(i + 1) % len(records)].document for i, r in enumerate(records)}


def methods(wanted: FactRun, records: Sequence[Record]) -> dict[tuple[str, str], Method]:
    """List every method by (series, part), those that train on each document last."""
    e = wanted.eval
    found: dict[tuple[str, str], Method] = {
        ("base_with_context", ""): in_context,
        ("base_without_context", ""): without_context,
        ("truncated_context", "half"): truncated_context,
        **{("selective_context", f"{rate:g}"): compressed(rate) for rate in e.rates},
        ("retrieved", ""): retrieved(32),
        ("d2l", "batched"): d2l_batched,
        ("d2l", "iterative"): d2l_iterative,
        ("d2l_with_truncated_context", "half"): d2l_with_truncated_context,
        ("wrong_document", ""): wrong_document(records),
    }
    if e.routed:
        found["d2l_routed", ""] = d2l_routed()
        found["wrong_document", "routed"] = d2l_routed(of=following(records))
        found["retrieved_part", ""] = retrieved(PART_TOK)
    if e.n_slow:
        oracle = DistillConfig(epochs=e.cd_epochs, lr=e.cd_lr)
        found["cd_oracle", ""] = distilled(oracle)
        for n in e.cd_queries:
            found["cd_generated", str(n)] = distilled(dataclasses.replace(oracle, n_queries=n))
    return found


def card(wanted: FactRun, model: DocToLoRA, curve: Curve, which: str) -> str:
    """Write the model card from the run itself."""
    last = {k: v for row in curve for k, v in row.items()}
    n_params = sum(p.numel() for p in model.hypernet.parameters())
    s, t = wanted.stream, wanted.train
    level = last["level"]
    mixed = f"\n  Passages of public sets, by weight against 1: {s.mix}, {s.in_place:.0%} of them"
    mixed = f"{mixed}\n  asked about in their own words." if s.mix else ""
    for one in reversed(wanted.before):
        mixed += f"\n  Before that {one.train.steps} steps of {one.train.docs_per_step} documents"
        mixed += f" with {one.stream.mix}, {one.stream.in_place:.0%}."
    if wanted.averaged > 1:
        mixed += f"\n  The weights are the mean of what the last {wanted.averaged} of these ended"
        mixed += " with;\n  what is watched is the last."
    return f"""# Fact hypernetwork for {wanted.base} ({which}, seed {t.seed})

Turns a document of the invented encyclopedia into LoRA factors for
`{", ".join(wanted.hypernet.lora.target_modules)}` of a frozen `{wanted.base}`, which then answers
questions about it without having it in its context.

- Parameters: {n_params / 1e6:.2f} M, stored as bfloat16 safetensors. Licence: MIT.
- Base fingerprint: `{model.base.fingerprint}`. Another base is refused or warned about.
- Data: generated, stream seed {t.seed}; {curve[-1]["step"]:.0f} of {t.steps} steps of
  {t.docs_per_step} documents of 1 to {s.max_facts} facts, {s.queries_per_doc} questions each,
  vocabulary {s.vocabulary}, loss {t.loss}; the curriculum ended at level {level:.2f}.{mixed}
- Everything else: `config.json`. Training curve: `curve.csv`. Make it again:
  `just train {which} --seed {t.seed}`.

Held-out documents of {s.max_facts} facts when last watched, recall of the answer: right document
{last.get("held_out", math.nan):.2f}, another document's adapter
{last.get("held_out_wrong", math.nan):.2f}.  The full
evaluation is in `results/`.
"""
