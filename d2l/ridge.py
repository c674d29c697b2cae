"""Rows set apart: a document's adapter as the ridge regression of what its rows say.

With rows A as the heads write them an input that matches one also wakes all that are like it, and
what they say adds up: the more chunks a document has, the louder.  Set apart, ``B^T A`` says each
row's words to that row's input and as little as it can to the others', whatever chunk they are of.
Ours, after the least-squares updates of ROME and MEMIT (arXiv 2210.07229).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_PENALTY = 1e-2
"""Below it float32 loses the inverse of 64 equal rows; a smaller penalty counts as this."""


def apart(
    A: Float[Tensor, "layer rank d_in"],
    penalty: Float[Tensor, " layer"],
    n_rows: Tensor | float | None = None,
) -> Float[Tensor, "layer rank d_in"]:
    """Set rows apart: ``s (1 + penalty) (A A^T + penalty s I)^-1 A``, ``s`` their mean square norm.

    So ``B^T A`` is, up to ``s (1 + penalty)``, the ridge regression of the rows of B on those of A.
    Rows of equal norm that are orthogonal stay as they are; of n equal rows each becomes about an
    n-th.  ``n_rows`` counts them where a row stands for several equal ones (and is longer by the
    root of their number).  Computed in float32, or float64 where A is.
    """
    with torch.autocast(A.device.type, enabled=False):
        rows = A if A.dtype == torch.float64 else A.float()
        n = A.shape[1] if n_rows is None else n_rows
        gram, penalty = _scaled(rows @ rows.mT, penalty, n)
        inverse, _ = torch.linalg.inv_ex(gram)
        return ((1 + penalty) * inverse @ rows).to(A)


def apart_by_document(
    A: Float[Tensor, "chunk layer r d_in"],
    penalty: Float[Tensor, " layer"],
    n_chunks: Sequence[int],
    times: Float[Tensor, " chunk"],
) -> Float[Tensor, "chunk layer r d_in"]:
    """Set the rows of each document's ``n_chunks`` apart; chunk i counts as ``times[i]`` chunks."""
    r, wide = A.shape[2], torch.promote_types(A.dtype, torch.float32)
    parts = zip(A.split(tuple(n_chunks)), times.split(tuple(n_chunks)), strict=True)
    done = [
        apart(a.transpose(0, 1).flatten(1, 2).to(wide), penalty, n.sum().clamp_min(1e-6) * r).to(A)
        for a, n in parts
    ]
    return torch.cat(done, 1).unflatten(1, (-1, r)).transpose(0, 1)


def sum_apart(
    W: Float[Tensor, "layer d_out d_in"],
    gram: Float[Tensor, "layer d_in d_in"],
    penalty: Float[Tensor, " layer"],
    n_rows: int,
) -> Float[Tensor, "layer d_out d_in"]:
    """Return ``B^T apart(A)`` where only sums over ``n_rows`` rows are held.

    ``W`` is ``B^T A``, ``gram`` is ``A^T A``; both float32 or float64.
    """
    gram, penalty = _scaled(gram, penalty, n_rows)
    solved, _ = torch.linalg.solve_ex(gram, W.mT)
    return (1 + penalty) * solved.mT


def _scaled(gram: Tensor, penalty: Tensor, n_rows: Tensor | float) -> tuple[Tensor, Tensor]:
    """Divide a Gram matrix by the rows' mean square norm and add the penalty; return both."""
    penalty = penalty.to(gram).clamp_min(LEAST_PENALTY)[:, None, None]
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] / n_rows
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram / size.clamp_min(torch.finfo(gram.dtype).tiny) + penalty * eye, penalty
