"""Cut a templated document into chunks and give each the template's affixes (spec section 9)."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from .config import ChunkConfig

Ids = Sequence[int]
Ends = Callable[[Ids, int], bool]
_CLOSES = re.compile(r"[.!?][\"')\]\u201d]*$")
_OPENS = re.compile(r"\s+($|[^\sa-z(\[,;-])")  # a letter beyond ASCII may be half a token

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


def cut(
    pieces: Iterable[Ids], size: int, prefix: Ids, suffix: Ids, ends: Ends | None = None
) -> Iterator[list[int]]:
    """Cut a stream of templated ids into pieces of ``size`` tokens; affixes as in `split`.

    With ``ends`` a piece ends sooner where ``ends(piece, next id)`` says so.  Holds one chunk and
    one piece of the stream at a time.

    >>> list(cut([[1, 2], [3, 4, 5]], 2, prefix=[8], suffix=[9]))
    [[1, 2, 9], [8, 3, 4, 9], [8, 5]]
    """
    held: list[int] = []
    before: Ids = ()
    for i in chain.from_iterable(pieces):
        if held and (len(held) == size or (ends and ends(held, i))):
            yield [*before, *held, *suffix]
            held, before = [], prefix
        held.append(i)
    if held:
        yield [*before, *held]


@functools.lru_cache(8)
def ends_of(tokenizer: Any, least: int) -> Ends:
    """Return what tells that a piece of ``least`` tokens or more ends with a sentence.

    That is, after a full stop, question or exclamation mark that white space follows and then no
    small letter, and before a new line.  It is seen where tokens spell it (byte-level and others).
    """

    @functools.cache
    def text(i: int) -> str:
        token = tokenizer.convert_ids_to_tokens(i)
        return tokenizer.decode([i]) if token[:1] not in "ĠĊ▁" else f" {tokenizer.decode([i])}"

    return lambda piece, i: (
        len(piece) >= least
        and bool(_OPENS.match(text(i)))
        and bool(_CLOSES.search("".join(map(text, piece[-3:]))))
    )


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
