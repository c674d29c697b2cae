"""Attention over ragged segments in four Triton kernels; `latent_attention` runs on them as well.

A program owns a block of rows and a piece of one segment's tokens (values, dq), or a tile of tokens
(dk, dv).  What the pieces of a segment found is combined in their order, so nothing is atomic and
two runs agree bit for bit.  With ``NORM`` there is one tensor x, and keys and values are both
``x / rms(x)``: products read a tile of x itself, each token's ``1 / rms`` joins its scores.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support as ts

WIDEST = 256
# shared memory that tiles wider than 128 need: sm_80 and sm_90 have it, sm_86 and sm_89 have not
SHARED = 160 << 10
# programs that keep a large GPU busy; fewer than that share the tokens of a segment
PROGRAMS, SHORTEST_PIECE = 264, 256


class Tiles(NamedTuple):
    """Launch options of a kernel: rows and tokens of a tile, warps, loads in flight."""

    M: int
    N: int
    num_warps: int
    num_stages: int


# for rows up to this width, of this many bytes a number: values, dq, dk and dv
TILES = {
    2: {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
        128: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 8, 1)),
        256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
        512: (Tiles(64, 16, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
    },
    4: {
        64: (Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
        256: (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),
    },
}


def why_not(*args: Tensor) -> str | None:
    """Say what keeps the kernels from running on these tensors."""
    return ts.why_not(*args) or (too_wide(args[0], WIDEST) if args else None)


def too_wide(t: Tensor, widest: int) -> str | None:
    """Say whether a row of ``t`` is too wide for a tile, on its GPU as well."""
    if t.is_cuda:
        gpu = torch.cuda.get_device_properties(t.device)
        widest = widest if gpu.shared_memory_per_multiprocessor >= SHARED else min(widest, 128)
    if t.shape[-1] > widest:
        return f"rows of {t.shape[-1]} {t.dtype} are wider than {widest}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `torch_backend.forward` does; with ``eps``, for ``k / rms(k)`` as k and v."""
    tiles, fixed = _tiles(q)[0], _fixed(q, eps)
    pieces, of_segment, size = _cut(q, lengths, tiles)
    out, lse = torch.empty_like(q), _wide(q, *q.shape[:-1])
    whole = size >= max(lengths, default=0) and all(lengths)
    found, found_lse = out, lse
    if not whole:
        found, found_lse = (_wide(q, len(pieces), *t.shape[1:]) for t in (out, lse))
    ts.launch(
        attend, _grid(q, pieces, tiles), q, k.contiguous(), v.contiguous(), found, found_lse,
        pieces, ts.offsets(lengths, q.device), size, q.shape[2], scale, eps or 0.0,
        **fixed, **tiles._asdict(),
    )  # fmt: skip
    if not whole:
        _combine(found, found_lse, out, lse, of_segment, softmax=True)
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
    """Return the gradients of q, k and v; with ``eps`` k's is that of both and v's is unset."""
    _, tiles, tiles_kv = _tiles(q)
    given = (q, k.contiguous(), v.contiguous(), d_out, lse, (d_out.to(lse.dtype) * out).sum(-1))
    start, numbers = ts.offsets(lengths, q.device), (q.shape[2], scale, eps or 0.0)
    pieces, of_segment, size = _cut(q, lengths, tiles)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    whole = size >= max(lengths, default=0) and all(lengths)
    found = dq if whole else _wide(q, len(pieces), *q.shape[1:])
    fixed = _fixed(q, eps)
    ts.launch(
        gradient_q, _grid(q, pieces, tiles), *given, found, pieces, start, size, *numbers,
        **fixed, **tiles._asdict(),
    )  # fmt: skip
    if not whole:
        _combine(found, lse, dq, lse, of_segment, softmax=False)
    pieces = ts.tiles(lengths, tiles_kv.N, q.device)
    ts.launch(
        gradient_kv, (len(pieces), q.shape[1]), *given, dk, dv, pieces, start, *numbers,
        **fixed, **tiles_kv._asdict(),
    )  # fmt: skip
    return dq, dk, dv


