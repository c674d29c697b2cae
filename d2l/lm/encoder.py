"""Run a frozen decoder over chunks and hand out the activations that the Perceiver reads.

The encoder is a view of a model: a truncated list of the same layers, each behind a tap, so it
stops at the last layer that is needed and stores nothing that its consumer does not keep.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from d2l_kernels import Segments
from torch import Tensor, nn

from ..config import EncoderConfig
from .hooks import applied, decoder_of
from .rows import row_each, row_together

Sink = Callable[[Tensor], None]

_BY_PLACE = re.compile("mamba|ssm|conv|linear_|lru_|window_size|chunk_size")
"""Settings of layers that go by the place in a row: recurrences, convolutions, local attention."""


class ContextEncoder:
    """Per-layer activations, early exit or embeddings of a frozen decoder (spec section 1).

    per_layer_activations: the input of each kept layer, then the final norm's output, so L features
    for L layers.  early_exit: one feature, the final norm of the state after ``layer_idx`` layers.
    embed_only: the input of layer 0; no layer runs.  With ``unit_scale`` every state is scaled to
    unit mean square.  With ``next_token`` every feature is joined with the embedding of the token
    that follows (so scaled in either case; zero at the end of a chunk).

    ``layout`` "packed" needs flash attention or transformers' own packed masks, "padded" works
    everywhere; both give the same features.  Raises ValueError for a layer that is not there.
    """

    def __init__(self, model: Any, config: EncoderConfig) -> None:
        self.model, self.config = model, config
        decoder, name = decoder_of(model)
        total = len(getattr(decoder, name))
        if config.kind == "per_layer_activations":
            n_run = total - 1 if config.last_layer is None else config.last_layer - 1
        elif config.kind == "early_exit":
            n_run = total if config.layer_idx is None else config.layer_idx
        else:
            n_run = 0
        if not 0 <= n_run <= total:
            raise ValueError(f"the encoder has {total} layers, {config} asks for {n_run}")
        self.n_layers_run = n_run
        width = model.get_input_embeddings().weight.shape[1]
        self.d_model = width * (1 + config.next_token)
        self.layout = "packed" if "flash" in str(model.config._attn_implementation) else "padded"

    def __call__(
        self,
        chunks: Sequence[Tensor],
        sink: Sink,
        *,
        layout: str | None = None,
        per_row: Sequence[int] = (),
    ) -> Segments:
        """Encode ``chunks`` (1-D token ids) and call ``sink(feature)`` once per feature, in order.

        A feature has shape (tok, d_model), chunks one after another as the returned `Segments`
        says.  The model runs without gradient; ``sink`` runs in the caller's gradient mode.

        The padded layout has a row for each chunk, or for as many at a time as ``per_row`` says:
        what neighbours begin with is then computed once (where `shares` allows it).

        Raises ValueError for an empty list or an empty chunk.
        """
        segments = Segments.of(len(c) for c in chunks)
        if not chunks or min(segments.lengths) == 0:
            raise ValueError(
                f"every chunk needs at least one token, got lengths {segments.lengths}"
            )
        device = self.model.get_input_embeddings().weight.device
        keep = None
        if (layout or self.layout) == "packed":
            positions = torch.cat([torch.arange(n) for n in segments.lengths])[None]
            inputs = {"input_ids": torch.cat(list(chunks))[None], "position_ids": positions}
        elif len(per_row) == len(chunks) or not per_row:
            inputs, keep = row_each(chunks, segments)
        else:
            inputs, keep = row_together(chunks, per_row, self.model.dtype)
        inputs = {name: t.to(device) for name, t in inputs.items()}
        keep = None if keep is None else keep.to(device)
        grad = torch.is_grad_enabled()
        after = self._following(torch.cat(list(chunks)).to(device), segments)

        def emit(hidden: Tensor) -> None:
            flat = hidden.flatten(0, 1)
            flat = flat if keep is None else flat.index_select(0, keep)
            if self.config.unit_scale:
                flat = F.rms_norm(flat, flat.shape[1:])
            with torch.set_grad_enabled(grad):
                sink(flat if after is None else torch.cat([flat, after.to(flat.dtype)], 1))

        with torch.no_grad(), applied(self.model, None):
            self._run(inputs, emit)
        return segments

    @functools.cached_property
    def _branches(self) -> bool:
        """Whether the end of a chunk is the same behind another chunk in its row: tried on two.

        Its error must be small against what seeing the other chunk would do.
        """
        one, other = torch.arange(8), torch.tensor([0, 1, 7, 6, 5, 4, 3, 2])
        ends: list[Tensor] = []
        for chunks, per_row in (
            ([one, other], ()),
            ([one, other], (2,)),
            ([torch.cat([one, other[2:]])], ()),
        ):
            found: list[Tensor] = []
            try:
                self(chunks, found.append, layout="padded", per_row=per_row)
            except (TypeError, ValueError, RuntimeError):
                return False
            ends.append(found[-1][-6:].float())
        apart, together, seeing = ends
        return bool((apart - together).norm() <= 0.05 * (apart - seeing).norm())

    def shares(self, longest: int) -> bool:
        """Tell whether chunks of up to ``longest`` tokens can share a row of the padded layout.

        Attention must take a mask of ours and reach as far as the chunks do, and no layer may carry
        anything else from place to place.
        """
        config = self.model.config.get_text_config()
        reach = getattr(config, "sliding_window", None) or math.inf
        by_place = any(_BY_PLACE.search(k) and v for k, v in config.to_dict().items())
        takes_mask = self.model.config._attn_implementation in ("sdpa", "eager")
        fits = self.layout == "padded" and takes_mask and longest <= reach and not by_place
        return fits and self._branches

    @torch.no_grad()
    def _following(self, ids: Tensor, segments: Segments) -> Tensor | None:
        if not self.config.next_token:
            return None
        table = self.model.get_input_embeddings().weight
        after = F.rms_norm(F.embedding(ids.roll(-1), table).float(), table.shape[1:])
        after[[end - 1 for end in segments.offsets[1:]]] = 0
        return after

    def _run(self, inputs: dict[str, Tensor], emit: Sink) -> None:
        decoder, name = decoder_of(self.model)
        layers = getattr(decoder, name)[: self.n_layers_run]
        if self.config.kind == "per_layer_activations":
            taps = [_Tap(layer, emit) for layer in layers]
        elif self.config.kind == "early_exit":
            taps = list(layers)
        else:
            taps = [_Tap(None, emit)]
        view = copy.copy(decoder)
        view._modules = {**decoder._modules, name: nn.ModuleList(taps)}
        out = view(**inputs, use_cache=False)
        if self.config.kind != "embed_only":
            emit(out.last_hidden_state)


class _Tap(nn.Module):
    """Show the hidden state that enters a layer, then run the layer (or pass the state on)."""

    def __init__(self, layer: nn.Module | None, emit: Sink) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["emit"] = layer, emit

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if inner is None:
            raise AttributeError(name)
        return getattr(inner, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.emit(hidden)
        inner = self.__dict__["inner"]
        return hidden if inner is None else inner(hidden, *args, **kwargs)
