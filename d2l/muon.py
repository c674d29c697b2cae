"""Muon for matrices, AdamW for everything else.

A matrix moves along its momentum with all singular values set to one (Jordan et al. 2024), at a
size at which AdamW's learning rate serves both (arXiv 2502.16982).  `torch.optim.Muon` takes plain
matrices alone; a hypernetwork holds most of its weights as stacks of them, one for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
RMS_OF_ADAMW = 0.2


class Muon(torch.optim.AdamW):
    """Optimise the groups that say ``matrices=True`` by Muon, in any leading dimensions."""

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.95, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; gradients of matrices are used up by it."""
        for group in self.param_groups:
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # AdamW expects a step in every state that it loads
                    state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                p.grad.add_(state["momentum"].mul_(self.momentum).add_(p.grad), alpha=self.momentum)
                size = RMS_OF_ADAMW * math.sqrt(max(p.shape[-2:]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(p.grad), alpha=group["lr"] * size)
                p.grad = None
        return super().step(closure)


def orthogonal(x: Float[Tensor, "*stack row col"]) -> Float[Tensor, "*stack row col"]:
    """Bring every singular value to about one (.7 to 1.2) by five Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(5):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return y if wide is x else y.mT
