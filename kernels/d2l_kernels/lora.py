"""`segmented_lora`: each document's low-rank update applied to its own tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .segments import Segments


def segmented_lora(
    x: Float[Tensor, "tok d_in"],
    A: Float[Tensor, "rank d_in"],
    B: Float[Tensor, "rank d_out"],
    tok: Segments,
    rank: Segments,
    scale: float = 1.0,
) -> Float[Tensor, "tok d_out"]:
    """Compute ``y[t] = scale * B_doc^T (A_doc x[t])`` for the document that owns token t.

    Segment i of ``tok`` (its tokens) goes with segment i of ``rank`` (its rows of A and B): ranks
    are ragged, nothing is padded.  Runs in A's dtype and returns x's.  Rank 0 gives zeros.
    Cost: ``2 * sum_i tok_i * rank_i * (d_in + d_out)`` multiply-adds.

    Raises ValueError when the segments do not cover the tensors or do not pair up.
    """
    if len(tok) != len(rank):
        raise ValueError(f"tok has {len(tok)} segments but rank has {len(rank)}")
    if tok.total != x.shape[0]:
        raise ValueError(f"tok covers {tok.total} tokens but x has {x.shape[0]}")
    if rank.total != A.shape[0] or rank.total != B.shape[0]:
        raise ValueError(f"rank covers {rank.total} rows, A has {A.shape[0]}, B has {B.shape[0]}")
    h = x.to(A.dtype)
    if tok.equal_length and rank.equal_length:
        n = len(tok)
        down = torch.bmm(h.view(n, -1, h.shape[1]), A.view(n, -1, A.shape[1]).mT)
        y = torch.bmm(down, B.view(n, -1, B.shape[1])).flatten(0, 1)
    else:
        parts = zip(h.split(tok.lengths), A.split(rank.lengths), B.split(rank.lengths), strict=True)
        y = torch.cat([(h_i @ A_i.mT) @ B_i for h_i, A_i, B_i in parts])
    return (y * scale).to(x.dtype)
