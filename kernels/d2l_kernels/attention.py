"""`cross_attention`: a few latent queries attend to a long ragged context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .segments import Segments


def cross_attention(
    q: Float[Tensor, "seg latent head d_head"],
    k: Float[Tensor, "tok kv_head d_head"],
    v: Float[Tensor, "tok kv_head d_head"],
    segments: Segments,
) -> Float[Tensor, "seg latent head d_head"]:
    """Attend from the latents of each segment to that segment's tokens, without a causal mask.

    ``softmax(q k^T / sqrt(d_head)) v``; query head j reads KV head ``j // (head / kv_head)``.
    The query heads of one KV head become rows of one matrix, so K and V are never repeated.  A
    segment without tokens gives zeros.

    Raises ValueError when segments and tensors disagree or heads do not divide.
    """
    n_seg, n_latent, n_heads, _d_head = q.shape
    n_tok, n_kv, _ = k.shape
    if n_heads % n_kv:
        raise ValueError(f"{n_heads} query heads are not a multiple of {n_kv} KV heads")
    if len(segments) != n_seg or segments.total != n_tok:
        raise ValueError(
            f"segments describe {len(segments)} x {segments.total} tokens, "
            f"q has {n_seg} segments and k {n_tok} tokens"
        )
    group = n_heads // n_kv
    rows = q.unflatten(2, (n_kv, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if segments.equal_length:
        kk, vv = (t.unflatten(0, (n_seg, -1)).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(rows, kk, vv)
    else:
        pieces = zip(
            rows.split(1), k.split(segments.lengths), v.split(segments.lengths), strict=True
        )
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    r, k_i.transpose(0, 1)[None], v_i.transpose(0, 1)[None]
                )
                if k_i.shape[0]
                else torch.zeros_like(r)
                for r, k_i, v_i in pieces
            ]
        )
    return out.unflatten(2, (group, n_latent)).permute(0, 3, 1, 2, 4).flatten(2, 3)
