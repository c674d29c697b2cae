"""`cross_attention` by matrix products: all segments at once when equal, else one by one.

Probabilities of one block of segments live at a time; the backward pass computes them again.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_MIB = 32


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attended values and the log-sum-exp of the scores of each row.

    ``q`` is (seg, kv_head, row, d), ``k`` and ``v`` (tok, kv_head, d).  An empty segment gives 0
    and -inf.
    """
    out, lse = torch.empty_like(q), _statistics(q)
    for seg, tok, shape in _blocks(q, lengths):
        kk, vv = _heads_first(k[tok], shape), _heads_first(v[tok], shape)
        if not shape[1]:
            out[seg], lse[seg] = 0, -torch.inf
            continue
        p = _scores(q[seg], kk, scale)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        out[seg] = p.div_(total).to(v.dtype) @ vv
        lse[seg] = (top + total.log())[..., 0]
    return out, lse


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

    P comes from the scores again, not from ``lse``, and the row sum from P, not from ``out``: the
    stored ones are rounded differently, which is lost where scores or ``dP`` are large.
    """
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for seg, tok, shape in _blocks(q, lengths):
        if not shape[1]:
            continue
        kk, vv, do = _heads_first(k[tok], shape), _heads_first(v[tok], shape), d_out[seg]
        p = _scores(q[seg], kk, scale).softmax(-1)
        dp = (do @ vv.mT).to(p.dtype)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale).to(q.dtype)
        dq[seg] = ds @ kk
        dk[tok] = _tokens_first(ds.mT @ q[seg])
        dv[tok] = _tokens_first(p.to(do.dtype).mT @ do)
    return dq, dk, dv


def _statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q @ k.mT
    return scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)


def _heads_first(t: Tensor, shape: tuple[int, int]) -> Tensor:
    return t.unflatten(0, shape).transpose(1, 2)


def _tokens_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(0, 1)


def _blocks(q: Tensor, lengths: Sequence[int]) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
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
