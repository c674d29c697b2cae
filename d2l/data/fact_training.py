"""Training stream for facts: documents of the encyclopedia with questions about them.

Every batch is a pure function of (seed, step, level): a resumed run continues with the same data.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import random
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Literal

from ..chunking import fewest_chunks, sample_chunks, split
from ..config import ChunkConfig
from ..lm.base import chat_affixes, render_chat
from .articles import articles, asked_articles
from .encyclopedia import EncyclopediaGenerator
from .example import Example, Query
from .needle_training import end_of_turn
from .passages import Passages
from .public import load, split_titles
from .record import Question, Record

Drawn = tuple[Record, Example]
Wanted = tuple[int, tuple[int, ...], float]
"""A step, the numbers of its documents, and the level of the curriculum."""
TRAINING_SETS = ("squad", "squad/train", "wikipedia", "wikipedia/written")
"""Public sets of which a part may be trained on: SQuAD's development titles but the last 15, its
training split, which has 13 times as many paragraphs, or articles of Wikipedia, which need no hub:
asked about in their own words (`articles`), or with questions that a base wrote
(`asked_articles`)."""


@dataclasses.dataclass(frozen=True)
class FactStream:
    """What the stream holds: documents of one fact at level 0, of up to ``max_facts`` at level 1.

    A share ``full`` of them has the most facts that the level allows, the others any number.

    ``kinds`` take turns in every second document once the level is above a half; before, and in the
    other documents, questions recall single facts.  ``cut_share`` of the documents are cut into
    several chunks when ``cut_share`` is above 0 (stage 2 of the paper's training).  ``mix`` gives
    public sets (`TRAINING_SETS`) a share of the documents: weights against 1 for the encyclopedia.
    Of the latter queries are ``questions``, or ``sentences`` of the document that leave out the
    answer (see `gaps`); the documents are the same.  A share ``in_place`` of the passages of public
    sets is asked about in its own words (see `passages.asked_in_place`).
    """

    vocabulary: str = "open"
    max_facts: int = 8
    full: float = 0.5
    queries_per_doc: int = 2
    kinds: tuple[str, ...] = ("recall",)
    values: tuple[str, ...] = ("words", "phrases", "numbers", "names")
    distractors: float = 0.25
    rivals: bool = True
    words: str = "seen"
    forms: str = "train"
    cut_share: float = 0.0
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    queries: Literal["questions", "sentences"] = "questions"
    in_place: float = 0.0


def titles_for(name: str, part: Literal["train", "watch", "test"]) -> list[Record]:
    """Return the records of a public set whose titles are for training, watching it, or tests.

    SQuAD's development split and the articles are split by title, in order of appearance: the last
    10 are for tests alone, the 5 before them watch the training.  Raises what `public.load` and
    `articles` raise, ValueError for another set than `TRAINING_SETS` and for one without enough
    titles.
    """
    if name not in TRAINING_SETS:
        raise ValueError(f"{name} is not for training, only {', '.join(TRAINING_SETS)}")
    if name == "squad/train" and part == "train":
        return load("squad", "train", drop_bad=True)
    fetched = {"wikipedia": articles, "wikipedia/written": asked_articles}
    found = fetched[name]() if name in fetched else load("squad", "validation", drop_bad=True)
    rest, test = split_titles(found, 10)
    train, watch = split_titles(rest, 5)
    return {"train": train, "watch": watch, "test": test}[part]


class FactTraining:
    """Build the examples of one step for one tokenizer.

    Raises ValueError for a share or a weight out of range, and what `titles_for` raises.
    """

    def __init__(self, tokenizer: Any, stream: FactStream, chunk: ChunkConfig, seed: int) -> None:
        if not 0 <= stream.in_place <= 1:
            raise ValueError(f"in_place is a share, 0 to 1, not {stream.in_place}")
        if not 0 <= stream.full <= 1:
            raise ValueError(f"full is a share, 0 to 1, not {stream.full}")
        if low := {name: weight for name, weight in stream.mix.items() if not weight > 0}:
            raise ValueError(f"the weights of mix must be above 0, not {low}")
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
        self._passages = {name: Passages(titles_for(name, "train")) for name in stream.mix}

    def record(self, step: int, i: int, level: float = 1.0) -> Record:
        """Return document ``i`` of ``step`` at a level of the curriculum."""
        rng = random.Random(f"{self.seed}/{step}/{i}")
        s = self.stream
        if s.mix:
            known = ("", *s.mix)
            name = rng.choices(known, (1.0, *s.mix.values()))[0]
            if name:
                return self._passages[name].sample(rng, level, s.queries_per_doc, s.in_place)
        most = 1 + round(level * (s.max_facts - 1))
        n_facts = most if rng.random() < s.full else rng.randint(1, most)
        kinds = s.kinds if level > 0.5 and i % 2 else ("recall",)
        n_questions = min(s.queries_per_doc, n_facts)
        record = self._generator.sample(rng, n_facts, n_questions, kinds)
        return gaps(record, n_questions, rng) if s.queries == "sentences" else record

    def example(self, record: Record, step: int, i: int, level: float = 1.0) -> Example:
        """Return ``record``, which is document ``i`` of ``step``, as a training example."""
        rng = random.Random(f"cut/{self.seed}/{step}/{i}")
        cut = self.stream.cut_share if level >= 1.0 else 0.0
        return fact_example(
            self._tokenizer, record, self.chunk, rng if rng.random() < cut else None
        )

    def records(self, step: int, n_docs: int, level: float = 1.0) -> list[Record]:
        """Return the first ``n_docs`` documents of ``step``."""
        return [self.record(step, i, level) for i in range(n_docs)]

    def drawn(self, step: int, of: Iterable[int], level: float = 1.0) -> list[Drawn]:
        """Return the documents of ``step`` that ``of`` numbers, as records and as examples."""
        records = [(i, self.record(step, i, level)) for i in of]
        return [(record, self.example(record, step, i, level)) for i, record in records]

    def batch(self, step: int, n_docs: int, level: float = 1.0) -> list[Example]:
        """Return the first ``n_docs`` documents of ``step`` as training examples."""
        return [example for _, example in self.drawn(step, range(n_docs), level)]


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


class FactPool:
    """A stream drawn by ``n_workers`` processes, for machines that train faster than one draws.

    ``args`` are those of `FactTraining`.  The documents are the same, in the same order.  Those of
    the next step, at the same level, are drawn ahead.
    """

    def __init__(self, n_workers: int, *args: Any) -> None:
        self.n_workers = n_workers
        self._ahead: tuple[Wanted | None, list[Future[list[Drawn]]]] = None, []
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(n_workers, context, _open_stream, args)

    def drawn(self, step: int, of: Iterable[int], level: float = 1.0) -> list[Drawn]:
        """Return what `FactTraining.drawn` returns."""
        wanted = (step, tuple(of), level)
        ahead, parts = self._ahead
        if ahead != wanted:
            for part in parts:
                part.cancel()
            parts = self._submit(wanted)
        following = (step + 1, *wanted[1:])
        self._ahead = following, self._submit(following)
        return [pair for part in parts for pair in part.result()]

    def _submit(self, wanted: Wanted) -> list[Future[list[Drawn]]]:
        step, numbers, level = wanted
        size = max(1, math.ceil(len(numbers) / self.n_workers))
        parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        return [self._pool.submit(_draw, step, part, level) for part in parts]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


_streams: list[FactTraining] = []
"""The stream of a worker process."""


def _open_stream(*args: Any) -> None:
    _streams.append(FactTraining(*args))


def _draw(step: int, of: Sequence[int], level: float) -> list[Drawn]:
    return _streams[0].drawn(step, of, level)


def fact_example(
    tokenizer: Any, record: Record, chunk: ChunkConfig, rng: random.Random | None = None
) -> Example:
    """Turn a record into chunks and queries; with ``rng`` the number of chunks is drawn.

    The answer of a query is the first accepted one, with the end of the turn.
    """
    prefix, suffix = chat_affixes(tokenizer)
    ids = render_chat(tokenizer, record.document.strip())
    n = sample_chunks(len(ids), chunk, rng) if rng else fewest_chunks(len(ids), chunk)
    pieces = split(ids, n, prefix, suffix)
    end = end_of_turn(tokenizer)
    queries = tuple(
        Query(
            tuple(render_chat(tokenizer, q.text)),
            (*tokenizer(q.answers[0], add_special_tokens=False).input_ids, end),
        )
        for q in record.questions
    )
    return Example(tuple(map(tuple, pieces)), queries)
