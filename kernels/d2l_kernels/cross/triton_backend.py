"""Attention over ragged segments in four Triton kernels; `latent_attention` uses them as well.

A program owns a block of rows and a piece of one segment's tokens (forward, dq), or a tile of tokens
(dk, dv).  What several pieces of a segment found is combined in their order, so nothing is atomic
and two runs agree bit for bit.  With ``NORM`` there is one tensor x: keys and values are both
``x / rms(x)``, formed in the tile.  Sums, softmax and statistics are in ``ACC``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
SHORTEST_PIECE = 256


@triton.jit
def _load(at, first, n, STRIDE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Load rows ``first ... first + SIZE`` of n as a tile, zeros beyond n rows and D columns."""
    row, col = first + tl.arange(0, SIZE)[:, None], tl.arange(0, C)[None, :]
    return tl.load(at + row * STRIDE + col, mask=(row < n) & (col < D), other=0.0)


@triton.jit
def _store(
    at, tile, first, n, STRIDE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr
):
    row, col = first + tl.arange(0, SIZE)[:, None], tl.arange(0, C)[None, :]
    tile = tile.to(at.dtype.element_ty)
    tl.store(at + row * STRIDE + col, tile, mask=(row < n) & (col < D))


@triton.jit
def _rms(x, eps, D: tl.constexpr, ACC: tl.constexpr):
    x = x.to(ACC)
    return tl.sqrt(tl.sum(x * x, 1) / D + eps)


@triton.jit
def _dot(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, out_dtype=ACC, input_precision="ieee")


