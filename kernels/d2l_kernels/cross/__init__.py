"""`cross_attention`: latent queries attend to a long ragged context (README.md here)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..dispatch import autocast, choose, forced, require, require_alike, without_autocast
from ..segments import Segments
from . import reference

OP = "cross_attention"


def cross_attention(
    q: Float[Tensor, "seg latent head d_head"],
    k: Float[Tensor, "tok kv_head d_head"],
    v: Float[Tensor, "tok kv_head d_head"],
    segments: Segments,
    scale: float | None = None,
) -> Float[Tensor, "seg latent head d_head"]:
    """Attend from the latents of each segment to that segment's tokens, without a causal mask.

    ``softmax(scale q k^T) v``, ``scale`` being ``1 / sqrt(d_head)`` unless given; query head j
    reads KV head ``j // (head / kv_head)``.  The query heads of one KV head become rows of one
    matrix, so K and V are never repeated.  A segment without tokens gives zeros.

    Raises ValueError when shapes, dtypes, devices or segments disagree or heads do not divide.

    >>> q, kv = torch.zeros(1, 2, 4, 3), torch.ones(5, 2, 3)
    >>> cross_attention(q, kv, kv, Segments((5,))).shape
    torch.Size([1, 2, 4, 3])
    """
    q, k, v = autocast(q, k, v)
    require_alike(q=(q, 4), k=(k, 3), v=(v, 3))
    n_seg, _, n_heads, d_head = q.shape
    n_tok, n_kv, _ = k.shape
    require(n_kv > 0 and n_heads % n_kv == 0, f"{n_heads} query heads do not divide by {n_kv} KV")
    require(k.shape == v.shape and k.shape[2] == d_head, f"k {k.shape} and v {v.shape} do not fit")
    require(
        len(segments) == n_seg and segments.total == n_tok,
        f"segments describe {len(segments)} x {segments.total} tokens, "
        f"q has {n_seg} segments and k {n_tok} tokens",
    )
    group = n_heads // n_kv
    rows = q.unflatten(2, (n_kv, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scale = 1 / math.sqrt(d_head) if scale is None else float(scale)
    backend = forced(OP)
    if backend == "reference":
        out = reference.forward(rows, k, v, segments.lengths, scale)
    else:
        out = _forward(rows.contiguous(), k, v, segments.lengths, scale, backend)[0]
    return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


@torch.library.custom_op("d2l_kernels::cross_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        return choose(OP, backend, q, k, v).forward(q, k, v, lengths, scale)


@_forward.register_fake
def _(q, k, v, lengths, scale, backend):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.custom_op("d2l_kernels::cross_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return choose(OP, backend, q, k, v).backward(d_out, q, k, v, out, lse, lengths, scale)


@_backward.register_fake
def _(d_out, q, k, v, out, lse, lengths, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 6
    return *_backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None


_forward.register_autograd(_grad, setup_context=_save)
