"""Released Doc-to-LoRA checkpoints: read `pytorch_model.bin`, rename its tensors, convert it.

The pickle is read with `weights_only=True` and empty stand-ins for its six configuration classes;
nothing that it names is imported or run (spec section 11).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import SavedHypernet
from .chunking import PUBLISHED_CHUNK_PROBS
from .config import ChunkConfig, HypernetConfig, from_dict
from .hypernet import Hypernet, TargetShapes

PUBLISHED_WEIGHTS = "pytorch_model.bin"
_CLASSES = (
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.configs.CtxEncoderArguments",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
    "peft.utils.peft_types.PeftType",
    "peft.utils.peft_types.TaskType",
)
_RENAMED = (
    (r"perceiver\.projection\.(\w+)", r"aggregator.perceiver.modality_projection.\1_proj"),
    (r"perceiver\.(\w+)\.latents", r"aggregator.perceiver.\1.latents_q"),
    (r"perceiver\.(\w+)\.norm", r"aggregator.perceiver.\1.layernorm"),
    (r"perceiver\.(\w+)\.blocks", r"aggregator.perceiver.\1.layers"),
    (r"\.([qkvo])\.weight", r".self_attn.\1_proj.weight"),
    (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.norm_latents\.", ".input_latents_layernorm."),
    (r"\.norm_context\.", ".input_context_layernorm."),
    (r"\.norm_attended\.", ".post_attention_layernorm."),
    (r"\.norm_mlp_in\.", ".pre_ff_layernorm."),
    (r"\.norm_mlp_out\.", ".post_ff_layernorm."),
    (r"^head$", "head.weight"),
)
_MLP_SLOTS = {"norm_in": (0, 0), "1": (1, 2), "2": (3, 5), "norm_out": (4, 6)}


@dataclasses.dataclass(frozen=True)
class Published:
    """A released checkpoint in our terms; ``state`` fits ``Hypernet(config, targets, d_model)``."""

    config: HypernetConfig
    targets: TargetShapes
    d_model: int
    state: dict[str, Tensor]
    base_name: str
    quantized_encoder: bool = False

    def hypernet(self) -> Hypernet:
        """Build the hypernetwork with these weights, in evaluation mode."""
        built = Hypernet(self.config, self.targets, self.d_model)
        built.load_state_dict(self.state)
        return built.eval()

    def saved(self, source: str) -> SavedHypernet:
        """Return it as one of our checkpoints; ``source`` names the file.

        The file says nothing about chunks or the base's weights: the chunk lengths and the most
        chunks are those of the published recipe (spec section 8), the base is known by name alone.
        """
        facts = {"imported_from": source, "quantized_encoder": self.quantized_encoder}
        most = max(PUBLISHED_CHUNK_PROBS)
        return SavedHypernet(self.hypernet(), ChunkConfig(), self.base_name, None, facts, most)


def read_published(path: str | Path) -> Published:
    """Read a released ``pytorch_model.bin``; tensors come to the CPU whatever they were saved on.

    An encoder named in the file becomes ``config.encoder.model``, None where it is the base itself.

    Raises FileNotFoundError; ValueError for a damaged file, for any class in the pickle beyond the
    known configurations, and as `convert` does.
    """
    data = _unpickle(Path(path))
    try:
        own, args = data.pop("hypernet_config"), data.pop("ctx_encoder_args")
        base_name = data.pop("base_model_name_or_path")
        lora = own["lora_config"]
        config = own | {
            "lora_r": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            "target_modules_sorted": sorted(lora["target_modules"]),
            "aggregator": own["aggregator_config"],
            "ctx_encoder_args": args,
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a released checkpoint: it lacks {error}") from error
    try:
        converted, state = convert(data, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if converted.encoder.model == base_name:
        encoder = dataclasses.replace(converted.encoder, model=None)
        converted = dataclasses.replace(converted, encoder=encoder)
    quantized = bool(args.get("quantize_ctx_encoder"))
    return Published(converted, shapes(config), _width(config), state, str(base_name), quantized)


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[HypernetConfig, dict[str, Tensor]]:
    """Translate published options and tensors to our config and `Hypernet`'s state dict.

    ``config`` holds the published options by name: lora_r, lora_alpha (the raw multiplier),
    lora_dropout, target_modules_sorted, latent_size, feature_sizes ({module: in}, {module: out}),
    per_layer_processing, per_rank_gen, num_pre_head_layers, use_bias, dropout_rate, layer_indices,
    and the mappings aggregator and ctx_encoder_args.  Options without effect in the published code
    are ignored; a missing num_pre_head_layers is 4 and a missing use_bias True, as in older files.

    Raises ValueError for an option that cannot be honoured, and for a tensor that is missing,
    unexpected, of another shape, not finite, or unequal to one that it shares weights with.
    """
    ours, targets, d_model = hypernet_config(config), shapes(config), _width(config)
    with torch.device("meta"):
        expected = Hypernet(ours, targets, d_model)
    tensors = {key.replace("_orig_mod.", ""): t for key, t in state.items()}
    out: dict[str, Tensor] = {}
    first_key: dict[Tensor, tuple[str, str]] = {}
    missing = []
    for name, parameter in expected.named_parameters(remove_duplicate=False):
        key, shape = _origin(name, tuple(parameter.shape), ours, len(targets.modules))
        if key not in tensors:
            missing.append(key)
            continue
        value = _checked(key, tensors.pop(key), shape)
        if _is_linear(name, ours):
            value = value.mT
        out[name] = value.reshape(parameter.shape).float().contiguous()
        alias, other = first_key.setdefault(parameter, (name, key))
        if not torch.equal(out[alias], out[name]):
            raise ValueError(f"tensors {other!r} and {key!r} share weights but differ")
    if missing or tensors:
        raise ValueError(
            f"the tensors do not fit the configuration: missing {_few(missing)}; "
            f"unexpected {_few(tensors)}"
        )
    return ours, out


def to_published(hypernet: Hypernet, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of ``hypernet``, parameters or their gradients, to the published layout."""
    config, n_modules = hypernet.config, len(hypernet.targets.modules)
    out = {}
    for name, value in named.items():
        key, shape = _origin(name, tuple(value.shape), config, n_modules)
        out[key] = (value.mT if _is_linear(name, config) else value).reshape(shape)
    return out


