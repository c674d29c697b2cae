"""`topk_distill` as it is written on paper, with the logits of every row at once."""

import torch
from torch import Tensor


def forward(
    hidden: Tensor,
    head: Tensor,
    teacher_logprob: Tensor,
    teacher_idx: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return ``- sum_k p_k log softmax(z)_k`` of every row and its argmax; differentiable."""
    z = hidden @ head.mT
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = -(teacher_logprob.to(z).exp() * z.log_softmax(-1).gather(1, teacher_idx)).sum(-1)
    return loss, z.detach().argmax(-1)
