"""`topk_distill` over blocks of rows: a library's matrix products around one Triton kernel.

The kernel reads a row of logits twice, once for its statistics and once to replace it by its
gradient; without it, each of softcap, maximum, exponential, sum and scatter is a pass over memory.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support as ts

why_not = ts.why_not
BLOCK_MIB = 256


def forward(
    hidden: Tensor,
    head: Tensor,
    teacher_logprob: Tensor,
    teacher_idx: Tensor,
    softcap: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, argmax and dH; softcap 0 means none, without ``need_grad`` dH has no rows."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n, vocab, k = hidden.shape[0], head.shape[0], teacher_idx.shape[1]
    loss, best = hidden.new_empty(n, dtype=dtype), teacher_idx.new_empty(n)
    d_hidden = torch.empty_like(hidden if need_grad else hidden[:0])
    p, idx = teacher_logprob.to(dtype).exp(), teacher_idx.contiguous()
    per_block = max(1, min(n, (BLOCK_MIB << 20) // (vocab * hidden.dtype.itemsize)))
    z = hidden.new_empty(per_block, vocab)
    for start in range(0, n, per_block):
        rows = slice(start, min(n, start + per_block))
        z = z[: rows.stop - start]
        torch.mm(hidden[rows], head.mT, out=z)
        ts.launch(
            row_loss, (len(z),), z, p[rows], idx[rows], loss[rows], best[rows], vocab, k, softcap,
            SOFTCAP=softcap > 0, GRADIENT=need_grad, ACC=ts.accumulator(dtype), **config(vocab, k),
        )  # fmt: skip
        if need_grad:
            torch.mm(z, head, out=d_hidden[rows])
    return loss, best, d_hidden


def config(vocab: int, k: int) -> dict[str, int]:
    """Return tile sizes and launch options."""
    block = ts.power_of_two(vocab, most=4096)
    return {"BLOCK": block, "BLOCK_K": ts.power_of_two(k, 1), "num_warps": 8, "num_stages": 2}


@triton.jit
@no_type_check
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    """Return ``softcap tanh(z / softcap)`` and its slope; near 0 the series keeps the digits."""
    slope = tl.full(z.shape, 1.0, z.dtype)
    if SOFTCAP:
        x = z / softcap
        e = tl.exp(-2 * tl.abs(x))
        far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
        s = x * x
        near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
        z = softcap * tl.where(s < 0.01, near, far)
        slope = 4 * e / ((1 + e) * (1 + e))
    return z, slope


@triton.jit
@no_type_check
def row_loss(
    logits, p, idx, loss, best, vocab, k, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into its loss, its argmax and, in place, the gradient of the logits.

    ``dz = (P softmax(z) - p) slope``.  Every column is written from the logits, so a target that a
    teacher names twice is written twice with the same number.
    """
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * vocab
    j = tl.arange(0, BLOCK_K)
    p_j = tl.load(p + row * k + j, j < k, 0.0).to(ACC)
    at_j = tl.load(idx + row * k + j, j < k, 0)
    z_j, slope_j = _capped(tl.load(z_row + at_j, j < k, 0.0).to(ACC), softcap, SOFTCAP)
    mass = tl.sum(p_j, 0)

    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0.0, ACC)
    best_at = tl.full((), 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, _ = _capped(tl.load(z_row + at, at < vocab, 0.0).to(ACC), softcap, SOFTCAP)
        z = tl.where(at < vocab, z, float("-inf"))
        highest, here = tl.max(z, 0, return_indices=True)
        best_at = tl.where(highest > top, start + here.to(tl.int64), best_at)
        new = tl.maximum(top, highest)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        top = new
    tl.store(loss + row, mass * (top + tl.log(total)) - tl.sum(p_j * z_j, 0))
    tl.store(best + row, best_at)

    if GRADIENT:
        share = mass / total
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z, slope = _capped(tl.load(z_row + at, at < vocab, 0.0).to(ACC), softcap, SOFTCAP)
            dz = share * tl.exp(z - top) * slope
            tl.store(z_row + at, dz.to(logits.dtype.element_ty), at < vocab)
        wanted = tl.zeros((BLOCK_K,), ACC)
        for i in range(0, k):
            same = at_j == tl.load(idx + row * k + i)
            wanted += tl.where(same, tl.load(p + row * k + i).to(ACC), 0.0)
        dz = (share * tl.exp(z_j - top) - wanted) * slope_j
        tl.debug_barrier()  # the columns of the targets are written above by other threads
        tl.store(z_row + at_j, dz.to(logits.dtype.element_ty), j < k)
