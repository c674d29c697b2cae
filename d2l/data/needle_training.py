"""Training stream for the needle task: short documents, cut documents, and long compositions.

Every batch is a pure function of (seed, step), so a resumed run continues with the same data.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from ..chunking import PUBLISHED_CHUNK_PROBS, sample_chunks, split
from ..config import ChunkConfig
from ..lm.base import chat_affixes, render_chat
from .example import Example, Query
from .needle import NeedleGenerator, NeedleSample

_SHORTEST, _HALF_BIN, _BARE_UNTIL, _COMPOSE_FROM = 48, 24, 0.25, 0.5


@dataclasses.dataclass(frozen=True)
class NeedleStream:
    """What the training stream holds; shares are probabilities per document.

    ``max_tok`` bounds a whole training document; the curriculum reaches it from the bare needle,
    and brings other haystacks and needles in on the way.  Cutting and compositions come in its
    second half, when the number of filler chunks grows from one to ``max_chunks``.
    A composition is one chunk with the needle and chunks of filler alone, drawn from a pool of
    ``pool`` chunks that the batch shares, each with a multiplicity, up to ``max_chunks`` in all.
    """

    max_tok: int = 256
    cut_share: float = 0.5
    compose_share: float = 0.0
    pool: int = 12
    max_chunks: int = 8
    prose_share: float = 0.0
    word_share: float = 0.0


class NeedleTraining:
    """Build the examples of one step for one tokenizer (paper section 4.1, with compositions of
    filler chunks added: spec section 9 cuts, this stream also repeats).
    """

    def __init__(self, tokenizer: Any, stream: NeedleStream, chunk: ChunkConfig, seed: int) -> None:
        self.stream, self.chunk, self.seed = stream, chunk, seed
        self._tokenizer = tokenizer
        self._affixes = chat_affixes(tokenizer)
        self._end = end_of_turn(tokenizer)
        self._generators = {
            (filler, needle): NeedleGenerator(tokenizer, filler=filler, needle=needle)
            for filler in ("repeat", "prose")
            for needle in ("digits", "word")
        }
        self._prompts = {
            n: render_chat(tokenizer, self._generators["repeat", n].question)
            for n in ("digits", "word")
        }
        self._frame = sum(map(len, self._affixes))

    def batch(self, step: int, n_docs: int, level: float = 1.0) -> list[Example]:
        """Return the ``n_docs`` examples of ``step`` at a level of the curriculum, in order."""
        composing = level >= _COMPOSE_FROM
        pool = self._pool(random.Random(f"pool/{self.seed}/{step}")) if composing else []
        return [
            self._example(random.Random(f"train/{self.seed}/{step}/{i}"), level, pool)
            for i in range(n_docs)
        ]

    def _example(self, rng: random.Random, level: float, pool: list[tuple[int, ...]]) -> Example:
        s = self.stream
        mixed = rng.random() < level**2
        filler = "prose" if mixed and rng.random() < s.prose_share else "repeat"
        needle = "word" if mixed and rng.random() < s.word_share else "digits"
        compose = bool(pool) and rng.random() < s.compose_share
        longest = (self.chunk.max_tok if compose else s.max_tok) - self._frame
        limit = _SHORTEST + level * (longest - _SHORTEST)
        middle = int(rng.uniform(_SHORTEST, max(_SHORTEST, limit - _HALF_BIN)))
        bin_ = max(1, middle - _HALF_BIN), middle + _HALF_BIN
        generator = self._generators[filler, needle]
        bare = rng.random() < 1.0 - level / _BARE_UNTIL
        sample = generator.bare(rng) if bare else generator.sample(rng, *bin_)
        if compose:
            chunks, weights = self._compose(rng, sample, pool, level)
        else:
            chunks, weights = self._cut(rng, sample, level), None
        query = Query(tuple(self._prompts[needle]), tuple(self._answer(sample.answer)))
        return Example(tuple(map(tuple, chunks)), (query,), weights)

    def _answer(self, answer: str) -> list[int]:
        return [*self._tokenizer(answer, add_special_tokens=False).input_ids, self._end]

    def _cut(self, rng: random.Random, sample: NeedleSample, level: float) -> list[list[int]]:
        prefix, suffix = self._affixes
        ids = [*prefix, *sample.document_ids, *suffix]
        if rng.random() >= self.stream.cut_share * _second_half(level):
            return split(ids, 1, prefix, suffix)
        probs = {n: p for n, p in PUBLISHED_CHUNK_PROBS.items() if n > 1}
        return split(ids, sample_chunks(len(ids), self.chunk, rng, probs), prefix, suffix)

    def _compose(
        self, rng: random.Random, sample: NeedleSample, pool: list[tuple[int, ...]], level: float
    ) -> tuple[list[list[int]], tuple[float, ...]]:
        """Put the sample as one chunk among repeated filler chunks of the pool."""
        prefix, suffix = self._affixes
        most = math.log(self.stream.max_chunks) * _second_half(level)
        total = math.exp(rng.uniform(0.0, most))
        chosen = rng.sample(pool, min(len(pool), rng.randint(1, 4), max(1, round(total))))
        share = [rng.random() + 0.05 for _ in chosen]
        counts = [max(1.0, round(total * x / sum(share))) for x in share]
        head, tail = rng.random() < 0.9, rng.random() < 0.9
        own = [*(prefix if head else ()), *sample.document_ids, *(suffix if tail else ())]
        return [own, *map(list, chosen)], (1.0, *counts)

    def _pool(self, rng: random.Random) -> list[tuple[int, ...]]:
        """Cut windows out of filler: documents whose needle has been taken out."""
        prefix, suffix = self._affixes
        pool = []
        for _ in range(self.stream.pool if self.stream.compose_share else 0):
            filler = "prose" if rng.random() < self.stream.prose_share else "repeat"
            longest = self.chunk.max_tok - self._frame
            ids = self._generators[filler, "digits"].filler_ids(rng, 2 * longest)
            size = rng.randint(min(48, longest), longest)
            start = rng.randint(0, len(ids) - size)
            pool.append((*prefix, *ids[start : start + size], *suffix))
        return pool


def _second_half(level: float) -> float:
    """Return how far a level is through the second half of the curriculum, 0 to 1."""
    return max(0.0, (level - _COMPOSE_FROM) / (1.0 - _COMPOSE_FROM))


def end_of_turn(tokenizer: Any) -> int:
    """Return the id that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end an answer with")
    return int(tokenizer.eos_token_id)
