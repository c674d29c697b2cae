"""Cut a templated document into chunks and give each the template's affixes (spec section 9)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .config import ChunkConfig

Ids = Sequence[int]

PUBLISHED_CHUNK_PROBS: Mapping[int, float] = {
    1: 0.5, 2: 0.125, 3: 0.0625, 4: 0.0625, 5: 0.0625, 6: 0.0625, 7: 0.0625, 8: 0.0625,
}  # fmt: skip
"""Probability of each chunk count in training (spec section 8)."""


def split(ids: Ids, n_chunks: int, prefix: Ids, suffix: Ids) -> list[list[int]]:
    """Cut ``ids`` (already templated) into pieces of ``ceil(len / n_chunks)`` tokens.

    The first piece gets the suffix, the last the prefix, those between both; a single piece stays
    as it is.  There may be fewer than ``n_chunks`` pieces; the last may be shorter.

    Raises ValueError for an empty document or a count below 1.
    """
    if not ids or n_chunks < 1:
        raise ValueError(f"cannot cut a document of {len(ids)} tokens into {n_chunks} chunks")
    return list(cut([ids], math.ceil(len(ids) / n_chunks), prefix, suffix))


def cut(pieces: Iterable[Ids], size: int, prefix: Ids, suffix: Ids) -> Iterator[list[int]]:
    """Cut a stream of templated ids into pieces of ``size`` tokens; affixes as in `split`.

    Holds one chunk and one piece of the stream at a time.

    >>> list(cut([[1, 2], [3, 4, 5]], 2, prefix=[8], suffix=[9]))
    [[1, 2, 9], [8, 3, 4, 9], [8, 5]]
    """
    held: list[int] = []
    before: Ids = ()
    for piece in pieces:
        held.extend(piece)
        last = (len(held) - 1) // size * size
        for start in range(0, last, size):
            yield [*before, *held[start : start + size], *suffix]
            before = prefix
        held = held[max(last, 0) :]
    if held:
        yield [*before, *held]


def fewest_chunks(n_tok: int, config: ChunkConfig) -> int:
    """Return the number of chunks used outside training, ``ceil(n_tok / max_tok)``.

    Raises ValueError for a document shorter than ``min_tok``.
    """
    if n_tok < config.min_tok:
        raise ValueError(
            f"the document has {n_tok} tokens with its chat template, a chunk needs at least "
            f"{config.min_tok}: give a longer document or lower ChunkConfig.min_tok"
        )
    return math.ceil(n_tok / config.max_tok)


def sample_chunks(
    n_tok: int,
    config: ChunkConfig,
    rng: random.Random,
    probs: Mapping[int, float] = PUBLISHED_CHUNK_PROBS,
) -> int:
    """Draw a chunk count for training from ``probs``, restricted to legal chunk lengths.

    Legal is ``ceil(n_tok / max_tok) <= n <= ceil(n_tok / min_tok)``.  A document too long for every
    count in ``probs`` gets the fewest legal chunks (the published code fails there, spec T15).

    Raises ValueError for a document shorter than ``min_tok``.
    """
    low, high = fewest_chunks(n_tok, config), math.ceil(n_tok / config.min_tok)
    legal = [n for n in probs if low <= n <= high]
    return rng.choices(legal, [probs[n] for n in legal])[0] if legal else low


def unique(chunks: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """List the distinct chunks and, for every chunk, the position of its representative.

    Equal chunks give equal adapters, so each needs encoding once only.
    """
    position: dict[tuple[int, ...], int] = {}
    where = [position.setdefault(tuple(chunk), len(position)) for chunk in chunks]
    return [list(chunk) for chunk in position], where


def group_by_length(lengths: Sequence[int], budget_tok: int) -> list[list[int]]:
    """Group chunk positions, longest first; a padded group holds at most ``budget_tok`` tokens.

    A chunk longer than the budget forms a group of its own.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget_tok:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
