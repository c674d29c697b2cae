"""`cross_attention` by flash-attention's function for sequences of unequal length.

Nothing is masked, so the rows of a KV head are queries like any others: they go in packed, and K
and V are read once for the query heads that share them.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .torch_backend import no_statistics

WIDEST = 256


def why_not(*args: Tensor) -> str | None:
    """Say what keeps flash-attention from running: hardware, dtype, head width, no token."""
    if not args:
        return None
    q, *tokens = args
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than sm_80"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is neither float16 nor bfloat16"
    if q.shape[-1] > WIDEST:
        return f"heads of {q.shape[-1]} are wider than {WIDEST}"
    return None if all(len(t) for t in tokens) else "there is no token"


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return what `torch_backend.forward` does, but no statistics: `backward` needs none."""
    found = _attend(_packed(q, lengths), k, v, lengths, scale)
    return _unpacked(found, q, lengths), no_statistics(q)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, deterministically.

    The library promises no more than one differentiable function, so its forward runs again here.
    """
    rows, k, v = (t.detach().requires_grad_() for t in (_packed(q, lengths), k, v))
    with torch.enable_grad():
        found = _attend(rows, k, v, lengths, scale)
    dq, dk, dv = torch.autograd.grad(found, (rows, k, v), _packed(d_out, lengths))
    dq = _unpacked(dq, q, lengths)
    # the score of a lone token has no gradient, not even a rounding error
    for i, (start, n) in enumerate(zip(accumulate(lengths, initial=0), lengths, strict=False)):
        if n == 1:
            dq[i], dk[start] = 0, 0
    return dq, dk, dv


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    filled = tuple(n for n in lengths if n)
    rows = len(q) // len(filled)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=_offsets((rows,) * len(filled), q.device),
        cu_seqlens_k=_offsets(filled, q.device),
        max_seqlen_q=rows,
        max_seqlen_k=max(filled),
        softmax_scale=scale,
        deterministic=True,
    )


def _packed(q: Tensor, lengths: Sequence[int]) -> Tensor:
    """Lay out (segment row) head d, leaving out segments that have no token."""
    return q[_filled(lengths)].transpose(1, 2).flatten(0, 1)


def _unpacked(packed: Tensor, q: Tensor, lengths: Sequence[int]) -> Tensor:
    """Lay out segment head row d again, with zeros for the segments that were left out."""
    out = torch.zeros_like(q)
    out[_filled(lengths)] = packed.unflatten(0, (-1, q.shape[2])).transpose(1, 2)
    return out


def _filled(lengths: Sequence[int]) -> slice | list[int]:
    return slice(None) if all(lengths) else [i for i, n in enumerate(lengths) if n]


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return offsets.to(device, non_blocking=True)
