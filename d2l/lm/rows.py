"""Rows of token ids for a decoder: one for each chunk, or one for several that begin alike.

In a shared row what chunks begin with stands once; each token has the position that it has in its
chunk and sees only its chunk, so its state is what it would be in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from d2l_kernels import Segments
from torch import Tensor, nn

Ids = Sequence[int]


def alike(chunks: Sequence[Ids], most_tok: int, most_read: int) -> list[tuple[int, int, list[int]]]:
    """Bring chunks that begin alike together: tokens of a row by `weave`, and of its chunks, which.

    A chunk joins the one before it, in the order of their tokens, where it adds less than half of
    itself, and the row has at most ``most_tok`` tokens with it and its chunks ``most_read``.

    >>> alike([[1, 2, 3, 4], [7, 8], [1, 2, 3, 5]], 8, 16)
    [(5, 8, [0, 2]), (2, 2, [1])]
    """
    found: list[tuple[int, int, list[int]]] = []
    for i in sorted(range(len(chunks)), key=lambda i: tuple(chunks[i])):
        own = len(chunks[i])
        n_tok, n_read, members = found[-1] if found else (0, 0, [])
        new = own - (n_shared(chunks[members[-1]], chunks[i]) if members else 0)
        if 2 * new < own and n_tok + new <= most_tok and n_read + own <= most_read:
            found[-1] = n_tok + new, n_read + own, [*members, i]
        else:
            found.append((own, own, [i]))
    return found


def weave(chunks: Sequence[Ids]) -> tuple[list[int], list[list[int]]]:
    """Write chunks into one row, each without what it shares with the beginning of the one before.

    Returns the row and, for every chunk, the places of its tokens there.

    >>> weave([[1, 2, 3], [1, 2, 4, 5]])
    ([1, 2, 3, 4, 5], [[0, 1, 2], [0, 1, 3, 4]])
    """
    row: list[int] = []
    places: list[list[int]] = []
    before: Ids = ()
    for chunk in chunks:
        n = n_shared(before, chunk)
        own = range(len(row), len(row) + len(chunk) - n)
        places.append([*(places[-1][:n] if n else ()), *own])
        row, before = [*row, *chunk[n:]], chunk
    return row, places


def n_shared(a: Ids, b: Ids) -> int:
    """Count the tokens with which both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def row_each(
    chunks: Sequence[Tensor], segments: Segments
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return inputs with a row for each chunk, and where the tokens lie in them (None: all)."""
    inputs = {"input_ids": nn.utils.rnn.pad_sequence(list(chunks), batch_first=True)}
    if segments.equal_length is not None:
        return inputs, None
    width = max(segments.lengths)
    mask = torch.arange(width) < torch.tensor(segments.lengths)[:, None]
    return inputs | {"attention_mask": mask.long()}, mask.flatten().nonzero()[:, 0]


def row_together(
    chunks: Sequence[Tensor], per_row: Sequence[int], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs with woven rows, whose tokens see their own chunk, and where chunks lie."""
    parts = torch.tensor(per_row).cumsum(0).tolist()
    listed = [c.tolist() for c in chunks]
    woven = [weave(listed[b - n : b]) for n, b in zip(per_row, parts, strict=True)]
    rows = [torch.tensor(row) for row, _ in woven]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions, keep = torch.zeros_like(ids), []
    seen = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1)
    for i, (_, places) in enumerate(woven):
        for place in map(torch.tensor, places):
            n = len(place)
            positions[i, place] = torch.arange(n)
            seen[i, place[:, None], place] = torch.ones(n, n, dtype=torch.bool).tril()
            keep.append(place + i * ids.shape[1])
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    return inputs, torch.cat(keep)