def _combine(
    found: Tensor, found_lse: Tensor, out: Tensor, lse: Tensor, of_segment: Tensor, *, softmax: bool
) -> None:
    n_seg, heads, rows, d = out.shape
    ts.launch(
        combine, (n_seg, heads, ts.cdiv(rows, 16)), found, found_lse, out, lse, of_segment, rows,
        HEADS=heads, D=d, C=ts.power_of_two(d), M=16, SOFTMAX=softmax,
        ACC=ts.accumulator(out.dtype),
    )  # fmt: skip


def _tiles(q: Tensor) -> tuple[Tiles, Tiles, Tiles]:
    widths = TILES[min(q.element_size(), 4)]
    return next(tiles for widest, tiles in widths.items() if q.shape[3] <= widest)


def _fixed(q: Tensor, eps: float | None) -> dict[str, object]:
    d, norm = q.shape[3], eps is not None
    fixed = {"HEADS": q.shape[1], "D": d, "C": ts.power_of_two(d), "NORM": norm}
    return {**fixed, "ACC": ts.accumulator(q.dtype)}


def _wide(q: Tensor, *shape: int) -> Tensor:
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _grid(q: Tensor, pieces: Tensor, tiles: Tiles) -> tuple[int, int, int]:
    return len(pieces), q.shape[1], ts.cdiv(q.shape[2], tiles.M)


def _cut(q: Tensor, lengths: Sequence[int], tiles: Tiles) -> tuple[Tensor, Tensor, int]:
    """Cut segments so that ``PROGRAMS`` share the tokens; return each one's first piece, the size.

    An empty segment has no piece.
    """
    share = sum(lengths) * q.shape[1] * ts.cdiv(q.shape[2], tiles.M) // PROGRAMS
    size = max(SHORTEST_PIECE, ts.cdiv(share, tiles.N) * tiles.N)
    n_pieces = [ts.cdiv(n, size) for n in lengths]
    return ts.tiles(lengths, size, q.device), ts.offsets(n_pieces, q.device), size


