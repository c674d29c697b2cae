"""`segmented_lora` in three Triton kernels: shrink to the rank, expand from it, sum over tokens.

``shrink`` is ``scale * x A^T``, ``expand`` is ``u B``, ``outer`` is ``u^T x``, all by segment.
No kernel adds to memory that another program writes, so two runs agree bit for bit.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support as ts

why_not = ts.why_not
# programs of `shrink` that keep a large GPU busy; fewer tiles than that share a row's sum
PROGRAMS, MOST_SPLITS = 128, 8


def forward(
    x: Tensor, A: Tensor, B: Tensor, tok: Sequence[int], rank: Sequence[int], scale: float
) -> Tensor:
    """Return ``scale * (x A^T) B`` segment by segment."""
    return _expand(_shrink(x, A, tok, rank, scale), B, tok, rank)


def backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tok: Sequence[int],
    rank: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B; the products ``x A^T`` are computed again."""
    down, d_down = _shrink(x, A, tok, rank, scale), _shrink(dy, B, tok, rank, scale)
    dx = _expand(d_down, A, tok, rank)
    return dx, _outer(d_down, x, tok, rank), _outer(down, dy, tok, rank)


def _shrink(
    x: Tensor, factor: Tensor, tok: Sequence[int], rank: Sequence[int], scale: float
) -> Tensor:
    """Return ``scale * x factor^T``, (tok, widest rank), unset beyond the rank of a segment."""
    x, factor = x.contiguous(), factor.contiguous()
    n, width, widest = x.shape[0], x.shape[1], max(rank, default=0)
    config = _config("shrink", x.dtype, widest)
    tiles = ts.tiles(tok, config["BLOCK_T"], x.device)
    n_rank = ts.cdiv(widest, config["BLOCK_R"])
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * len(tiles) * n_rank <= PROGRAMS:
        splits *= 2
    splits = max(1, min(splits, width // 512))
    per_split = ts.cdiv(ts.cdiv(width, splits), config["BLOCK_D"]) * config["BLOCK_D"]
    dtype = x.dtype if splits == 1 else torch.promote_types(x.dtype, torch.float32)
    u = torch.empty(splits, n, widest, dtype=dtype, device=x.device)
    ts.launch(
        shrink, (len(tiles), n_rank, splits), x, factor, u, tiles, ts.offsets(tok, x.device),
        ts.offsets(rank, x.device), scale, n, width, widest, per_split,
        ACC=ts.accumulator(x.dtype), **config,
    )  # fmt: skip
    return u[0] if splits == 1 else u.sum(0).to(x.dtype)


def _expand(u: Tensor, factor: Tensor, tok: Sequence[int], rank: Sequence[int]) -> Tensor:
    """Return ``u factor``, (tok, width)."""
    factor, width = factor.contiguous(), factor.shape[1]
    config = _config("expand", u.dtype, u.shape[1])
    tiles = ts.tiles(tok, config["BLOCK_T"], u.device)
    y = torch.empty(u.shape[0], width, dtype=u.dtype, device=u.device)
    ts.launch(
        expand, (len(tiles), ts.cdiv(width, config["BLOCK_D"])), u, factor, y, tiles,
        ts.offsets(tok, u.device), ts.offsets(rank, u.device), width, u.shape[1],
        ACC=ts.accumulator(u.dtype), **config,
    )  # fmt: skip
    return y


def _outer(u: Tensor, x: Tensor, tok: Sequence[int], rank: Sequence[int]) -> Tensor:
    """Return ``u^T x`` of each segment, (rank, width)."""
    x, width = x.contiguous(), x.shape[1]
    config = _config("outer", u.dtype, u.shape[1])
    tiles = ts.tiles(rank, config["BLOCK_R"], u.device)
    out = torch.empty(sum(rank), width, dtype=u.dtype, device=u.device)
    ts.launch(
        outer, (len(tiles), ts.cdiv(width, config["BLOCK_D"])), u, x, out, tiles,
        ts.offsets(tok, u.device), ts.offsets(rank, u.device), width, u.shape[1],
        ACC=ts.accumulator(u.dtype), **config,
    )  # fmt: skip
    return out


def _config(kernel: str, dtype: torch.dtype, widest: int) -> dict[str, int]:
    """Return tile sizes and launch options; ``tests/kernels`` compiles every row."""
    block_r = ts.power_of_two(widest, most=64)
    if dtype.itemsize > 2:
        return {"BLOCK_T": 32, "BLOCK_R": min(32, block_r), "BLOCK_D": 32,
                "num_warps": 4, "num_stages": 2}  # fmt: skip
    return {
        "shrink": {"BLOCK_T": 64, "BLOCK_R": block_r, "BLOCK_D": 128,
                   "num_warps": 4, "num_stages": 4},
        "expand": {"BLOCK_T": 64, "BLOCK_R": block_r, "BLOCK_D": 128,
                   "num_warps": 4, "num_stages": 2},
        "outer": {"BLOCK_T": 64, "BLOCK_R": block_r, "BLOCK_D": 64,
                  "num_warps": 4, "num_stages": 3},
    }[kernel]  # fmt: skip


@triton.jit
@no_type_check
def shrink(
    x, factor, u, tiles, tok_start, rank_start, scale, n_tok, width, widest, per_split,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``u[split, t, r] = scale * sum_d x[t, d] factor[r, d]`` over the columns of one split."""
    tile = tiles + 2 * tl.program_id(0)
    segment, first = tl.load(tile), tl.load(tile + 1)
    rank_0, rank_1 = tl.load(rank_start + segment), tl.load(rank_start + segment + 1)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R < rank_1 - rank_0:
        t = first + tl.arange(0, BLOCK_T)
        t_ok, r_ok = t < tl.load(tok_start + segment + 1), r < rank_1 - rank_0
        x_row = x + t.to(tl.int64)[:, None] * width
        factor_row = factor + (rank_0 + r).to(tl.int64)[None, :] * width
        total = tl.zeros((BLOCK_T, BLOCK_R), ACC)
        start = tl.program_id(2) * per_split
        for at in range(start, tl.minimum(start + per_split, width), BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            a = tl.load(x_row + d[None, :], t_ok[:, None] & (d < width)[None, :], 0.0)
            b = tl.load(factor_row + d[:, None], r_ok[None, :] & (d < width)[:, None], 0.0)
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)
        row = tl.program_id(2) * n_tok + t
        tl.store(
            u + row.to(tl.int64)[:, None] * widest + r[None, :],
            (total * scale).to(u.dtype.element_ty),
            t_ok[:, None] & r_ok[None, :],
        )


@triton.jit
@no_type_check
def expand(
    u, factor, y, tiles, tok_start, rank_start, width, widest,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``y[t, d] = sum_r u[t, r] factor[r, d]``; zeros where the rank is 0."""
    tile = tiles + 2 * tl.program_id(0)
    segment, first = tl.load(tile), tl.load(tile + 1)
    rank_0, rank_1 = tl.load(rank_start + segment), tl.load(rank_start + segment + 1)
    t = first + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t_ok, d_ok = t < tl.load(tok_start + segment + 1), d < width
    total = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for at in range(0, rank_1 - rank_0, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        r_ok = r < rank_1 - rank_0
        a = tl.load(
            u + t.to(tl.int64)[:, None] * widest + r[None, :], t_ok[:, None] & r_ok[None, :], 0.0
        )
        b = tl.load(
            factor + (rank_0 + r).to(tl.int64)[:, None] * width + d[None, :],
            r_ok[:, None] & d_ok[None, :],
            0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)
    tl.store(
        y + t.to(tl.int64)[:, None] * width + d[None, :],
        total.to(y.dtype.element_ty),
        t_ok[:, None] & d_ok[None, :],
    )


@triton.jit
@no_type_check
def outer(
    u, x, out, tiles, tok_start, rank_start, width, widest,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``out[r, d] = sum_t u[t, r] x[t, d]`` over the tokens of the segment that owns row r."""
    tile = tiles + 2 * tl.program_id(0)
    segment, first = tl.load(tile), tl.load(tile + 1)
    rank_0, rank_1 = tl.load(rank_start + segment), tl.load(rank_start + segment + 1)
    row = first + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r_ok, d_ok = row < rank_1, d < width
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    stop = tl.load(tok_start + segment + 1)
    for at in range(tl.load(tok_start + segment), stop, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        t_ok = t < stop
        a = tl.load(
            u + t.to(tl.int64)[None, :] * widest + (row - rank_0)[:, None],
            r_ok[:, None] & t_ok[None, :],
            0.0,
        )
        b = tl.load(
            x + t.to(tl.int64)[:, None] * width + d[None, :], t_ok[:, None] & d_ok[None, :], 0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)
    tl.store(
        out + row.to(tl.int64)[:, None] * width + d[None, :],
        total.to(out.dtype.element_ty),
        r_ok[:, None] & d_ok[None, :],
    )
