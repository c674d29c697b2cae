"""`latent_attention`: a few latents attend to normed, projected tokens that are never formed.

The derivation is in README.md here.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..dispatch import autocast, choose, forced, require, require_alike, without_autocast
from ..segments import Segments
from . import reference

OP = "latent_attention"
MOST_ABSORBED = 32


def latent_attention(
    q: Float[Tensor, "seg latent head d_head"],
    x: Float[Tensor, "tok d_latent"],
    norm_weight: Float[Tensor, " d_latent"],
    W_k: Float[Tensor, "kv_width d_latent"],
    W_v: Float[Tensor, "kv_width d_latent"],
    segments: Segments,
    eps: float = 1e-6,
) -> Float[Tensor, "seg latent head d_head"]:
    """Attend from latents to ``RMSNorm(x)`` through key and value projections.

    ``softmax(q K^T / sqrt(d_head)) V`` with ``K = N W_k^T``, ``V = N W_v^T`` and
    ``N = norm_weight x / sqrt(mean(x^2) + eps)``.  Up to 32 latents the projections are absorbed
    into the queries and the result, so that attention runs on x itself; for more, projecting is
    cheaper and is done.  Differentiable in every tensor.

    Raises ValueError when shapes, dtypes, devices or segments disagree.

    >>> latent_attention(
    ...     torch.zeros(1, 2, 2, 3), torch.ones(5, 4), torch.ones(4), torch.ones(3, 4),
    ...     torch.ones(3, 4), Segments((5,)),
    ... )[0, 0, 0]
    tensor([4.0000, 4.0000, 4.0000])
    """  # fmt: skip
    n_seg, n_latents, n_heads, d_head = q.shape
    n_kv, rest = divmod(W_k.shape[0], d_head)
    require(
        rest == 0 and n_kv > 0 and n_heads % n_kv == 0,
        f"W_k has {W_k.shape[0]} rows, which {n_heads} heads of {d_head} cannot share",
    )
    require(
        W_k.shape == W_v.shape and W_k.shape[1] == x.shape[1] == norm_weight.shape[0],
        f"W_k {tuple(W_k.shape)}, W_v {tuple(W_v.shape)}, norm_weight {tuple(norm_weight.shape)} "
        f"and x {tuple(x.shape)} do not fit",
    )
    require(
        len(segments) == n_seg and segments.total == x.shape[0],
        f"segments describe {len(segments)} x {segments.total} tokens, "
        f"q has {n_seg} segments and x {x.shape[0]} tokens",
    )
    q, x, norm_weight, W_k, W_v = autocast(q, x, norm_weight, W_k, W_v)
    require_alike(q=q, x=x, norm_weight=norm_weight, W_k=W_k, W_v=W_v)
    backend = forced(OP)
    if backend == "reference" or n_latents > MOST_ABSORBED:
        return reference.forward(q, x, norm_weight, W_k, W_v, segments, eps)
    group = (n_kv, n_heads // n_kv)
    wide = _dtype_of_absorbed(q, x.shape[1])
    absorbed = torch.einsum(
        "slghd,gdc->sglhc",
        q.to(wide).unflatten(2, group),
        (W_k.to(wide) * norm_weight).unflatten(0, (n_kv, -1)),
    ).to(q.dtype)
    summed = _forward(
        absorbed.flatten(1, 3), x, segments.lengths, eps, 1 / math.sqrt(d_head), backend
    )[0]
    return torch.einsum(
        "sglhc,gdc->slghd",
        summed.view(absorbed.shape),
        (W_v * norm_weight).unflatten(0, (n_kv, -1)),
    ).flatten(2, 3)


def _dtype_of_absorbed(q: Tensor, d_latent: int) -> torch.dtype:
    """Absorb in float64 where float32 would round scores more than projecting does.

    A score sums ``d_latent`` products of a rounded sum over ``d_head``, the projected form's
    ``d_head`` products of one over ``d_latent``: worse, and cheap, for ``d_latent < d_head``.
    """
    narrow = d_latent < q.shape[3] and q.dtype == torch.float32 and q.device.type == "cpu"
    return torch.float64 if narrow else q.dtype


@torch.library.custom_op("d2l_kernels::latent_attention", mutates_args=())
def _forward(
    q: Tensor, x: Tensor, lengths: Sequence[int], eps: float, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        return choose(OP, backend, q, x).forward(q, x, lengths, eps, scale)


@_forward.register_fake
def _(q, x, lengths, eps, scale, backend):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.custom_op("d2l_kernels::latent_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    x: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    eps: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        return choose(OP, backend, q, x).backward(d_out, q, x, out, lse, lengths, eps, scale)


@_backward.register_fake
def _(d_out, q, x, out, lse, lengths, eps, scale, backend):
    return q.new_empty(q.shape), x.new_empty(x.shape)


def _save(ctx, inputs, output):
    q, x, *ctx.rest = inputs
    ctx.save_for_backward(q, x, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 6
    return *_backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)
