"""`segmented_lora`: each document's low-rank update applied to its own tokens (README.md here)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..dispatch import autocast, choose, forced, require, require_alike, without_autocast
from ..segments import Segments
from . import reference

OP = "segmented_lora"
MOST_RANK = 1 << 14


def segmented_lora(
    x: Float[Tensor, "tok d_in"],
    A: Float[Tensor, "rank d_in"],
    B: Float[Tensor, "rank d_out"],
    tok: Segments,
    rank: Segments,
    scale: float = 1.0,
) -> Float[Tensor, "tok d_out"]:
    """Compute ``y[t] = scale * B_doc^T (A_doc x[t])`` for the document that owns token t.

    Segment i of ``tok`` (its tokens) goes with segment i of ``rank`` (its rows of A and B): ranks
    are ragged, nothing is padded.  Runs in A's dtype and returns x's.  Rank 0 gives zeros.
    Differentiable in x, A and B, deterministically.
    Cost: ``2 * sum_i tok_i * rank_i * (d_in + d_out)`` floating-point operations forward.

    Raises ValueError when shapes, dtypes, devices or segments disagree, or a rank exceeds
    ``MOST_RANK``, which no adapter has.

    >>> x, A, B = torch.ones(3, 2), torch.ones(2, 2), torch.ones(2, 4)
    >>> segmented_lora(x, A, B, Segments((2, 1)), Segments((2, 0))).sum(1)
    tensor([16., 16.,  0.])
    """
    A, B = autocast(A, B)
    require_alike(A=(A, 2), B=(B, 2))
    require(x.ndim == 2, f"x must have 2 dimensions, got the shape {tuple(x.shape)}")
    require(x.is_floating_point(), f"x must be floating point, got {x.dtype}")
    require(x.device == A.device, f"x is on {x.device}, A on {A.device}")
    highest = max(rank.lengths, default=0)
    require(highest <= MOST_RANK, f"rank holds {highest}, at most {MOST_RANK} is allowed")
    require(len(tok) == len(rank), f"tok has {len(tok)} segments but rank has {len(rank)}")
    require(tok.total == x.shape[0], f"tok covers {tok.total} tokens but x has {x.shape[0]}")
    require(
        rank.total == A.shape[0] == B.shape[0],
        f"rank covers {rank.total} rows, A has {A.shape[0]}, B has {B.shape[0]}",
    )
    require(x.shape[1] == A.shape[1], f"A has width {A.shape[1]} but x has {x.shape[1]}")
    backend = forced(OP)
    if backend == "reference":
        y = reference.forward(x.to(A.dtype), A, B, tok.lengths, rank.lengths, scale)
    else:
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        run = _forward if traced else _run  # the op's own machinery costs more than a decoding step
        y = run(x.to(A.dtype), A, B, tok.lengths, rank.lengths, float(scale), backend)
    return y.to(x.dtype)


def _run(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tok: Sequence[int],
    rank: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    with without_autocast(x):
        return choose(OP, backend, x, A, B).forward(x, A, B, tok, rank, scale)


_forward = torch.library.custom_op("d2l_kernels::segmented_lora", _run, mutates_args=())


@_forward.register_fake
def _(x, A, B, tok, rank, scale, backend):
    return x.new_empty(x.shape[0], B.shape[1])


@torch.library.custom_op("d2l_kernels::segmented_lora_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tok: Sequence[int],
    rank: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        return choose(OP, backend, x, A, B).backward(dy, x, A, B, tok, rank, scale)


@_backward.register_fake
def _(dy, x, A, B, tok, rank, scale, backend):
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


def _save(ctx, inputs, output):
    x, A, B, *ctx.rest = inputs
    ctx.save_for_backward(x, A, B)


def _grad(ctx, dy):
    return *_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)
