"""`latent_attention`'s core: attention whose keys and values are both ``x / rms(x)``."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..cross import torch_backend as attention


def why_not(*args: object) -> str | None:
    """Plain torch always runs."""
    return None


def forward(
    q: Tensor, x: Tensor, lengths: Sequence[int], eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale q n^T) n`` of (seg, row, d_latent) and the log-sum-exp of each row."""
    n = _normed(x, eps)
    out, lse = attention.forward(q[:, None], n, n, lengths, scale)
    return out[:, 0], lse[:, 0]


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
    """Return the gradients of q and x: ``dx = rho (dn - n mean(dn n))``."""
    n = _normed(x, eps)
    per_head = (t[:, None] for t in (d_out, q, out, lse))
    d_out, q, out, lse = per_head
    dq, dk, dv = attention.backward(d_out, q, n, n, out, lse, lengths, scale)
    dn, n = dk.add_(dv)[:, 0], n[:, 0]
    rho = (x.to(lse.dtype).square().mean(-1, keepdim=True) + eps).rsqrt()
    mean = (dn * n).to(lse.dtype).mean(-1, keepdim=True)
    return dq[:, 0], (rho * (dn - n * mean)).to(x.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), eps=eps)[:, None]