@triton.jit
@no_type_check
def _load(at, first, n, STRIDE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Load rows ``first ... first + SIZE`` of n as a tile, zeros beyond n rows and D columns."""
    row, col = first + tl.arange(0, SIZE)[:, None], tl.arange(0, C)[None, :]
    return tl.load(at + row * STRIDE + col, mask=(row < n) & (col < D), other=0.0)


@triton.jit
@no_type_check
def _store(
    at, tile, first, n, STRIDE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr
):
    row, col = first + tl.arange(0, SIZE)[:, None], tl.arange(0, C)[None, :]
    tile = tile.to(at.dtype.element_ty)
    tl.store(at + row * STRIDE + col, tile, mask=(row < n) & (col < D))


@triton.jit
@no_type_check
def _piece(pieces, tok_start, at, size):
    """Load the segment of a piece, its first token and how many it has."""
    seg, start = tl.load(pieces + 2 * at), tl.load(pieces + 2 * at + 1)
    n = tl.minimum(size, tl.load(tok_start + seg + 1) - start)
    return seg.to(tl.int64), start.to(tl.int64), n


@triton.jit
@no_type_check
def _several(tok_start, seg, ACC: tl.constexpr):
    """Return 0 for a lone token, whose score has no gradient, not even a rounding error."""
    return (tl.load(tok_start + seg + 1) - tl.load(tok_start + seg) > 1).to(ACC)


@triton.jit
@no_type_check
def _rms(x, eps, D: tl.constexpr, ACC: tl.constexpr):
    x = x.to(ACC)
    return tl.sqrt(tl.sum(x * x, 1) / D + eps)


@triton.jit
@no_type_check
def _rho(x, n, eps, D: tl.constexpr, ACC: tl.constexpr):
    """Return ``1 / rms``, and 0 beyond n tokens: there it would be large and meet zeros."""
    return tl.where(tl.arange(0, x.shape[0]) < n, 1 / _rms(x, eps, D, ACC), 0)


@triton.jit
@no_type_check
def _dot(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, out_dtype=ACC, input_precision="ieee")


@triton.jit
@no_type_check
def attend(
    q, k, v, out, lse, pieces, tok_start, size, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Attend from M rows to one piece of a segment: the softmax is kept up from tile to tile."""
    item, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    seg, start, n = _piece(pieces, tok_start, item, size)
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
@no_type_check
def combine(
    piece, piece_lse, out, lse, of_segment, rows,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up what the pieces of a segment found, weighted by their share of the softmax or not."""
    seg, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    row = block + tl.arange(0, M)
    top = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    acc = tl.zeros([M, C], ACC)
    for item in range(tl.load(of_segment + seg), tl.load(of_segment + seg + 1)):
        at = (item * HEADS + head.to(tl.int64)) * rows
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
@no_type_check
def _probabilities(scores, lse):
    """Bound by 1, which rounding of huge scores and their log-sum-exp would break."""
    return tl.exp(tl.minimum(scores - lse, 0))


@triton.jit
@no_type_check
def gradient_q(
    q, k, v, d_out, lse, dot, dq, pieces, tok_start, size, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of M rows that comes from one piece of a segment."""
    item, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    seg, start, n = _piece(pieces, tok_start, item, size)
    at = (seg * HEADS + head) * rows
    row = block + tl.arange(0, M)
    q_tile = _load(q + at * D, block, rows, D, D, M, C)
    do_tile = _load(d_out + at * D, block, rows, D, D, M, C)
    lse_tile = tl.load(lse + at + row, mask=row < rows, other=0.0)[:, None]
    dot_tile = tl.load(dot + at + row, mask=row < rows, other=0.0)[:, None]
    k += (start * HEADS + head) * D
    v += (start * HEADS + head) * D
    several = _several(tok_start, seg, ACC)
    acc = tl.zeros([M, C], ACC)
    for first in range(0, n, N):
        k_tile = _load(k, first, n, HEADS * D, D, N, C)
        v_tile = k_tile if NORM else _load(v, first, n, HEADS * D, D, N, C)
        scores = _dot(q_tile, tl.trans(k_tile), ACC) * scale
        dp = _dot(do_tile, tl.trans(v_tile), ACC)
        if NORM:
            rho = _rho(k_tile, n - first, eps, D, ACC)[None, :]
            ds = _probabilities(scores * rho, lse_tile) * (dp * rho - dot_tile) * rho
        else:
            ds = _probabilities(scores, lse_tile) * (dp - dot_tile)
        ds = ds * several * scale
        acc += _dot(ds.to(k_tile.dtype), k_tile, ACC)
    _store(dq + (item.to(tl.int64) * HEADS + head) * rows * D, acc, block, rows, D, D, M, C)


@triton.jit
@no_type_check
def gradient_kv(
    q, k, v, d_out, lse, dot, dk, dv, pieces, tok_start, rows, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of N tokens; with ``NORM`` dk receives that of x and dv is unused."""
    head = tl.program_id(1)
    seg, start, n = _piece(pieces, tok_start, tl.program_id(0), N)
    start = (start * HEADS + head) * D
    at = (seg * HEADS + head) * rows
    k_tile = _load(k + start, 0, n, HEADS * D, D, N, C)
    v_tile = k_tile if NORM else _load(v + start, 0, n, HEADS * D, D, N, C)
    if NORM:
        rho = _rho(k_tile, n, eps, D, ACC)
        along = tl.zeros([N], ACC)
    several = _several(tok_start, seg, ACC)
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
        ds = p * (dp - dot_tile) * several * scale
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
