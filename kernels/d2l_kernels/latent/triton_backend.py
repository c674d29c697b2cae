"""`latent_attention`'s core on the kernels of `cross_attention`: one tile of x is key and value."""

from collections.abc import Sequence

from torch import Tensor

from .. import triton_support as ts
from ..cross import triton_backend as attention

# of how many columns a tile of x fits, by the bytes of a number
WIDEST = {2: 512, 4: 128}


def why_not(*args: Tensor) -> str | None:
    """Say what keeps the kernels from running on these tensors; the width that counts is x's."""
    for x in args[1:2]:
        if reason := attention.too_wide(x, WIDEST[min(x.element_size(), 4)]):
            return reason
    return ts.why_not(*args)


def forward(
    q: Tensor, x: Tensor, lengths: Sequence[int], eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what `torch_backend.forward` does, without ever storing ``x / rms(x)``."""
    x = x[:, None]
    out, lse = attention.forward(q[:, None], x, x, lengths, scale, eps)
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
    """Return the gradients of q and x; the norm's is taken before a tile of dx is stored."""
    x = x[:, None]
    d_out, q, out, lse = (t[:, None] for t in (d_out, q, out, lse))
    dq, dx, _ = attention.backward(d_out, q, x, x, out, lse, lengths, scale, eps)
    return dq[:, 0], dx[:, 0]
