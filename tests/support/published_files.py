"""Write files in the released format; stand-ins for its classes are pickled under their names."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch

BASE = "org/base"

NAMES = {
    "HypernetConfig": "ctx_to_lora.modeling.hypernet",
    "AggregatorConfig": "ctx_to_lora.modeling.aggregator",
    "CtxEncoderArguments": "ctx_to_lora.configs",
    "LoraConfig": "peft.tuners.lora.config",
    "LoraRuntimeConfig": "peft.tuners.lora.config",
}


def instance(name: str, **fields):
    made = type(name, (), {"__module__": NAMES[name], "__qualname__": name})()
    vars(made).update(fields)
    return made


class Registered:
    """Let pickle find stand-ins under their published module names while writing."""

    def __init__(self, *objects) -> None:
        self.classes = [type(o) for o in objects]

    def __enter__(self) -> None:
        self.before = dict(sys.modules)
        for cls in self.classes:
            parts = cls.__module__.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                sys.modules[name] = type(sys)(name)
        for cls in self.classes:
            setattr(sys.modules[cls.__module__], cls.__name__, cls)

    def __exit__(self, *_) -> None:
        for name in [n for n in sys.modules if n.startswith(("ctx_to_lora", "peft"))]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in self.before.items() if n not in sys.modules})


def write(path: Path, config: dict, state: dict, *, drop: tuple[str, ...] = (), **extra) -> Path:
    lora = instance(
        "LoraConfig", r=config["lora_r"], lora_alpha=config["lora_alpha"], lora_dropout=0.0,
        target_modules=set(config["target_modules_sorted"]),
        runtime_config=instance("LoraRuntimeConfig", ephemeral_gpu_offload=False),
    )  # fmt: skip
    aggregator = instance("AggregatorConfig", **config["aggregator"])
    fields = {
        "latent_size": config["latent_size"], "per_rank_gen": True, "use_bias": config["use_bias"],
        "per_layer_processing": config["per_layer_processing"], "dropout_rate": 0.0,
        "num_pre_head_layers": config["num_pre_head_layers"], "extra_modules": None,
        "layer_indices": torch.arange(config["aggregator"]["num_layers"]),
        "feature_sizes": tuple(config["feature_sizes"]), "lora_config": lora,
        "aggregator_config": aggregator,
    }  # fmt: skip
    own = instance("HypernetConfig", **{k: v for k, v in fields.items() if k not in drop})
    args = instance("CtxEncoderArguments", **config["ctx_encoder_args"])
    data = OrderedDict(state)
    data.update(base_model_name_or_path=BASE, hypernet_config=own, ctx_encoder_args=args)
    data.update(extra)
    with Registered(own, aggregator, args, lora, lora.runtime_config):
        torch.save(data, path)
    return path