def hypernet_config(config: Mapping[str, Any]) -> HypernetConfig:
    """Translate the published options that `convert` takes."""
    try:
        return _translate(config, config["aggregator"], config["ctx_encoder_args"])
    except KeyError as error:
        raise ValueError(f"the checkpoint's configuration lacks {error}") from error


def shapes(config: Mapping[str, Any]) -> TargetShapes:
    """Read layers and linears from the published options; layers default to all of the base."""
    d_in, d_out = config["feature_sizes"]
    modules = tuple(config["target_modules_sorted"])
    n_layers = config["aggregator"]["num_layers"]
    layers = config.get("layer_indices")
    layers = range(n_layers) if layers is None else layers
    if {*modules} != {*d_in} or {*modules} != {*d_out} or len(layers) != n_layers:
        raise ValueError(
            f"the checkpoint contradicts itself: target modules {modules} of {n_layers} layers, "
            f"feature_sizes of {sorted({*d_in} | {*d_out})}, layer_indices {list(layers)}"
        )
    return TargetShapes(
        tuple(int(i) for i in layers),
        {m: int(d_in[m]) for m in sorted(modules)},
        {m: int(d_out[m]) for m in sorted(modules)},
    )


def _translate(
    config: Mapping[str, Any], aggregator: Mapping[str, Any], args: Mapping[str, Any]
) -> HypernetConfig:
    kind, targets = args["ctx_encoder_type"], shapes(config)
    if not (config.get("per_rank_gen", True) and aggregator.get("per_rank_gen", True)):
        raise ValueError(
            "per_rank_gen=False cannot be loaded: the published code itself fails with it (its "
            "head expects an embedding for every rank), so no trained weights of that kind exist"
        )
    required = {
        "aggregator_type": "perceiver",
        "num_extra_modules": 0,
        "output_size": config["latent_size"],
        "lora_r": config["lora_r"],
        "num_modules": len(targets.modules),
        "layer_to_layer_ctx_encoder": kind == "per_layer_activations",
    }
    given = {name: aggregator.get(name, value) for name, value in required.items()}
    given["extra_modules"] = config.get("extra_modules") or None
    for name, value in given.items():
        if value != required.get(name):
            raise ValueError(
                f"cannot load a checkpoint with {name}={value!r}: it must be {required.get(name)!r}"
            )
    per_layer = config["per_layer_processing"]
    all_layers = targets.layers == tuple(range(len(targets.layers)))
    options = {
        "encoder": {
            "kind": kind,
            "layer_idx": args.get("layer_idx"),
            "last_layer": args.get("ctx_encoder_last_layer"),
            "model": args.get("ctx_encoder_model_name_or_path"),
        },
        "perceiver": {
            "d_latent": config["latent_size"],
            "n_latents": aggregator["n_latent_queries"],
            "n_blocks": aggregator["num_blocks"],
            "n_self_attn_per_block": aggregator.get("num_self_attn_per_block", 0),
            "shared_weights": aggregator.get("shared_weights", False),
        },
        "lora": {
            "rank": config["lora_r"],
            "scale": config["lora_alpha"],
            "target_modules": targets.modules,
            "layers": None if all_layers else targets.layers,
            "dropout": config.get("lora_dropout") or 0.0,
        },
        "n_pre_head_layers": config.get("num_pre_head_layers", 4),
        "per_layer_processing": per_layer,
        "use_bias": config.get("use_bias", True),
        "mlp_dropout": 0.0 if per_layer else config.get("dropout_rate") or 0.0,
    }
    return from_dict(HypernetConfig, options)


