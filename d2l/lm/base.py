"""Frozen base models by name: `KNOWN_BASES`, a Hugging Face name, or a local folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..home import weights_home
from .chat import chat_affixes, render_chat
from .quiet import quiet_transformers
from .smollm2 import smollm2_dir

__all__ = [
    "KNOWN_BASES",
    "SHIPPED_BASES",
    "LanguageModel",
    "chat_affixes",
    "load_base",
    "native_dtype",
    "render_chat",
    "shipped_base",
]

SHIPPED_BASES = ("tiny", "tiny-qa")
KNOWN_BASES = (*SHIPPED_BASES, "smollm2-135m")
_HUB_TIMEOUT_S = 10.0
_ESSENTIALS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model with its tokenizer, in evaluation mode."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def window(self) -> int:
        """Longest sequence that the model was made for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model can embed."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identify the base, whatever dtype it is loaded in.

        sha256 over the architecture's sizes and over name, shape and all values of every
        parameter, rounded to bf16 (so a float32 and a bf16 copy of one checkpoint agree; two
        checkpoints that differ by less than that rounding do too).  Buffers, tokenizer, chat
        template and generation settings are not covered.  A quantised model has a fingerprint of
        its own, unless this was read before the model was quantised in place.  Cost: 0.4 s for
        135 M parameters.
        """
        return fingerprint_of(self.model)


def load_base(
    name_or_path: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    nf4: bool = False,
) -> LanguageModel:
    """Load a frozen base by name: one of ``KNOWN_BASES``, a folder, or a hub name ``org/model``.

    ``attn_implementation`` None takes the fastest that the architecture allows.
    ``nf4`` quantises to 4 bits as the published encoder is (NF4, double quantisation) and
    computes in ``dtype``; it needs bitsandbytes.
    Code from a model's repository is never run.  Raises ValueError for an unknown name and for
    damaged files, OSError when a model cannot be fetched.

    >>> load_base("tiny").window
    512
    """
    source, on_hub = _locate(name_or_path)
    try:
        if on_hub and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=_HUB_TIMEOUT_S)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=_nf4(dtype) if nf4 else None,
                device_map={"": device} if nf4 else None,
            )
    except Exception as error:
        raise _explained(error, name_or_path, on_hub) from error
    (model if nf4 else model.to(device)).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, name_or_path)


def native_dtype(device: str | torch.device, wanted: torch.dtype) -> torch.dtype:
    """Return ``wanted``, or float32 where ``device`` is a CPU that can only emulate bfloat16.

    Without the instructions (AVX512-BF16, AMX, Arm's BF16) a bf16 product takes about 8 times as
    long as a float32 one.

    >>> native_dtype("cpu", torch.float32)
    torch.float32
    """
    if torch.device(device).type != "cpu" or wanted != torch.bfloat16:
        return wanted
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return wanted if native else torch.float32


def shipped_base(name: str) -> Path:
    """Return the folder of one of ``SHIPPED_BASES``, which lie in the repository."""
    return weights_home() / "base" / name


def fingerprint_of(model: Any) -> str:
    """Hash a model as ``LanguageModel.fingerprint`` describes."""
    config = model.config.get_text_config().to_dict()
    sizes = {key: config.get(key) for key in _ESSENTIALS}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        plain = weight.data if type(weight.data) is torch.Tensor else weight.data.dequantize()
        rounded = plain.to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _locate(name: str) -> tuple[str, bool]:
    """Return a folder, or a hub name and True."""
    if name == "smollm2-135m":
        return str(smollm2_dir()), False
    folder = shipped_base(name) if name in SHIPPED_BASES else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder), False
    if name in SHIPPED_BASES:
        raise FileNotFoundError(f"base {name} is not in {folder}; train it or restore the folder")
    if folder.is_dir():
        raise ValueError(f"{name!r} is a folder without config.json, so not a Hugging Face model")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"unknown base model {name!r}; {_WAYS}")
    return name, True


def _explained(error: Exception, name: str, on_hub: bool) -> Exception:
    """Turn what transformers says into the value, the rule and the way out."""
    if not on_hub:
        return ValueError(
            f"the files of base model {name!r} cannot be read ({error}); restore or fetch them"
        )
    causes = list(_chain(error))
    if any(isinstance(e, GatedRepoError) for e in causes):
        return OSError(f"{name!r} is gated: accept its licence on the hub and log in, then retry")
    if any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in causes):
        return ValueError(f"unknown base model {name!r}; {_WAYS}")
    if any(isinstance(e, httpx.HTTPError | OSError) for e in causes):
        return OSError(
            f"base model {name!r} could not be fetched from the Hugging Face hub ({causes[-1]}); "
            f"check the network, or give a local folder; {_WAYS}"
        )
    return ValueError(f"base model {name!r} cannot be loaded: {error}")


def _chain(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_WAYS = f"known: {', '.join(KNOWN_BASES)}, a local folder, or a Hugging Face name like org/model"
