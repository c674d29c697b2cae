"""`topk_distill`: linear head and top-k distillation loss on labelled rows only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def topk_distill(
    hidden: Float[Tensor, "tok d_model"],
    head: Float[Tensor, "vocab d_model"],
    teacher_logprob: Float[Tensor, "tok k"],
    teacher_idx: Int[Tensor, "tok k"],
    softcap: float | None = None,
) -> tuple[Float[Tensor, " tok"], Int[Tensor, " tok"]]:
    """Compute ``l_t = P_t logsumexp(z_t) - sum_k p_k z_tk`` with ``z = softcap(hidden head^T)``.

    ``p = exp(teacher_logprob)`` is not renormalised and ``P_t`` is its sum (spec section 6).  With
    k = 1 and log-probability 0 this is cross-entropy.  Pass only rows that have a target: the
    logits of other tokens are never formed.  Loss in at least float32.  Also returns the argmax of
    each row, which the logits give for nothing.

    Raises ValueError when k exceeds the vocabulary.
    """
    if teacher_idx.shape[1] > head.shape[0]:
        raise ValueError(f"k = {teacher_idx.shape[1]} exceeds the vocabulary of {head.shape[0]}")
    z = hidden @ head.to(hidden.dtype).mT
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    p = teacher_logprob.to(z.dtype).exp()
    loss = p.sum(-1) * z.logsumexp(-1) - (p * z.gather(1, teacher_idx)).sum(-1)
    return loss, z.detach().argmax(-1)
