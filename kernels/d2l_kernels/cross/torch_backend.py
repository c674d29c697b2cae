"""`cross_attention` by matrix products: all segments at once when equal, else one by one.

Probabilities of one block of segments live at a time; the backward pass computes them again.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_MIB = 32
CACHE_MIB = 4


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attended values, 0 for an empty segment, and no statistics: none is needed.

    ``q`` is (seg, kv_head, row, d), ``k`` and ``v`` (tok, kv_head, d).
    """
    out = torch.zeros_like(q)
    for (q_i, out_i), (k_i, v_i) in _views(lengths, (q, out), (k, v)):
        p = scores(q_i, k_i, scale).softmax(-1)
        torch.bmm(p.to(v.dtype), v_i, out=out_i)
    return out, no_statistics(q)


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
    """Return the gradients of q, k and v: ``dS = P * (dP - rowsum(P * dP))``, ``dP = dO V^T``.

    P comes from the scores again and the row sum from P, not from ``out``: what is stored is
    rounded differently, which is lost where scores or ``dP`` are large.
    """
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for (q_i, do_i, dq_i), (k_i, v_i, dk_i, dv_i) in _views(
        lengths, (q, d_out, dq), (k, v, dk, dv)
    ):
        p = scores(q_i, k_i, scale).softmax(-1)
        dp = (do_i @ v_i.mT).to(p.dtype)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale).to(q.dtype)
        torch.bmm(ds, k_i, out=dq_i)
        dk_i.copy_(ds.mT @ q_i)
        dv_i.copy_(p.to(q.dtype).mT @ do_i)
    return dq, dk, dv


def no_statistics(q: Tensor) -> Tensor:
    """Return what stands for the log-sum-exp of each row where the backward pass needs none."""
    return q.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return ``scale q k^T`` in at least float32."""
    s = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=scale)
    return s.to(torch.promote_types(q.dtype, torch.float32))


def _views(
    lengths: Sequence[int], rows: tuple[Tensor, ...], tokens: tuple[Tensor, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield three-dimensional views, whose products need no copy.

    They hold the heads of one segment if that makes fewer of them and its scores fit the cache,
    else one head of a block of segments.  Empty segments are left out.
    """
    n_heads = rows[0].shape[1]
    for seg, tok, shape in blocks(rows[0], lengths):
        if not shape[1]:
            continue
        few = shape[0] < n_heads and 4 * n_heads * rows[0].shape[2] * shape[1] <= CACHE_MIB << 20
        dim, n = (0, shape[0]) if few else (1, n_heads)
        r = [t[seg] for t in rows]
        t = [t[tok].unflatten(0, shape).transpose(1, 2) for t in tokens]
        for i in range(n):
            yield [x.select(dim, i) for x in r], [x.select(dim, i) for x in t]


def blocks(q: Tensor, lengths: Sequence[int]) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Yield segments of equal length side by side: their slice, their tokens', (seg, tok) counts.

    A block's scores stay within ``BLOCK_MIB``, one segment at least.
    """
    ends = list(accumulate(lengths))
    per_tok = 4 * q.shape[1] * q.shape[2]
    first = 0
    while first < len(lengths):
        n, last = lengths[first], first + 1
        most = max(1, (BLOCK_MIB << 20) // max(1, n * per_tok))
        while last < len(lengths) and lengths[last] == n and last - first < most:
            last += 1
        start = ends[first] - n
        yield slice(first, last), slice(start, ends[last - 1]), (last - first, n)
        first = last
