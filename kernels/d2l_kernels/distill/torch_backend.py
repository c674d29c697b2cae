"""`topk_distill` over blocks of rows: logits live for one block, in place, and give dH at once."""

import torch
from torch import Tensor

BLOCK_MIB = 24


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
    per_block = max(1, (BLOCK_MIB << 20) // (vocab * dtype.itemsize))
    for start in range(0, n, per_block):
        rows = slice(start, min(n, start + per_block))
        z = (hidden[rows] @ head.mT).to(dtype)
        slope = None
        if softcap:
            z = z.div_(softcap).tanh_()
            slope = 1 - z * z if need_grad else None
            z.mul_(softcap)
        p, idx = teacher_logprob[rows].to(dtype).exp(), teacher_idx[rows]
        picked = (p * z.gather(1, idx)).sum(-1)
        top, best[rows] = z.max(-1)
        total = z.sub_(top[:, None]).exp_().sum(-1)
        mass = p.sum(-1)
        loss[rows] = mass * (top + total.log()) - picked
        if need_grad:
            dz = z.mul_((mass / total)[:, None]).scatter_add_(1, idx, -p)
            if slope is not None:
                dz.mul_(slope)
            torch.mm(dz.to(head.dtype), head, out=d_hidden[rows])
    return loss, best, d_hidden
