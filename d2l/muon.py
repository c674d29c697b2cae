"""Muon for matrices, AdamW for everything else.

A matrix moves along its momentum with all singular values set to one (Jordan et al. 2024), at a
size at which AdamW's learning rate serves both (arXiv 2502.16982).  `torch.optim.Muon` takes no
stacks of matrices, one for each layer, which most of a hypernetwork is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Optimizer = Literal["adamw", "muon"]


class Muon(torch.optim.AdamW):
    """Move the groups that say ``matrices=True`` by Muon, the others by AdamW.

    Such parameters are matrices, or stacks of them; ``momentum`` is Nesterov's.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.95, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; it uses up the gradients of matrices."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # AdamW expects a step in every state that it loads
                    state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                p.grad.add_(state["momentum"].mul_(self.momentum).add_(p.grad), alpha=self.momentum)
                size = 0.2 * math.sqrt(max(p.shape[-2:]))  # 0.2: RMS of AdamW's steps
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(p.grad), alpha=group["lr"] * size)
                p.grad = None
        super().step()
        return loss


def orthogonal(x: Float[Tensor, "*stack row col"]) -> Float[Tensor, "*stack row col"]:
    """Bring singular values to about one (.7 to 1.2) by five Newton-Schulz iterations.

    Those below a thousandth of the matrix's norm stay smaller; zeros stay zeros.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(5):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return y if wide is x else y.mT


OPTIMIZERS: dict[Optimizer, type[torch.optim.AdamW]] = {"adamw": torch.optim.AdamW, "muon": Muon}
