"""`latent_attention`'s core: attention whose keys and values are both ``x / rms(x)``.

The normed tokens exist for one block of segments at a time, while they are in the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cross.torch_backend import blocks, no_statistics, scores


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    q: Tensor, x: Tensor, lengths: Sequence[int], eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale q n^T) n`` of (seg, row, d_latent) and no statistics."""
    out = torch.zeros_like(q)
    for seg, tok, shape in blocks(q[:, None], lengths):
        if not shape[1]:
            continue
        n = _normed(x[tok], eps)[0].to(x.dtype).unflatten(0, shape)
        p = scores(q[seg], n, scale).softmax(-1)
        torch.bmm(p.to(n.dtype), n, out=out[seg])
    return out, no_statistics(q)


def backward(
    d_out: Tensor,
    q: Tensor,
    x: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return gradients of q and x; ``dn = dS^T q + P^T dO``, ``dx = rho (dn - n mean(dn n))``."""
    dq, dx = torch.zeros_like(q), torch.empty_like(x)
    for seg, tok, shape in blocks(q[:, None], lengths):
        if not shape[1]:
            continue
        exact, rho = _normed(x[tok], eps)
        n = exact.to(x.dtype).unflatten(0, shape)
        p = scores(q[seg], n, scale).softmax(-1)
        dp = (d_out[seg] @ n.mT).to(p.dtype)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale).to(q.dtype)
        torch.bmm(ds, n, out=dq[seg])
        both = torch.cat((ds, p.to(q.dtype)), 1), torch.cat((q[seg], d_out[seg]), 1)
        dn = (both[0].mT @ both[1]).flatten(0, 1).to(p.dtype)
        mean = (dn * exact).mean(-1, keepdim=True)
        dx[tok] = torch.addcmul(dn, exact, mean, value=-1).mul_(rho)
    return dq, dx


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``n = x rho`` and ``rho`` in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rho = (x.square().mean(-1, keepdim=True) + eps).rsqrt_()
    return x * rho, rho