def _width(config: Mapping[str, Any]) -> int:
    return int(config["aggregator"]["feature_size"])


def _origin(
    name: str, shape: tuple[int, ...], config: HypernetConfig, n_modules: int
) -> tuple[str, tuple[int, ...]]:
    """Return the published key of our parameter ``name``, and the shape that it has there."""
    mlp = re.fullmatch(r"mlps\.(\d+)\.(?:(norm_\w+)\.(\w+)|([Wb])([12]))", name)
    if mlp:
        index, norm, leaf, letter, which = mlp.groups()
        own, shared = _MLP_SLOTS[norm or which]
        slot = f"layers.{own}" if config.per_layer_processing else f"mlp.{shared}"
        leaf = leaf or {"W": "weight", "b": "bias"}[letter]
        if letter == "b":
            shape = (1, shape[0], 1, 1, shape[1]) if config.per_layer_processing else shape[1:]
        elif letter == "W" and not config.per_layer_processing:
            shape = (shape[2], shape[1])
        return f"layers.{index}.{slot}.{leaf}", shape
    if name.startswith("scaler_"):
        return name, (1, *shape)
    if name == "head" and n_modules == 1:
        shape = (shape[0], *shape[2:])
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name, shape


def _is_linear(name: str, config: HypernetConfig) -> bool:
    """Say whether a weight of ours is stored as torch.nn.Linear stores it, (out, in)."""
    return not config.per_layer_processing and bool(re.fullmatch(r"mlps\.\d+\.W[12]", name))


def _checked(key: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{key!r} must be a floating-point tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"tensor {key!r} has shape {tuple(value.shape)}, expected {shape}")
    if not value.isfinite().all():
        raise ValueError(f"tensor {key!r} holds values that are not finite")
    return value


def _few(names: Iterable[str]) -> str:
    shown = [repr(n) for n in names]
    rest = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + rest or "none"


def _unpickle(path: Path) -> dict[str, Any]:
    """Load the pickle with stand-ins for its known classes; return plain values and tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a pytorch_model.bin")
    stubs = {name: _stub(name) for name in _CLASSES}
    try:
        foreign = {*torch.serialization.get_unsafe_globals_in_checkpoint(str(path))} - {
            *_CLASSES, "__builtin__.set", "builtins.set",
        }  # fmt: skip
        if not foreign:
            allowed = [(stub, name) for name, stub in stubs.items()]
            with torch.serialization.safe_globals([*allowed, set]):
                data = torch.load(path, weights_only=True, map_location="cpu")
            data = _plain(data, tuple(stubs.values()))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise ValueError(f"{path} cannot be read as a released checkpoint: {error}") from error
    if foreign:
        raise ValueError(
            f"{path} names {_few(sorted(foreign))}, which no released checkpoint needs; refused, "
            "because reading it could run code"
        )
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a released checkpoint")
    return data


def _stub(name: str) -> type:
    module, _, own = name.rpartition(".")
    bases = (str,) if own.endswith("Type") else ()
    return type(own, bases, {"__module__": module})


def _plain(value: Any, stubs: tuple[type, ...]) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, stubs):
        value = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: _plain(v, stubs) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return [_plain(v, stubs) for v in value] if isinstance(value, list | tuple) else value
