"""From activations to LoRA factors: Perceiver, per-layer MLPs, heads (spec sections 2, 3, 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from d2l_kernels import Segments, cross_attention
from jaxtyping import Float
from torch import Tensor, nn

from .config import HypernetConfig
from .lora import ChunkLora, Factors, LoraBatch, compose
from .perceiver import Perceiver, RMSNorm
from .ridge import LEAST_PENALTY


@dataclass(frozen=True)
class TargetShapes:
    """What the hypernetwork writes for: base layers and, per module, input and output width.

    ``layers`` are the base's layer indices; widths are the largest over layers, a layer with
    smaller linears uses the leading columns.  Modules are kept sorted by name.
    """

    layers: tuple[int, ...]
    d_in: dict[str, int]
    d_out: dict[str, int]

    @property
    def modules(self) -> tuple[str, ...]:
        """Module names in the order of the heads."""
        return tuple(sorted(self.d_in))


class LayerMLP(nn.Module):
    """Residual ``x + LN2(silu(LN1(x) W1 + b1) W2 + b2)``; weights per LM layer or one pair.

    The LayerNorms are shared by all layers in either case.
    """

    def __init__(self, n_layers: int, d: int, *, per_layer: bool, dropout: float = 0.0) -> None:
        super().__init__()
        n = n_layers if per_layer else 1
        self.dropout = nn.Dropout(dropout)
        self.norm_in, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.W1, self.b1 = (
            nn.Parameter(torch.empty(n, d, 4 * d)),
            nn.Parameter(torch.empty(n, 4 * d)),
        )
        self.W2, self.b2 = nn.Parameter(torch.empty(n, 4 * d, d)), nn.Parameter(torch.empty(n, d))
        # EinMix draws weights from U(+-sqrt(3 / fan_in)), nn.Linear from U(+-sqrt(1 / fan_in))
        gain = 3.0 if per_layer else 1.0
        for weight, bias, fan_in in ((self.W1, self.b1, d), (self.W2, self.b2, 4 * d)):
            nn.init.uniform_(weight, -math.sqrt(gain / fan_in), math.sqrt(gain / fan_in))
            nn.init.uniform_(bias, -math.sqrt(1 / fan_in), math.sqrt(1 / fan_in))

    def forward(
        self, x: Float[Tensor, "chunk layer mod r d_latent"]
    ) -> Float[Tensor, "chunk layer mod r d_latent"]:
        """Apply each layer's own MLP to that layer's embeddings."""
        rows = self.dropout(self.norm_in(x)).transpose(0, 1).flatten(1, 3)
        hidden = self.dropout(F.silu(rows @ self.W1 + self.b1[:, None]))
        out = (hidden @ self.W2 + self.b2[:, None]).unflatten(1, (x.shape[0], *x.shape[2:4]))
        return x + self.norm_out(out.transpose(0, 1))


class CopyPath(nn.Module):
    """Let every rank row read one place of the text, past the Perceiver's narrow latents.

    ``p = softmax_t(W_q z . W_k f_t / sqrt(d_copy))`` and ``c = sum_t p_t W_v f_t`` for the latent z
    of a rank row and the normed features f.  With features that hold a token's state and the
    embedding of its successor, a row can store "in this state say that word" for words that
    training never showed: the rank-1 term that a gradient step on that token would add.  With
    ``n_said`` the last ``n_said`` features, the embedding of the successor, are read too as they
    are: ``sum_t p_t f_t``.  Ours, not in the published system.
    """

    def __init__(
        self, d_model: int, d_latent: int, d_copy: int, n_said: int = 0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.n_said, self.n_heads = n_said, 1 + math.ceil(n_said / d_copy)
        self.norm_features = RMSNorm(d_model, eps)
        self.norm_latents = RMSNorm(d_latent, eps)
        self.q = nn.Linear(d_latent, d_copy, bias=False)
        self.k = nn.Linear(d_model, d_copy, bias=False)
        self.v = nn.Linear(d_model, d_copy, bias=False)

    def forward(
        self,
        latents: Float[Tensor, "seg n_out d_latent"],
        features: Float[Tensor, "tok d_model"],
        segments: Segments,
    ) -> Float[Tensor, "seg n_out d_copy_and_said"]:
        """Return what each row has read; what is said lies in heads of its own, as wide as W_v."""
        f = self.norm_features(features)
        q = self.q(self.norm_latents(latents))
        k, v = self.k(f)[:, None], self.v(f)[:, None]
        if self.n_said:
            said = features[:, -self.n_said :].to(v.dtype)
            spare = (self.n_heads - 1) * v.shape[2] - self.n_said
            said = F.pad(said, (0, spare)).unflatten(1, (-1, v.shape[2]))
            k, v = k.expand(-1, self.n_heads, -1), torch.cat([v, said], 1)
        q = q[:, :, None].expand(-1, -1, self.n_heads, -1).to(k.dtype)
        found = cross_attention(q.contiguous(), k.contiguous(), v, segments)
        return found.flatten(2)[:, :, : self.v.out_features + self.n_said]


class Hypernet(nn.Module):
    """Map context activations to LoRA factors ``A`` and ``B`` of every chunk.

    ``u = x / ||x||``, ``[A | B] = u W_head``, ``A *= scaler_A``, ``B *= scaler_B``.  At the start
    ``scaler_B = bias_B = 0``, so delta W is exactly zero.  With ``config.chunk_gate`` B is also
    multiplied by ``sigmoid(sqrt(d) w.u + b)``; this gate is not in the published system.  With
    ``config.d_copy`` the first half of what `CopyPath` reads adds to A and the second half to B,
    through heads of their own; with ``config.say_next`` the embedding that it reads, scaled to unit
    norm and by a gain for each row, adds to B too.  With ``config.ridge`` all rows of a document
    are set apart (`d2l.ridge`), by a penalty learned for each layer and module.

    Raises ValueError for a target without layers or modules, and for ``say_next`` where features
    hold no next token or a target does not write into the residual stream.
    """

    GATE_BIAS = 2.0

    def __init__(self, config: HypernetConfig, targets: TargetShapes, d_model: int) -> None:
        super().__init__()
        if not targets.layers or not targets.modules:
            raise ValueError(f"nothing to adapt: {targets}")
        self.config, self.targets, self.d_model, self.n_said = config, targets, d_model, 0
        if config.say_next:
            said = d_model // 2 if config.encoder.next_token and config.d_copy else 0
            if set(targets.d_out.values()) != {said}:
                raise ValueError(
                    "say_next needs d_copy, next_token and targets as wide as an embedding, not "
                    f"{targets.d_out}, {config}"
                )
        L, M, r = len(targets.layers), len(targets.modules), config.lora.rank
        d = config.perceiver.d_latent
        self.per_layer_features = config.encoder.kind == "per_layer_activations"
        n_out = M * r if self.per_layer_features else L * M * r
        self.perceiver = Perceiver(config.perceiver, d_model, n_out)
        self.mlps = nn.ModuleList(
            LayerMLP(L, d, per_layer=config.per_layer_processing, dropout=config.mlp_dropout)
            for _ in range(config.n_pre_head_layers)
        )
        width = max(targets.d_in[m] + targets.d_out[m] for m in targets.modules)
        self.head = nn.Parameter(torch.randn(L, M, d, width) * 0.5 / math.sqrt(d + width * r))
        self.scaler_A = nn.ParameterDict({m: torch.ones(L, r, 1) for m in targets.modules})
        self.scaler_B = nn.ParameterDict({m: torch.zeros(L, r, 1) for m in targets.modules})
        self.bias_A, self.bias_B = nn.ParameterDict(), nn.ParameterDict()
        for m in targets.modules if config.use_bias else ():
            d_in, d_out = targets.d_in[m], targets.d_out[m]
            self.bias_A[m] = nn.Parameter(torch.randn(L, r, d_in) * 0.2 / math.sqrt(d_in * r))
            self.bias_B[m] = nn.Parameter(torch.zeros(L, r, d_out))
        if config.chunk_gate:
            self.gate_weight = nn.Parameter(torch.zeros(L, M, d))
            self.gate_bias = nn.Parameter(torch.full((L, M), self.GATE_BIAS))
        if config.d_copy:
            self.n_said = d_model // 2 if config.say_next else 0
            self.copy = CopyPath(d_model, d, config.d_copy, self.n_said, config.perceiver.norm_eps)
            w, spread = config.d_copy // 2, 0.5 / math.sqrt(config.d_copy // 2 + width * r)
            d_ins, d_outs = (max(sizes.values()) for sizes in (targets.d_in, targets.d_out))
            self.copy_A = nn.Parameter(torch.randn(L, M, w, d_ins) * spread)
            self.copy_B = nn.Parameter(torch.randn(L, M, config.d_copy - w, d_outs) * spread)
            if config.say_next:
                self.copy_gain = nn.Parameter(torch.ones(L, M, r, 1))
        if config.ridge:
            penalty = torch.full((L, M), max(config.ridge_start, LEAST_PENALTY))
            self.scaler_ridge = nn.Parameter(penalty.log())

    def read(
        self, features: Float[Tensor, "tok d_model"], segments: Segments
    ) -> Float[Tensor, "chunk n_out d_read"]:
        """Summarise each chunk of one encoder feature, ``d_read = d_latent + d_copy + n_said``."""
        latents = self.perceiver(features, segments)
        if not self.config.d_copy:
            return latents
        return torch.cat([latents, self.copy(latents, features, segments)], -1)

    def needs(self, index: int) -> bool:
        """Tell whether the encoder's feature ``index`` is read: layers not adapted need none."""
        return not self.per_layer_features or index in self.targets.layers

    def assemble(
        self, latents: Sequence[Float[Tensor, "chunk n_out d_read"] | None]
    ) -> Float[Tensor, "chunk layer mod r d_read"]:
        """Arrange what was read of each encoder feature (None: `needs` not) by layer, module, rank.

        Raises ValueError when the encoder's features and the adapted layers do not match.
        """
        shape = (len(self.targets.modules), self.config.lora.rank)
        if not self.per_layer_features:
            (only,) = latents
            assert only is not None
            return only.unflatten(1, (len(self.targets.layers), *shape))
        if len(latents) <= max(self.targets.layers):
            raise ValueError(
                f"the encoder gave {len(latents)} layers' features, "
                f"but layer {max(self.targets.layers)} of the base is adapted"
            )
        chosen = [x for i in self.targets.layers if (x := latents[i]) is not None]
        assert len(chosen) == len(self.targets.layers)
        return torch.stack(chosen, 1).unflatten(2, shape)

    def generate(self, embeddings: Float[Tensor, "chunk layer mod r d_read"]) -> ChunkLora:
        """Turn embeddings into LoRA factors of every chunk, without merging."""
        d_copy, n_said = self.config.d_copy, self.n_said
        x, copied, said = embeddings.split((self.head.shape[2], d_copy, n_said), -1)
        for mlp in self.mlps:
            x = mlp(x)
        u = F.normalize(x, dim=-1)
        gate = None
        if self.config.chunk_gate:
            score = torch.einsum("clmrd,lmd->clmr", u.float(), self.gate_weight)
            gate = torch.sigmoid(score * math.sqrt(u.shape[-1]) + self.gate_bias[None, :, :, None])
        wide = torch.promote_types(u.dtype, torch.float32)
        to_A, to_B = F.normalize(copied, dim=-1).to(wide).tensor_split((d_copy // 2,), -1)
        A, B = {}, {}
        for i, m in enumerate(self.targets.modules):
            d_in, d_out = self.targets.d_in[m], self.targets.d_out[m]
            head_A, head_B = self.head[:, i, :, : d_in + d_out].to(u).split((d_in, d_out), -1)
            own = torch.einsum("clrd,ldf->clrf", u[:, :, i], head_A).to(wide)
            if d_copy:
                own += torch.einsum("clrw,lwd->clrd", to_A[:, :, i], self.copy_A[:, i, :, :d_in])
            A[m] = own.mul_(self.scaler_A[m])
            own = torch.einsum("clrd,ldf->clrf", u[:, :, i], head_B).to(wide)
            if d_copy:
                own += torch.einsum("clrw,lwd->clrd", to_B[:, :, i], self.copy_B[:, i, :, :d_out])
            if n_said:
                own += F.normalize(said[:, :, i].to(wide), dim=-1) * self.copy_gain[:, i]
            B[m] = own.mul_(self.scaler_B[m])
            if gate is not None:
                B[m] = B[m] * gate[:, :, i, :, None]
        return ChunkLora(A, B)

    def forward(
        self, features: Sequence[Float[Tensor, "tok d_model"]], segments: Segments
    ) -> ChunkLora:
        """Compute A and B of every chunk from all of the encoder's features."""
        read = [self.read(f, segments) if self.needs(i) else None for i, f in enumerate(features)]
        return self.generate(self.assemble(read))

    @property
    def penalties(self) -> Factors:
        """Penalty on each layer's rows for each module; none without ``config.ridge``."""
        if not self.config.ridge:
            return {}
        learned = self.scaler_ridge.exp()
        return {m: learned[:, i] for i, m in enumerate(self.targets.modules)}

    def compose(
        self,
        chunks: ChunkLora,
        n_chunks: Iterable[int],
        weights: Tensor | None = None,
        *,
        apart: bool = False,
    ) -> LoraBatch:
        """Join each document's chunks along the rank and append the bias once (spec section 4).

        ``apart`` says that ``config.ridge`` has been applied to these factors already.
        """
        return compose(
            chunks,
            tuple(n_chunks),
            layers=self.targets.layers,
            multiplier=self.config.lora.multiplier,
            bias=(dict(self.bias_A), dict(self.bias_B)) if self.config.use_bias else None,
            weights=weights,
            dropout=self.config.lora.dropout,
            penalties=None if apart else self.penalties,
        )
