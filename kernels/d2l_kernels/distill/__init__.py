"""`topk_distill`: linear head and top-k distillation loss in one pass (README.md here)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..dispatch import autocast, choose, forced, require, require_alike, without_autocast
from . import reference

OP = "topk_distill"


def topk_distill(
    hidden: Float[Tensor, "tok d_model"],
    head: Float[Tensor, "vocab d_model"],
    teacher_logprob: Float[Tensor, "tok k"],
    teacher_idx: Int[Tensor, "tok k"],
    softcap: float | None = None,
    weight: Float[Tensor, " tok"] | None = None,
) -> tuple[Float[Tensor, " tok"], Int[Tensor, " tok"]]:
    """Compute ``l_t = w_t (P_t logsumexp(z_t) - sum_k p_k z_tk)``, ``z = softcap(hidden head^T)``.

    ``p = exp(teacher_logprob)`` is not renormalised and ``P_t`` is its sum (spec section 6).  With
    k = 1 and log-probability 0 this is cross-entropy.  Pass only rows that have a target: the
    logits of other tokens are never formed, and those of all rows never at once.  The head is
    frozen: only ``hidden`` receives a gradient, computed in the forward pass.  Loss in at least
    float32.  Also returns the argmax of each row, which the logits give for nothing.

    Raises ValueError when shapes or devices disagree, k exceeds the vocabulary, or the head, the
    teacher or ``weight`` asks for a gradient.

    >>> loss, best = topk_distill(
    ...     torch.eye(2), torch.eye(2), torch.zeros(2, 1), torch.tensor([[0], [1]])
    ... )
    >>> loss, best
    (tensor([0.3133, 0.3133]), tensor([0, 1]))
    """
    for name, t in (("head", head), ("teacher_logprob", teacher_logprob), ("weight", weight)):
        require(t is None or not t.requires_grad, f"{name} must not require a gradient: detach it")
    hidden, head = autocast(hidden, head.to(hidden.dtype))
    require_alike(hidden=(hidden, 2), head=(head, 2))
    require(teacher_idx.ndim == 2, f"teacher_idx has the shape {tuple(teacher_idx.shape)}, not 2-D")
    vocab, d_model = head.shape
    require(hidden.shape[1] == d_model, f"head has width {d_model}, hidden {hidden.shape[1]}")
    require(
        teacher_idx.shape == teacher_logprob.shape and len(teacher_idx) == len(hidden),
        f"teacher_logprob {tuple(teacher_logprob.shape)} and teacher_idx "
        f"{tuple(teacher_idx.shape)} must both have one row for each of {len(hidden)} tokens",
    )
    k = teacher_idx.shape[1]
    require(k <= vocab, f"teacher_idx has k = {k}, which exceeds the vocabulary of {vocab}")
    require(softcap is None or softcap > 0, f"softcap must be positive, got {softcap}")
    require(not teacher_idx.is_floating_point(), f"teacher_idx is {teacher_idx.dtype}, not integer")
    require(
        weight is None or weight.shape == (len(hidden),),
        f"weight must have one number for each of {len(hidden)} tokens",
    )
    for name, t in (("teacher_idx", teacher_idx), ("teacher_logprob", teacher_logprob)):
        require(t.device == hidden.device, f"{name} is on {t.device}, hidden on {hidden.device}")
    backend, teacher_idx = forced(OP), teacher_idx.long()
    if backend == "reference":
        loss, best = reference.forward(hidden, head, teacher_logprob, teacher_idx, softcap)
    else:
        need = hidden.requires_grad and torch.is_grad_enabled()
        loss, best, _ = _forward(
            hidden, head, teacher_logprob, teacher_idx, softcap or 0.0, need, backend
        )
    return loss if weight is None else loss * weight, best


@torch.library.custom_op("d2l_kernels::topk_distill", mutates_args=())
def _forward(
    hidden: Tensor,
    head: Tensor,
    teacher_logprob: Tensor,
    teacher_idx: Tensor,
    softcap: float,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(hidden):
        return choose(OP, backend, hidden, head, teacher_logprob).forward(
            hidden, head, teacher_logprob, teacher_idx, softcap, need_grad
        )


@_forward.register_fake
def _(hidden, head, teacher_logprob, teacher_idx, softcap, need_grad, backend):
    n = hidden.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if need_grad else (0, hidden.shape[1]))
    return hidden.new_empty(n, dtype=dtype), teacher_idx.new_empty(n), d_hidden


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _grad(ctx, d_loss, d_best, d_d_hidden):
    (d_hidden,) = ctx.saved_tensors
    grad = None if d_loss is None else d_hidden * d_loss.to(d_hidden.dtype)[:, None]
    return grad, None, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)
