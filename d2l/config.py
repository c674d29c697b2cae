"""Frozen dataclasses, one per component, and the three operations on them.

A run is described by one nested dataclass.  Scales differ by dotted-key overrides, so the
difference between two scales is data that can be printed.  No YAML, no global state.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")

EncoderKind = Literal["per_layer_activations", "early_exit", "embed_only"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Which activations of the frozen encoder the Perceiver reads (spec section 1).

    ``layer_idx`` belongs to ``early_exit`` (layers that run; None runs all), ``last_layer`` to
    ``per_layer_activations`` (``k`` keeps the first ``k - 1`` layers; None keeps ``L - 1``).
    ``model`` names another encoder than the base; None shares the base's own weights.
    Two are ours: ``next_token`` joins every feature with the embedding of the token that follows,
    ``unit_scale`` scales every state to unit mean square before, without which the embedding
    drowns in the states of a trained model (mean square 35 to 800 in SmolLM2).
    """

    kind: EncoderKind = "per_layer_activations"
    layer_idx: int | None = None
    last_layer: int | None = None
    model: str | None = None
    next_token: bool = False
    unit_scale: bool = False


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the Perceiver; the published system fixes all but the first five."""

    d_latent: int = 512
    n_latents: int = 8
    n_blocks: int = 8
    n_self_attn_per_block: int = 0
    shared_weights: bool = False
    n_heads: int = 16
    n_kv_heads: int = 4
    d_head: int = 128
    mlp_factor: int = 4
    projection_factor: int = 4
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What the hypernetwork generates: rank of one chunk, targets, and the raw multiplier.

    ``scale`` multiplies delta W directly (never divided by the rank); None stands for the
    published ``2 r^1.5``.  ``layers`` None means every layer of the base.
    """

    rank: int = 8
    scale: float | None = None
    target_modules: tuple[str, ...] = ("down_proj",)
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    @property
    def multiplier(self) -> float:
        """The factor on delta W."""
        return 2.0 * self.rank**1.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class HypernetConfig:
    """The trainable part.  ``chunk_gate`` is ours: a learned factor in (0, 1) per chunk,
    layer, module and rank, so that a chunk with nothing to say can stay silent.  ``d_copy`` is
    ours too: the width of a path by which every rank row reads one place of the text directly (see
    `hypernet.CopyPath`); 0 leaves it out.  With ``say_next`` what it reads is also said as it is.
    With ``ridge``, ours as well, a document's rows that are alike do not speak together
    (`d2l.ridge`), by a penalty that training starts from ``ridge_start`` (.01 at least).
    ``mlp_dropout`` acts in training, before both matrices of the pre-head MLPs.
    """

    encoder: EncoderConfig = EncoderConfig()
    perceiver: PerceiverConfig = PerceiverConfig()
    lora: LoraConfig = LoraConfig()
    n_pre_head_layers: int = 1
    per_layer_processing: bool = True
    use_bias: bool = True
    chunk_gate: bool = False
    d_copy: int = 0
    say_next: bool = False
    ridge: bool = False
    ridge_start: float = 0.03
    mlp_dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How a templated document is cut (spec section 9).

    With ``sentences``, which is ours, the encoder reads a chunk as ever, but each of its sentences
    has rows of its own, as if it were a chunk; one shorter than ``min_tok`` joins the next.
    """

    max_tok: int = 512
    min_tok: int = 25
    sentences: bool = False


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain JSON types, nested."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Rebuild ``cls`` from ``to_dict`` output; missing keys take their defaults.

    Raises ValueError for an unknown key (with the nearest known one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise ValueError(f"{cls.__name__} has no field {key!r}{_nearest(key, hints)}")
        values[key] = _coerce(value, hints[key], f"{cls.__name__}.{key}")
    return cls(**values)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return ``config`` with dotted keys replaced, e.g. ``{"hypernet.lora.rank": 4}``.

    Raises ValueError for an unknown key (naming the nearest one) or a value of another type.
    """
    for dotted, value in overrides.items():
        config = _set(config, dotted.split("."), value, dotted, config)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """List every leaf of ``config`` under its dotted key."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{field.name}.")
        else:
            out[prefix + field.name] = value
    return out


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (value in a, value in b)}`` for every leaf that differs."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(k for k in right if k not in left)]
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def config_id(config: Any) -> str:
    """Hash the canonical JSON of ``config`` to 10 hex digits, for caches and manifests."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def _set(config: Any, path: list[str], value: Any, dotted: str, root: Any) -> Any:
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(config):
        hints = typing.get_type_hints(type(config))
    head, *rest = path
    if head not in hints:
        raise ValueError(f"unknown config key {dotted!r}{_nearest(dotted, flatten(root))}")
    if rest:
        new = _set(getattr(config, head), rest, value, dotted, root)
    else:
        new = _coerce(value, hints[head], dotted)
    changed: Any = dataclasses.replace(config, **{head: new})  # pyright: ignore[reportArgumentType]
    return changed


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """Check ``value`` against ``hint``; lists become tuples and dicts become dataclasses."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        return _coerce(value, options[0], name)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(v, args[0], name) for v in value)
        if len(args) != len(value):
            raise ValueError(f"{name} must hold {len(args)} values, got {value!r}")
        return tuple(_coerce(v, a, name) for v, a in zip(value, args, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_coerce(k, args[0], name): _coerce(v, args[1], name) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected: Any = origin or hint
    wrong_bool = isinstance(value, bool) and expected is not bool
    if hint is not Any and (wrong_bool or not isinstance(value, expected)):
        shown = getattr(hint, "__name__", str(hint))
        raise ValueError(f"{name} must be {shown}, got {value!r}")
    return value


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
