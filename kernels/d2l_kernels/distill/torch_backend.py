"""`topk_distill` over blocks of rows: logits live for one block, in place, and give dH at once.

A block is large enough for its matrix products and is worked on in parts that fit the cache.
"""

import torch
from torch import Tensor

BLOCK_MIB, LEAST_ROWS, PART_MIB = 24, 128, 1


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    hidden: Tensor,
    head: Tensor,
    teacher_logprob: Tensor,
    teacher_idx: Tensor,
    softcap: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, argmax and dH; softcap 0 means none, without ``need_grad`` dH has no rows.

    ``dz = (P softmax(z) - p) * (1 - tanh^2)`` and ``dH = dz head``.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n, vocab = hidden.shape[0], head.shape[0]
    loss, best = hidden.new_empty(n, dtype=dtype), teacher_idx.new_empty(n)
    d_hidden = torch.empty_like(hidden if need_grad else hidden[:0])
    p = teacher_logprob.to(dtype).exp()
    per_block = min(n, max(LEAST_ROWS, (BLOCK_MIB << 20) // (vocab * hidden.itemsize)))
    per_part = max(1, (PART_MIB << 20) // (vocab * dtype.itemsize))
    logits = hidden.new_empty(per_block, vocab)
    for start in range(0, n, max(1, per_block)):
        rows = range(start, min(n, start + per_block))
        z = torch.mm(hidden[rows.start : rows.stop], head.mT, out=logits[: len(rows)])
        for first in rows[::per_part]:
            part = slice(first, min(rows.stop, first + per_part))
            here = z[first - start : part.stop - start]
            loss[part], best[part], dz = _rows(
                here.to(dtype), p[part], teacher_idx[part], softcap, need_grad
            )
            if dz.data_ptr() != here.data_ptr():
                here.copy_(dz)
        if need_grad:
            torch.mm(z, head, out=d_hidden[rows.start : rows.stop])
    return loss, best, d_hidden


def _rows(
    z: Tensor, p: Tensor, idx: Tensor, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and argmax of some rows, and dz, which overwrites the logits."""
    slope = None
    if softcap:
        z = z.div_(softcap).tanh_()
        slope = 1 - z * z if need_grad else None
        z.mul_(softcap)
    picked, mass = (p * z.gather(1, idx)).sum(-1), p.sum(-1)
    top, best = z.max(-1)
    total = z.sub_(top[:, None]).exp_().sum(-1)
    if need_grad:
        z.mul_((mass / total)[:, None]).scatter_add_(1, idx, -p)
        if slope is not None:
            z.mul_(slope)
    return mass * (top + total.log()) - picked, best, z
