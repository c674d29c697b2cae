"""Passages of public sets as training documents: as many sentences as the curriculum allows."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from .record import Question, Record

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")


class Passages:
    """Draw records cut to a few sentences, with the questions that these answer.

    A question belongs to the sentence that holds its answer and shares the most words with it;
    one whose answer stands in no sentence is left out.  Raises ValueError where none is left.

    >>> asked = (Question("Who came?", ("Ann",)), Question("Who left?", ("Bob",)))
    >>> passages = Passages([Record("Ann came at noon. Then Bob left.", asked)])
    >>> passages.sample(random.Random(0), level=0.0, n_questions=4).document
    'Ann came at noon.'
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._passages = [p for p in map(_Passage, records) if p.questions]
        if not self._passages:
            raise ValueError(f"none of {len(records)} records has its answers in its document")

    def sample(self, rng: random.Random, level: float, n_questions: int) -> Record:
        """Draw a record of one sentence at level 0, of up to all of them at level 1.

        Half of the records have the most sentences that the level allows.  The sentences are
        consecutive and answer at least one of the (up to ``n_questions``) questions.
        """
        passage = self._passages[int(rng.random() * len(self._passages))]
        n = len(passage.sentences)
        most = max(1, round(level * n))
        size = most if rng.random() < 0.5 else rng.randint(1, most)
        _, anchor = rng.choice(passage.questions)
        start = rng.randint(max(0, anchor - size + 1), min(anchor, n - size))
        there = range(start, start + size)
        questions = [q for q, sentence in passage.questions if sentence in there]
        rng.shuffle(questions)
        return dataclasses.replace(
            passage.record,
            document=" ".join(passage.sentences[start : start + size]),
            questions=tuple(questions[:n_questions]),
        )


class _Passage:
    """A record in sentences, each question with the index of its sentence."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.sentences = [s for s in _SENTENCE.split(record.document.strip()) if s]
        words = [set(_words(s)) for s in self.sentences]
        self.questions: list[tuple[Question, int]] = []
        for question in record.questions:
            asked = set(_words(question.text))
            holding = [i for i, s in enumerate(self.sentences) if question.answers[0] in s]
            if holding:
                best = max(holding, key=lambda i: len(asked & words[i]))
                self.questions.append((question, best))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
