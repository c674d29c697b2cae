"""`segmented_lora` as it is written on paper: every token gets its document's A and B.

Ranks are padded with zero rows to the longest.  Memory: ``tok * rank * (d_in + d_out)`` numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def forward(
    x: Tensor, A: Tensor, B: Tensor, tok: Sequence[int], rank: Sequence[int], scale: float
) -> Tensor:
    """Return ``y[t] = scale * sum_r B[t, r] (A[t, r] . x[t])``; differentiable."""
    if not x.shape[0]:
        return x @ A.new_zeros(A.shape[1], B.shape[1])
    widest = max(rank)

    def per_token(factor: Tensor) -> Tensor:
        docs = [pad(part, (0, 0, 0, widest - len(part))) for part in factor.split(list(rank))]
        owner = torch.repeat_interleave(torch.arange(len(tok)), torch.tensor(tok))
        return torch.stack(docs)[owner.to(x.device)]

    down = torch.einsum("trd,td->tr", per_token(A), x)
    return scale * torch.einsum("tr,trd->td", down, per_token(B))