@triton.jit
def _attend(
    q, k, v, out, lse, items, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Attend from M rows to one piece of a segment: the softmax is kept up from tile to tile."""
    item, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    seg = tl.load(items + 3 * item)
    start = tl.load(items + 3 * item + 1)
    n = tl.load(items + 3 * item + 2).to(tl.int32)
    q_tile = _load(q + (seg * HEADS + head) * rows * D, block, rows, D, D, M, C)
    k += (start * HEADS + head) * D
    v += (start * HEADS + head) * D
    top = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    acc = tl.zeros([M, C], ACC)
    for first in range(0, n, N):
        k_tile = _load(k, first, n, HEADS * D, D, N, C)
        scores = _dot(q_tile, tl.trans(k_tile), ACC) * scale
        if NORM:
            rms = _rms(k_tile, eps, D, ACC)[None, :]
            scores = scores * (1 / rms) - tl.log(rms)
            v_tile = k_tile
        else:
            v_tile = _load(v, first, n, HEADS * D, D, N, C)
        scores = tl.where((first + tl.arange(0, N) < n)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p * rms if NORM else p, 1)
        acc = acc * shrink[:, None] + _dot(p.to(v_tile.dtype), v_tile, ACC)
        top = higher
    at = (item.to(tl.int64) * HEADS + head) * rows
    _store(out + at * D, acc / total[:, None], block, rows, D, D, M, C)
    row = block + tl.arange(0, M)
    tl.store(lse + at + row, top + tl.log(total), mask=row < rows)


@triton.jit
def _combine(
    piece, piece_lse, out, lse, first_item, rows,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up what the pieces of a segment found, weighted by their share of the softmax or not."""
    seg, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    row = block + tl.arange(0, M)
    top = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    acc = tl.zeros([M, C], ACC)
    for item in range(tl.load(first_item + seg), tl.load(first_item + seg + 1)):
        at = (item * HEADS + head) * rows
        tile = _load(piece + at * D, block, rows, D, D, M, C)
        if SOFTMAX:
            found = tl.load(piece_lse + at + row, mask=row < rows, other=0.0)
            higher = tl.maximum(top, found)
            shrink, weight = tl.exp(top - higher), tl.exp(found - higher)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + tile * weight[:, None]
            top = higher
        else:
            acc += tile
    at = (seg.to(tl.int64) * HEADS + head) * rows
    if SOFTMAX:
        total = tl.where(total > 0, total, 1)
        acc /= total[:, None]
        tl.store(lse + at + row, top + tl.log(total), mask=row < rows)
    _store(out + at * D, acc, block, rows, D, D, M, C)


@triton.jit
def _probabilities(scores, lse):
    """Bound by 1, which rounding of huge scores and their log-sum-exp would break."""
    return tl.exp(tl.minimum(scores - lse, 0))


@triton.jit
def _gradient_q(
    q, k, v, d_out, lse, dot, dq, items, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of M rows that comes from one piece of a segment."""
    item, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    seg = tl.load(items + 3 * item)
    start = tl.load(items + 3 * item + 1)
    n = tl.load(items + 3 * item + 2).to(tl.int32)
    at = (seg * HEADS + head) * rows
    row = block + tl.arange(0, M)
    q_tile = _load(q + at * D, block, rows, D, D, M, C)
    do_tile = _load(d_out + at * D, block, rows, D, D, M, C)
    lse_tile = tl.load(lse + at + row, mask=row < rows, other=0.0)[:, None]
    dot_tile = tl.load(dot + at + row, mask=row < rows, other=0.0)[:, None]
    k += (start * HEADS + head) * D
    v += (start * HEADS + head) * D
    acc = tl.zeros([M, C], ACC)
    for first in range(0, n, N):
        k_tile = _load(k, first, n, HEADS * D, D, N, C)
        v_tile = k_tile if NORM else _load(v, first, n, HEADS * D, D, N, C)
        scores = _dot(q_tile, tl.trans(k_tile), ACC) * scale
        dp = _dot(do_tile, tl.trans(v_tile), ACC)
        if NORM:
            rho = 1 / _rms(k_tile, eps, D, ACC)[None, :]
            ds = _probabilities(scores * rho, lse_tile) * (dp * rho - dot_tile) * (rho * scale)
        else:
            ds = _probabilities(scores, lse_tile) * (dp - dot_tile) * scale
        acc += _dot(ds.to(k_tile.dtype), k_tile, ACC)
    _store(dq + (item.to(tl.int64) * HEADS + head) * rows * D, acc, block, rows, D, D, M, C)


@triton.jit
def _gradient_kv(
    q, k, v, d_out, lse, dot, dk, dv, items, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of N tokens; with ``NORM`` dk receives that of x and dv is unused."""
    item, head = tl.program_id(0), tl.program_id(1)
    seg = tl.load(items + 3 * item)
    start = (tl.load(items + 3 * item + 1) * HEADS + head) * D
    n = tl.load(items + 3 * item + 2).to(tl.int32)
    at = (seg * HEADS + head) * rows
    k_tile = _load(k + start, 0, n, HEADS * D, D, N, C)
    v_tile = k_tile if NORM else _load(v + start, 0, n, HEADS * D, D, N, C)
    if NORM:
        rho = 1 / _rms(k_tile, eps, D, ACC)
        along = tl.zeros([N], ACC)
    k_acc = tl.zeros([N, C], ACC)
    v_acc = tl.zeros([N, C], ACC)
    for block in range(0, rows, M):
        row = block + tl.arange(0, M)
        q_tile = _load(q + at * D, block, rows, D, D, M, C)
        do_tile = _load(d_out + at * D, block, rows, D, D, M, C)
        lse_tile = tl.load(lse + at + row, mask=row < rows, other=0.0)[:, None]
        dot_tile = tl.load(dot + at + row, mask=row < rows, other=0.0)[:, None]
        scores = _dot(q_tile, tl.trans(k_tile), ACC)
        dp = _dot(do_tile, tl.trans(v_tile), ACC)
        if NORM:
            scores *= rho[None, :]
            dp *= rho[None, :]
        p = _probabilities(scores * scale, lse_tile)
        ds = p * (dp - dot_tile) * scale
        k_acc += _dot(tl.trans(ds.to(q_tile.dtype)), q_tile, ACC)
        if NORM:
            k_acc += _dot(tl.trans(p.to(do_tile.dtype)), do_tile, ACC)
            along += tl.sum(ds * scores + p * dp, 0)
        else:
            v_acc += _dot(tl.trans(p.to(do_tile.dtype)), do_tile, ACC)
    if NORM:
        k_tile = _load(k + start, 0, n, HEADS * D, D, N, C)
        k_acc = k_acc * rho[:, None] - k_tile.to(ACC) * (rho * rho * along / D)[:, None]
    else:
        _store(dv + start, v_acc, 0, n, HEADS * D, D, N, C)
    _store(dk + start, k_acc, 0, n, HEADS * D, D, N, C)


@dataclass(frozen=True)
class Tiles:
    """How a kernel is launched: rows and tokens of a tile, warps, loads in flight."""

    rows: int
    toks: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Name everything as a kernel's launch takes it."""
        return {"M": self.rows, "N": self.toks, "num_warps": self.warps, "num_stages": self.stages}


TILES = {
    2: {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        128: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        256: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        512: (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
    },
    4: {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        128: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        256: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
        512: (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
    },
}


def why_not(*args: object) -> str | None:
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `torch_backend.forward` does; with ``eps``, of ``k / rms(k)`` instead of k and v."""
    tiles, fixed = _tiles(q)[0], _fixed(q, eps)
    table, first_item, whole = _pieces(tuple(lengths), _piece_size(q, lengths, tiles), q.device)
    out, lse = torch.empty_like(q), _sums(q, *q.shape[:-1])
    found, found_lse = out, lse
    if not whole:
        found, found_lse = (_sums(q, len(table), *t.shape[1:]) for t in (out, lse))
    _attend[_grid(q, table, tiles)](
        q, k.contiguous(), v.contiguous(), found, found_lse, table, q.shape[2], scale, eps or 0.0,
        **fixed, **tiles.options,
    )  # fmt: skip
    if not whole:
        _add_up(found, found_lse, out, lse, first_item, softmax=True)
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; with ``eps`` k receives that of both, v's is empty."""
    _, tiles, tiles_kv = _tiles(q)
    fixed = _fixed(q, eps)
    k, v = k.contiguous(), v.contiguous()
    dot = (d_out.to(lse.dtype) * out).sum(-1)
    given = (q, k, v, d_out, lse, dot)
    numbers = (q.shape[2], scale, eps or 0.0)
    table, first_item, whole = _pieces(tuple(lengths), _piece_size(q, lengths, tiles), q.device)
    dq = torch.empty_like(q)
    found = dq if whole else _sums(q, len(table), *q.shape[1:])
    _gradient_q[_grid(q, table, tiles)](*given, found, table, *numbers, **fixed, **tiles.options)
    if not whole:
        _add_up(found, lse, dq, lse, first_item, softmax=False)
    dk, dv = torch.empty_like(k), torch.empty_like(v if eps is None else v[:0])
    table, _, _ = _pieces(tuple(lengths), tiles_kv.toks, q.device)
    _gradient_kv[(len(table), q.shape[1])](
        *given, dk, dv, table, *numbers, **fixed, **tiles_kv.options
    )
    return dq, dk, dv


def _add_up(
    found: Tensor, found_lse: Tensor, out: Tensor, lse: Tensor, first_item: Tensor, *, softmax: bool
) -> None:
    n_seg, heads, rows, _ = out.shape
    fixed = _fixed(out, None)
    del fixed["NORM"]
    _combine[(n_seg, heads, triton.cdiv(rows, 16))](
        found, found_lse, out, lse, first_item, rows, **fixed, M=16, SOFTMAX=softmax
    )


def _tiles(q: Tensor) -> tuple[Tiles, Tiles, Tiles]:
    widths = TILES[min(q.element_size(), 4)]
    return next(tiles for width, tiles in widths.items() if q.shape[3] <= width)


def _fixed(q: Tensor, eps: float | None) -> dict[str, object]:
    d = q.shape[3]
    return {
        "HEADS": q.shape[1],
        "D": d,
        "C": max(16, triton.next_power_of_2(d)),
        "NORM": eps is not None,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def _sums(q: Tensor, *shape: int) -> Tensor:
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _grid(q: Tensor, table: Tensor, tiles: Tiles) -> tuple[int, int, int]:
    return len(table), q.shape[1], triton.cdiv(q.shape[2], tiles.rows)


def _piece_size(q: Tensor, lengths: Sequence[int], tiles: Tiles) -> int:
    """Cut so that about ``PROGRAMS`` programs share the tokens, a multiple of a tile each."""
    share = sum(lengths) * q.shape[1] * triton.cdiv(q.shape[2], tiles.rows) // PROGRAMS
    return max(SHORTEST_PIECE, triton.cdiv(share, tiles.toks) * tiles.toks)


@lru_cache(maxsize=256)
def _pieces(
    lengths: tuple[int, ...], size: int, device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """Cut segments into pieces of at most ``size`` tokens: (segment, first token, tokens) of each.

    Also returns the first piece of each segment, and whether every segment is one piece.
    """
    starts = accumulate(lengths, initial=0)
    table = [
        (seg, start + at, min(size, n - at))
        for seg, (start, n) in enumerate(zip(starts, lengths, strict=False))
        for at in range(0, n, size)
    ]
    first = [0, *accumulate(-(-n // size) for n in lengths)]
    whole = all(0 < n <= size for n in lengths)
    both = (torch.tensor(t, dtype=torch.int64) for t in (table, first))
    table_on, first_on = (t.to(device, non_blocking=True) for t in both)
    return table_on, first_on, whole
