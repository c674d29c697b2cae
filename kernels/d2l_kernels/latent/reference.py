"""`latent_attention` as it is written on paper: norm, project, attend.

It is also the cheaper order for many latents, where it runs on `cross_attention`'s own backend.
"""

import torch.nn.functional as F
from torch import Tensor

from ..cross import cross_attention
from ..segments import Segments


def forward(
    q: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    segments: Segments,
    eps: float,
) -> Tensor:
    """Return ``softmax(q K^T / sqrt(d_head)) V``; differentiable."""
    normed = F.rms_norm(x, (x.shape[1],), norm_weight, eps)
    k, v = ((normed @ W.mT).unflatten(1, (-1, q.shape[3])) for W in (W_k, W_v))
    return cross_attention(q, k, v, segments)
