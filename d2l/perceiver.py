"""The Perceiver that turns a chunk's activations into a fixed number of latents (spec section 2).

Everything is packed: tokens of all chunks lie on one axis, `Segments` says which belong together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from d2l_kernels import Segments, cross_attention, latent_attention
from jaxtyping import Float
from torch import Tensor, nn

from .config import PerceiverConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm that keeps the input's dtype, so that autocast does not leave the fused path."""

    eps: float

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return ``w x / sqrt(mean(x^2) + eps)``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedMLP(nn.Module):
    """SwiGLU: ``W_down (silu(W_gate x) * W_up x)``, no biases."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_in, d_hidden, bias=False)
        self.up = nn.Linear(d_in, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_out, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the three projections."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LatentBlock(nn.Module):
    """One attention block with sandwich norms; keys and values come from the context alone.

    A cross block reads the projected context, a self block the latents of its own segment.
    """

    def __init__(self, config: PerceiverConfig, *, cross: bool) -> None:
        super().__init__()
        d, heads, kv, d_head = config.d_latent, config.n_heads, config.n_kv_heads, config.d_head
        self.d_head = d_head
        self.norm_latents = RMSNorm(d, config.norm_eps)
        self.norm_context = RMSNorm(d, config.norm_eps) if cross else None
        self.q = nn.Linear(d, heads * d_head, bias=False)
        self.k = nn.Linear(d, kv * d_head, bias=False)
        self.v = nn.Linear(d, kv * d_head, bias=False)
        self.o = nn.Linear(heads * d_head, d, bias=False)
        self.norm_attended = RMSNorm(d, config.norm_eps)
        self.norm_mlp_in = RMSNorm(d, config.norm_eps)
        self.mlp = GatedMLP(d, config.mlp_factor * d, d)
        self.norm_mlp_out = RMSNorm(d, config.norm_eps)

    def forward(
        self,
        latents: Float[Tensor, "seg latent d_latent"],
        context: Float[Tensor, "tok d_latent"],
        segments: Segments,
    ) -> Float[Tensor, "seg latent d_latent"]:
        """Update the latents of every segment; ``context`` is ignored by a self block."""
        h = self.norm_latents(latents)
        split = (-1, self.d_head)
        q = self.q(h).unflatten(-1, split)
        if self.norm_context is not None:
            norm, weights = self.norm_context, (self.k.weight, self.v.weight)
            w_norm, w_k, w_v = (w.to(context.dtype) for w in (norm.weight, *weights))
            found = latent_attention(
                q.to(context.dtype), context, w_norm, w_k, w_v, segments, norm.eps
            )
        else:
            own = Segments((h.shape[1],) * h.shape[0])
            k, v = (p(h.flatten(0, 1)).unflatten(-1, split) for p in (self.k, self.v))
            found = cross_attention(q, k, v, own)
        attended = self.o(found.flatten(2))
        latents = latents + self.norm_attended(attended)
        return latents + self.norm_mlp_out(self.mlp(self.norm_mlp_in(latents)))


class LatentStage(nn.Module):
    """Learned latents, a stack of blocks, a final norm: the encoder or the decoder."""

    def __init__(
        self, config: PerceiverConfig, n_latents: int, n_blocks: int, n_self_per_block: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(n_latents, config.d_latent))
        first = [LatentBlock(config, cross=i == 0) for i in range(1 + n_self_per_block)]
        blocks = list(first)
        shared_cross: LatentBlock | None = None
        for _ in range(1, n_blocks):
            if config.shared_weights:
                shared_cross = shared_cross or LatentBlock(config, cross=True)
                blocks += [shared_cross, *first[1:]]
            else:
                blocks += [LatentBlock(config, cross=i == 0) for i in range(1 + n_self_per_block)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_latent, config.norm_eps)

    def forward(
        self, context: Float[Tensor, "tok d_latent"], segments: Segments
    ) -> Float[Tensor, "seg latent d_latent"]:
        """Read every segment with the same learned latents."""
        latents = self.latents.to(context.dtype).expand(len(segments), -1, -1)
        for block in self.blocks:
            latents = block(latents, context, segments)
        return self.norm(latents)


class Perceiver(nn.Module):
    """Modality projection, latent encoder, one-block decoder with ``n_out`` queries.

    The projection is a SwiGLU of ``projection_factor * d_model`` units, at factor 0 one matrix.

    With ``shared_weights`` block 0 keeps its own cross layer and all later cross layers are one
    module; the self layers of block 0 are reused everywhere.
    """

    def __init__(self, config: PerceiverConfig, d_model: int, n_out: int) -> None:
        super().__init__()
        hidden, d = config.projection_factor * d_model, config.d_latent
        self.projection: nn.Module = (
            GatedMLP(d_model, hidden, d) if hidden else nn.Linear(d_model, d, bias=False)
        )
        self.encoder = LatentStage(
            config, config.n_latents, config.n_blocks, config.n_self_attn_per_block
        )
        self.decoder = LatentStage(config, n_out, 1, 0)

    def forward(
        self, features: Float[Tensor, "tok d_model"], segments: Segments
    ) -> Float[Tensor, "seg n_out d_latent"]:
        """Summarise each segment of ``features`` in ``n_out`` vectors."""
        latents = self.encoder(self.projection(features), segments)
        per_segment = Segments((latents.shape[1],) * latents.shape[0])
        return self.decoder(latents.flatten(0, 1), per_segment)
