"""`cross_attention` as it is written on paper: one segment and one KV head after another."""

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attend; ``q`` is (seg, kv_head, row, d), rows being latents of all heads of a KV head.

    Differentiable.  Scores and softmax in at least float32.
    """
    out, start = [], 0
    for segment, n in zip(q.unbind(0), lengths, strict=True):
        for head in range(k.shape[1]):
            k_i, v_i = k[start : start + n, head], v[start : start + n, head]
            scores = (scale * (segment[head] @ k_i.mT)).to(
                torch.promote_types(q.dtype, torch.float32)
            )
            out.append(scores.softmax(-1).to(v_i.dtype) @ v_i)
        start += n
    return torch.stack(out).view(q.shape) if out else torch.zeros_like(q)
