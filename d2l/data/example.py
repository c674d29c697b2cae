"""What training consumes: documents as chunks, with the questions asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..chunking import unique


@dataclass(frozen=True)
class Query:
    """One question: prompt and answer token ids, and the teacher's top-k when it is distilled.

    ``teacher_logprob`` and ``teacher_idx`` hold one row of k values for every answer token.
    Raises ValueError for an empty prompt or answer, or a teacher of another length.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    teacher_logprob: tuple[tuple[float, ...], ...] | None = None
    teacher_idx: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError("a query needs at least one prompt token and one answer token")
        for rows in (self.teacher_logprob, self.teacher_idx):
            if rows is not None and len(rows) != len(self.answer):
                raise ValueError(
                    f"the teacher gave {len(rows)} rows for an answer of {len(self.answer)} tokens"
                )


@dataclass(frozen=True)
class Example:
    """A document as chunks.  ``weights[i]`` counts how often chunk i occurs in the document."""

    chunks: tuple[tuple[int, ...], ...]
    queries: tuple[Query, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Examples with the distinct chunks of all of them listed once.

    ``chunk_of[i]`` is the distinct chunk behind chunk i, counted over all documents in order.
    """

    distinct: list[list[int]]
    chunk_of: list[int]
    weights: list[float]
    n_chunks: list[int]
    queries: list[Query]
    queries_per_doc: list[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Collate; equal chunks, within a document or across documents, are encoded once."""
        chunks = [c for e in examples for c in e.chunks]
        distinct, chunk_of = unique(chunks)
        return cls(
            distinct=[list(c) for c in distinct],
            chunk_of=chunk_of,
            weights=[w for e in examples for w in (e.weights or (1.0,) * len(e.chunks))],
            n_chunks=[len(e.chunks) for e in examples],
            queries=[q for e in examples for q in e.queries],
            queries_per_doc=[len(e.queries) for e in examples],
        )

    def read(self, n_read: Sequence[int]) -> Batch:
        """Return what it is when distinct chunk i counts as ``n_read[i]`` chunks, one by one.

        >>> batch = Batch([[1, 2], [3]], [1, 0], [1.0, 2.0], [2], [], [0])
        >>> split = batch.read([2, 1])
        >>> split.chunk_of, split.weights, split.n_chunks
        ([2, 0, 1], [1.0, 2.0, 2.0], [3])
        """
        starts = [0, *accumulate(n_read)]
        counts = [n_read[i] for i in self.chunk_of]
        ends = list(accumulate(self.n_chunks))
        return replace(
            self,
            chunk_of=[j for i in self.chunk_of for j in range(starts[i], starts[i + 1])],
            weights=[w for w, n in zip(self.weights, counts, strict=True) for _ in range(n)],
            n_chunks=[sum(counts[e - n : e]) for e, n in zip(ends, self.n_chunks, strict=True)],
        )
