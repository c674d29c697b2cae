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
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..home import repo_root
from .chat import chat_affixes, render_chat
from .quiet import quiet_transformers
from .smollm2 import smollm2_dir

__all__ = [
    "KNOWN_BASES",
    "LanguageModel",
    "chat_affixes",
    "load_base",
    "native_dtype",
    "render_chat",
    "tiny_dir",
]

TINY_BASES = ("tiny", "tiny-qa")
KNOWN_BASES = (*TINY_BASES, "smollm2-135m")
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

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identify the base, whatever dtype it is loaded in.

        sha256 over the architecture's sizes and over name, shape and all values of every
        parameter, rounded to bf16 (so a float32 and a bf16 copy of one checkpoint agree; two
        checkpoints that differ by less than that rounding do too).  Buffers, tokenizer, chat
        template and generation settings are not covered.  Cost: 0.4 s for 135 M parameters.
        """
        return fingerprint_of(self.model)


def load_base(
    name_or_path: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> LanguageModel:
    """Load a frozen base by name: one of ``KNOWN_BASES``, a folder, or a hub name ``org/model``.

    ``attn_implementation`` None takes the fastest that the architecture allows.
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
                source, dtype=dtype, attn_implementation=attn_implementation
            )
    except Exception as error:
        raise _explained(error, name_or_path, on_hub) from error
    model.to(device).eval().requires_grad_(False)
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


def tiny_dir(name: str = "tiny") -> Path:
    """Return the folder of a tiny base that ships with the repository, one of ``TINY_BASES``."""
    return repo_root() / "papers" / "doc-to-lora" / "weights" / "base" / name


def fingerprint_of(model: Any) -> str:
    """Hash a model as ``LanguageModel.fingerprint`` describes."""
    config = model.config.get_text_config().to_dict()
    sizes = {key: config.get(key) for key in _ESSENTIALS}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def _locate(name: str) -> tuple[str, bool]:
    """Return a folder, or a hub name and True."""
    if name == "smollm2-135m":
        return str(smollm2_dir()), False
    folder = tiny_dir(name) if name in TINY_BASES else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder), False
    if name in TINY_BASES:
        raise FileNotFoundError(f"the base {name} is not in {folder}; train it or restore it")
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
