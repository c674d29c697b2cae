"""`segmented_lora`: one matrix product per document, a batched one when all are equal."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    x: Tensor, A: Tensor, B: Tensor, tok: Sequence[int], rank: Sequence[int], scale: float
) -> Tensor:
    """Return ``scale * (x A^T) B`` segment by segment."""
    if _equal(tok) and _equal(rank):
        x, A, B = _batched(x, A, B, n=len(tok))
        return torch.bmm(torch.bmm(x, A.mT).mul_(scale), B).flatten(0, 1)
    y = x.new_empty(x.shape[0], B.shape[1])
    for t, r in _slices(tok, rank):
        torch.mm((x[t] @ A[r].mT).mul_(scale), B[r], out=y[t])
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tok: Sequence[int],
    rank: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B; the products ``x A^T`` are computed again."""
    if _equal(tok) and _equal(rank):
        n = len(tok)
        dy, x = _batched(dy, x, n=n)
        A, B = _batched(A, B, n=n)
        down, d_down = torch.bmm(x, A.mT).mul_(scale), torch.bmm(dy, B.mT).mul_(scale)
        dx, dA, dB = torch.bmm(d_down, A), torch.bmm(d_down.mT, x), torch.bmm(down.mT, dy)
        return dx.flatten(0, 1), dA.flatten(0, 1), dB.flatten(0, 1)
    dx, dA, dB = torch.empty_like(x), torch.empty_like(A), torch.empty_like(B)
    for t, r in _slices(tok, rank):
        down, d_down = (x[t] @ A[r].mT).mul_(scale), (dy[t] @ B[r].mT).mul_(scale)
        torch.mm(d_down, A[r], out=dx[t])
        torch.mm(d_down.mT, x[t], out=dA[r])
        torch.mm(down.mT, dy[t], out=dB[r])
    return dx, dA, dB


def _equal(lengths: Sequence[int]) -> bool:
    return len(lengths) > 0 and all(n == lengths[0] for n in lengths)


def _batched(*tensors: Tensor, n: int) -> list[Tensor]:
    return [t.reshape(n, t.shape[0] // n, t.shape[1]) for t in tensors]


def _slices(tok: Sequence[int], rank: Sequence[int]) -> list[tuple[slice, slice]]:
    ends = zip(accumulate(tok), accumulate(rank), tok, rank, strict=True)
    return [(slice(t - n, t), slice(r - k, r)) for t, r, n, k in ends]
