"""Passages of public sets as training documents: as many sentences as the curriculum allows."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from .record import Question, Record

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")
_NAMED = re.compile(r"[A-Z]\w[\w'-]*|\d[\d,.]*\d|\d")  # a name or a number
_MORE, _AROUND = 4, 10
"""Words of an answer beyond its first, and words kept on each side of it, at most."""


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
        self.passages = [p for p in map(Passage, records) if p.questions]
        if not self.passages:
            raise ValueError(f"none of {len(records)} records has its answers in its document")

    def sample(
        self, rng: random.Random, level: float, n_questions: int, in_place: float = 0.0
    ) -> Record:
        """Draw a record of one sentence at level 0, of up to all of them at level 1.

        Half of the records have the most sentences that the level allows.  The sentences are
        consecutive and answer at least one of the (up to ``n_questions``) questions.  A share
        ``in_place`` of the records are asked about in their own words instead (`asked_in_place`),
        unless nothing can be asked so; the same question can come twice.
        """
        passage = self.passages[int(rng.random() * len(self.passages))]
        n = len(passage.sentences)
        most = max(1, round(level * n))
        size = most if rng.random() < 0.5 else rng.randint(1, most)
        _, anchor = rng.choice(passage.questions)
        start = rng.randint(max(0, anchor - size + 1), min(anchor, n - size))
        there = range(start, start + size)
        questions = [q for q, sentence in passage.questions if sentence in there]
        rng.shuffle(questions)
        if in_place and rng.random() < in_place:
            chosen = (passage.sentences[rng.choice(there)] for _ in range(n_questions))
            questions = [q for s in chosen if (q := asked_in_place(s, rng))] or questions
        return dataclasses.replace(
            passage.record,
            document=" ".join(passage.sentences[start : start + size]),
            questions=tuple(questions[:n_questions]),
        )


class Passage:
    """A record in sentences, each question with the index of its sentence."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.sentences = sentences_of(record.document)
        words = [set(_words(s)) for s in self.sentences]
        self.questions: list[tuple[Question, int]] = []
        for question in record.questions:
            asked = set(_words(question.text))
            holding = [i for i, s in enumerate(self.sentences) if question.answers[0] in s]
            if holding:
                best = max(holding, key=lambda i: len(asked & words[i]))
                self.questions.append((question, best))


def sentences_of(text: str) -> list[str]:
    """Cut a text after full stops, question and exclamation marks that a capital or digit follows.

    >>> sentences_of("Ann came at 5 p.m. Then Bob left.")
    ['Ann came at 5 p.m.', 'Then Bob left.']
    """
    return [s for s in _SENTENCE.split(text.strip()) if s]


def asked_in_place(sentence: str, rng: random.Random) -> Question | None:
    """Ask for a name, a number or a word of a sentence by putting a question word in its place.

    Of the words on either side up to `_AROUND` are kept, at least three in all where there are so
    many.  Quotes and brackets at the ends of the answer are left out.  Returns None for a sentence
    of fewer than five words, one without anything to ask for, and where the words that are kept say
    the answer.

    >>> q = asked_in_place("A castle was built by Ann Lee in 1190.", random.Random(8))
    >>> q.text, q.answers
    ('A castle was built by who or what in 1190?', ('Ann Lee',))
    """
    words = sentence.split()
    bare = [w.strip('.,;:!?()[]"') for w in words]
    named = [i for i, w in enumerate(bare) if _NAMED.fullmatch(w) and (i or w[0].isdigit())]
    plain = [i for i, w in enumerate(bare) if i and len(w) > 4 and w.isalpha()]
    pool = named if named and (rng.random() < 0.75 or not plain) else plain
    if len(words) < 5 or not pool:
        return None
    first = last = rng.choice(pool)
    while first - 1 in named and bare[first - 1] == words[first - 1] and last - first < _MORE:
        first -= 1
    while last + 1 in named and bare[last] == words[last] and last - first < _MORE:
        last += 1
    left = rng.randint(0, min(first, _AROUND))
    right = rng.randint(0, min(len(words) - last - 1, _AROUND))
    if left + right < 3:
        left, right = min(first, _AROUND), min(len(words) - last - 1, _AROUND)
    before, after = words[first - left : first], words[last + 1 : last + 1 + right]
    answer = " ".join([*words[first:last], bare[last]]).lstrip('(["')
    if not answer or answer in " ".join([*before, *after]):
        return None
    tail = words[last][len(bare[last]) :] if right and words[last].startswith(bare[last]) else ""
    asked = " ".join([*before, _question_word(answer) + tail, *after]).rstrip(".,;:!?")
    return Question(f"{asked}?", (answer,), "in_place")


def _question_word(answer: str) -> str:
    if year := re.search(r"\b(1\d{3}|20\d\d)\b", answer):
        return "what year" if year[0] == answer else "when"
    return "how many" if answer[0].isdigit() else "who or what" if answer[0].isupper() else "what"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
