"""Generated LoRA factors: of chunks, of documents, and their application to a batch.

A document's adapter is its chunks' factors laid one after another along the rank, then the learned
bias once (spec section 4).  Several documents lie along the same rank axis with `Segments` between
them, so no document is padded to another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from d2l_kernels import Segments, segmented_lora
from jaxtyping import Float
from torch import Tensor

from .ridge import apart_by_document

Factors = dict[str, Tensor]
Delta = Callable[[int, str, Tensor], Tensor | None]


@dataclass(frozen=True)
class ChunkLora:
    """Factors of chunks before merging, per module, of shape (chunk, layer, r, d)."""

    A: Factors
    B: Factors

    @property
    def n_chunks(self) -> int:
        """Number of chunks held."""
        return next(iter(self.A.values())).shape[0]

    @staticmethod
    def pick(parts: Sequence[ChunkLora], where: Sequence[tuple[int, int]]) -> ChunkLora:
        """Join chunks of several parts: chunk k of part g for every ``(g, k)``, in one copy."""

        def gather(factors: Sequence[Factors]) -> Factors:
            rows = {m: [f[m].unbind() for f in factors] for m in factors[0]}
            return {m: torch.stack([of[g][k] for g, k in where]) for m, of in rows.items()}

        return ChunkLora(gather([p.A for p in parts]), gather([p.B for p in parts]))

    def take(self, index: Tensor) -> ChunkLora:
        """Select chunks by position."""
        return self.map(lambda t: t[index])

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChunkLora:
        """Apply ``fn`` to every factor."""
        return ChunkLora(
            {m: fn(t) for m, t in self.A.items()}, {m: fn(t) for m, t in self.B.items()}
        )


@dataclass(frozen=True)
class LoraBatch:
    """Adapters of documents, per module ``A (layer, rank, d_in)`` and ``B (layer, rank, d_out)``.

    ``rank`` holds each document's share of the rank axis; ``layers`` the base's layer index of each
    slice; ``multiplier`` the raw factor on delta W.
    """

    A: Factors
    B: Factors
    rank: Segments
    layers: tuple[int, ...]
    multiplier: float
    dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.rank)

    def __getitem__(self, doc: int) -> LoraBatch:
        """Return one document's adapter (views, no copy)."""
        rows = slice(*self.rank.offsets[doc : doc + 2]) if doc >= 0 else slice(0, 0)
        if not 0 <= doc < len(self):
            raise IndexError(f"document {doc} of {len(self)}")
        return dataclasses.replace(
            self,
            A={m: t[:, rows] for m, t in self.A.items()},
            B={m: t[:, rows] for m, t in self.B.items()},
            rank=Segments((self.rank.lengths[doc],)),
        )

    @staticmethod
    def cat(parts: Sequence[LoraBatch]) -> LoraBatch:
        """Put several batches of documents side by side; one batch alone is not copied.

        Raises ValueError when they were made for different layers, modules or multipliers.
        """
        first, *others = parts
        for part in others:
            if (part.layers, part.A.keys(), part.multiplier) != (
                first.layers, first.A.keys(), first.multiplier,
            ):  # fmt: skip
                raise ValueError("adapters of different hypernetworks cannot share a batch")
        if not others:
            return first
        return dataclasses.replace(
            first,
            A={m: torch.cat([p.A[m] for p in parts], 1) for m in first.A},
            B={m: torch.cat([p.B[m] for p in parts], 1) for m in first.B},
            rank=Segments(tuple(n for p in parts for n in p.rank.lengths)),
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> LoraBatch:
        """Apply ``fn`` to every factor, e.g. ``lambda t: t.detach().bfloat16()``."""
        return dataclasses.replace(
            self,
            A={m: fn(t) for m, t in self.A.items()},
            B={m: fn(t) for m, t in self.B.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.nbytes for t in (*self.A.values(), *self.B.values()))

    def delta_W(self, doc: int, layer: int, module: str) -> Float[Tensor, "d_out d_in"]:
        """Return ``multiplier * B^T A``, what the adapter adds to that linear's weight."""
        one, row = self[doc], self.layers.index(layer)
        return self.multiplier * one.B[module][row].mT @ one.A[module][row]


def compose(
    chunks: ChunkLora,
    n_chunks: Sequence[int],
    *,
    layers: tuple[int, ...],
    multiplier: float,
    bias: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    weights: Float[Tensor, " chunk"] | None = None,
    dropout: float = 0.0,
    penalties: Mapping[str, Float[Tensor, " layer"]] | None = None,
) -> LoraBatch:
    """Concatenate each document's chunks along the rank, in order, and append the bias once.

    ``delta W = multiplier * (sum_c w_c B_c^T A_c + bias_B^T bias_A)``; ``weights`` scales B, so it
    is linear in delta W (a chunk that occurs w times has weight w).  With ``penalties``, of each
    layer for each module, all rows of a document are set apart first (`d2l.ridge`); weights must
    not be negative then.

    Raises ValueError when ``n_chunks`` does not add up or a document has no chunk.
    """
    if sum(n_chunks) != chunks.n_chunks or min(n_chunks, default=0) < 1:
        raise ValueError(
            f"n_chunks {tuple(n_chunks)} must be >= 1 each and add up to {chunks.n_chunks}"
        )
    if penalties:
        w = torch.ones(chunks.n_chunks) if weights is None else weights
        if weights is not None:
            chunks, weights = chunks.map(lambda t: t * w.sqrt().to(t)[:, None, None, None]), None
        A = {m: apart_by_document(t, penalties[m], n_chunks, w) for m, t in chunks.A.items()}
        chunks = ChunkLora(A, chunks.B)

    def join(factors: Factors, extra: Mapping[str, Tensor] | None, w: Tensor | None) -> Factors:
        out = {}
        for m, t in factors.items():
            t = t if w is None else t * w.to(t)[:, None, None, None]
            out[m] = t.transpose(0, 1).flatten(1, 2)
            if extra is not None:
                pieces = out[m].split([n * t.shape[2] for n in n_chunks], 1)
                out[m] = torch.cat([p for piece in pieces for p in (piece, extra[m].to(t))], 1)
        return out

    r = next(iter(chunks.A.values())).shape[2]
    appended = 0 if bias is None else next(iter(bias[0].values())).shape[1]
    return LoraBatch(
        A=join(chunks.A, bias and bias[0], None),
        B=join(chunks.B, bias and bias[1], weights),
        rank=Segments.of(n * r + appended for n in n_chunks),
        layers=layers,
        multiplier=multiplier,
        dropout=dropout,
    )


def route_rows(loras: LoraBatch, doc_of_row: Sequence[int], *, training: bool = False) -> Delta:
    """Build the LoRA update for a padded batch in which row i asks document ``doc_of_row[i]``.

    -1 means no adapter for that row.  Rows may come in any order; a batch that HF ``generate``
    has expanded (beams, several samples a prompt) repeats each row's document.

    Raises ValueError for a document that is not there, or later for a batch of another size.
    """
    bad = [d for d in doc_of_row if not -1 <= d < len(loras)]
    if bad:
        raise ValueError(f"document {bad[0]} is not among the {len(loras)} adapters")
    order = sorted(range(len(doc_of_row)), key=lambda i: doc_of_row[i])
    counted = Counter(doc_of_row)
    counts = [counted[d] for d in range(-1, len(loras))]
    in_order = order == list(range(len(order)))
    with_none = counts[0] > 0
    rank = Segments((0, *loras.rank.lengths)) if with_none else loras.rank
    rows_per_doc = counts if with_none else counts[1:]
    tok_of = functools.cache(lambda n_tok: Segments.of(n * n_tok for n in rows_per_doc))

    def delta(layer: int, module: str, x: Tensor) -> Tensor | None:
        if module not in loras.A or layer not in loras.layers:
            return None
        if x.ndim == 2 and not len(x) % len(doc_of_row):  # a shared expert flattens the batch
            y = delta(layer, module, x.unflatten(0, (len(doc_of_row), -1)))
            return None if y is None else y.flatten(0, 1)
        copies, rest = divmod(x.shape[0], len(doc_of_row))
        if rest or not copies or x.ndim != 3:
            raise ValueError(
                f"batch of shape {tuple(x.shape)} does not fit {len(doc_of_row)} routed rows"
            )
        tok = tok_of(copies * x.shape[1])
        if in_order:
            return _apply(loras, layer, module, x.flatten(0, 1), tok, rank, training).view(
                *x.shape[:2], -1
            )
        index = torch.tensor(order, device=x.device)
        if copies > 1:
            index = (index[:, None] * copies + torch.arange(copies, device=x.device)).flatten()
        y = _apply(loras, layer, module, x[index].flatten(0, 1), tok, rank, training)
        return (
            torch.empty_like(y)
            .view(*x.shape[:2], -1)
            .index_copy(0, index, y.view(*x.shape[:2], -1))
        )

    return delta


def route_packed(loras: LoraBatch, tok_per_doc: Sequence[int], *, training: bool = False) -> Delta:
    """Build the LoRA update for one packed row whose tokens lie document after document."""
    tok = Segments.of(tok_per_doc)

    def delta(layer: int, module: str, x: Tensor) -> Tensor | None:
        if module not in loras.A or layer not in loras.layers:
            return None
        y = _apply(loras, layer, module, x.flatten(0, -2), tok, loras.rank, training)
        return y.unflatten(0, x.shape[:-1])

    return delta


def _apply(
    loras: LoraBatch,
    layer: int,
    module: str,
    x: Tensor,
    tok: Segments,
    rank: Segments,
    training: bool,
) -> Tensor:
    row = loras.layers.index(layer)
    A, B = loras.A[module][row], loras.B[module][row]
    if loras.dropout and training:
        x = F.dropout(x, loras.dropout)
    return segmented_lora(x, A[:, : x.shape[-1]], B, tok, rank, loras.multiplier)
