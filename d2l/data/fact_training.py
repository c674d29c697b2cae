"""Training stream for facts: documents of the encyclopedia with questions about them.

Every batch is a pure function of (seed, step, level): a resumed run continues with the same data.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any, Literal

from ..chunking import fewest_chunks, sample_chunks, split
from ..config import ChunkConfig
from ..lm.base import chat_affixes, render_chat
from .encyclopedia import EncyclopediaGenerator
from .example import Example, Query
from .needle_training import end_of_turn
from .record import Question, Record


@dataclasses.dataclass(frozen=True)
class FactStream:
    """What the stream holds: documents of one fact at level 0, of up to ``max_facts`` at level 1.

    ``kinds`` take turns in every second document once the level is above a half; before, and in the
    other documents, questions recall single facts.  ``cut_share`` of the documents are cut into
    several chunks when ``cut_share`` is above 0 (stage 2 of the paper's training).  Queries are
    ``questions``, or ``sentences`` of the document that leave out the answer (see `gaps`); the
    documents are the same.
    """

    vocabulary: str = "open"
    max_facts: int = 8
    queries_per_doc: int = 2
    kinds: tuple[str, ...] = ("recall",)
    values: tuple[str, ...] = ("words", "phrases", "numbers", "names")
    distractors: float = 0.25
    rivals: bool = True
    words: str = "seen"
    forms: str = "train"
    cut_share: float = 0.0
    queries: Literal["questions", "sentences"] = "questions"


class FactTraining:
    """Build the examples of one step for one tokenizer."""

    def __init__(self, tokenizer: Any, stream: FactStream, chunk: ChunkConfig, seed: int) -> None:
        self.stream, self.chunk, self.seed = stream, chunk, seed
        self._tokenizer = tokenizer
        self._generator = EncyclopediaGenerator(
            "train",
            vocabulary=stream.vocabulary,
            values=stream.values,
            words=stream.words,
            forms=stream.forms,
            distractors=stream.distractors,
            rivals=stream.rivals,
        )

    def records(self, step: int, n_docs: int, level: float = 1.0) -> list[Record]:
        """Return the documents of ``step`` at a level of the curriculum, in order."""
        return [
            self._record(random.Random(f"{self.seed}/{step}/{i}"), level, i) for i in range(n_docs)
        ]

    def batch(self, step: int, n_docs: int, level: float = 1.0) -> list[Example]:
        """Return ``records`` as training examples."""
        return self.examples(self.records(step, n_docs, level), step, level)

    def examples(self, records: list[Record], step: int, level: float = 1.0) -> list[Example]:
        """Return the training examples of a step whose ``records`` are there already."""
        rng = random.Random(f"cut/{self.seed}/{step}")
        cut = self.stream.cut_share if level >= 1.0 else 0.0
        return [
            fact_example(self._tokenizer, r, self.chunk, rng if rng.random() < cut else None)
            for r in records
        ]

    def _record(self, rng: random.Random, level: float, i: int) -> Record:
        s = self.stream
        most = 1 + round(level * (s.max_facts - 1))
        n_facts = most if rng.random() < 0.5 else rng.randint(1, most)
        kinds = s.kinds if level > 0.5 and i % 2 else ("recall",)
        n_questions = min(s.queries_per_doc, n_facts)
        record = self._generator.sample(rng, n_facts, n_questions, kinds)
        return gaps(record, n_questions, rng) if s.queries == "sentences" else record


def gaps(record: Record, n: int, rng: random.Random) -> Record:
    """Ask for what up to ``n`` sentences of the document leave out, instead of questions.

    A sentence that does not name what it is about, or says its value elsewhere too, is not used;
    a record without any other keeps its questions.

    >>> from d2l.data.record import Fact
    >>> fact = Fact("Ada Lin", "pet", "goat", "pet0", "Ada Lin keeps a goat.")
    >>> record = Record(fact.text, (Question("What does Ada Lin keep?", ("goat",)),), (fact,))
    >>> gaps(record, 1, random.Random(0)).questions[0].text
    'Ada Lin keeps a .'
    """
    parted = [
        (i, f, re.split(rf"\b{re.escape(f.value)}\b", f.text)) for i, f in enumerate(record.facts)
    ]
    usable = [row for row in parted if row[1].entity in row[1].text and len(row[2]) == 2]
    asked = tuple(
        Question("".join(around).strip(), (fact.value,), "gap", (i,), fact.form)
        for i, fact, around in rng.sample(usable, min(n, len(usable)))
    )
    return dataclasses.replace(record, questions=asked or record.questions)


def fact_example(
    tokenizer: Any, record: Record, chunk: ChunkConfig, rng: random.Random | None = None
) -> Example:
    """Turn a record into chunks and queries; with ``rng`` the number of chunks is drawn.

    The answer of a query is the first accepted one, with the end of the turn.
    """
    prefix, suffix = chat_affixes(tokenizer)
    ids = render_chat(tokenizer, record.document.strip())
    n = fewest_chunks(len(ids), chunk) if rng is None else sample_chunks(len(ids), chunk, rng)
    end = end_of_turn(tokenizer)
    queries = tuple(
        Query(
            tuple(render_chat(tokenizer, q.text)),
            (*tokenizer(q.answers[0], add_special_tokens=False).input_ids, end),
        )
        for q in record.questions
    )
    return Example(tuple(map(tuple, split(ids, n, prefix, suffix))), queries)
