"""Adapters in other forms: PEFT folders, and weights with the adapter merged in.

Only PEFT's file format is used (two files, safetensors and JSON); the package is not needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .adapter import Adapter, Source, save_tensors
from .home import replacing
from .lm.base import LanguageModel
from .lm.hooks import is_merged, sites_of

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (its `MaxLoRARanks`); it loads no greater rank."""

_PLAIN_LORA = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


@dataclass(frozen=True)
class PeftExport:
    """A folder that was written: its rank, and the error that a reduced rank brought.

    ``error`` is ``||delta W - exported delta W||_F / ||delta W||_F`` over all linears together.
    """

    folder: Path
    rank: int
    error: float


def to_peft(adapter: Adapter, folder: str | Path, rank: int | None = None) -> PeftExport:
    """Write ``adapter`` as PEFT, vLLM and others load it: multiplier, strength and weights in B.

    Without ``rank`` nothing is lost: the rank is padded with zero rows to the next of
    `VLLM_RANKS`; beyond the last it stays as it is, with a warning.  With ``rank`` every delta W
    becomes its best approximation of that rank (SVD).  Factors keep their dtype.

    Raises ValueError for a rank below 1, OSError when the folder cannot be written.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    size = rank or next((r for r in VLLM_RANKS if r >= adapter.rank), adapter.rank)
    if size > VLLM_RANKS[-1]:
        warnings.warn(
            f"vLLM loads ranks up to {VLLM_RANKS[-1]}, this one is {size}: give rank= to reduce it "
            "(the error is reported), or merge the adapter",
            UserWarning,
            stacklevel=3,
        )
    tensors, lost, total = {}, 0.0, 0.0
    for site, A, B in adapter.factors():
        if rank is not None:
            A, B, gone, whole = _reduced(A, B, rank)
            lost, total = lost + gone, total + whole
        for name, t in (("A", A), ("B", B)):
            t = F.pad(t, (0, 0, 0, size - len(t))).to("cpu", adapter.A[site.module].dtype)
            t = t.mT if name == "B" else t
            tensors[f"base_model.model.{site.path}.lora_{name}.weight"] = t.contiguous()
    config = _PLAIN_LORA | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "inference_mode": True,
        "r": size,
        "lora_alpha": size,
        "lora_dropout": 0.0,
        "target_modules": sorted({s.path.rpartition(".")[2] for s in adapter.sites}),
        "layers_to_transform": list(adapter.layers),
    }
    folder = Path(folder)
    save_tensors(folder / PEFT_WEIGHTS, tensors, {"format": "pt"})
    with replacing(folder / PEFT_CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    return PeftExport(folder, size, (lost / total) ** 0.5 if total else 0.0)


def from_peft(folder: str | Path, base: LanguageModel) -> Adapter:
    """Read a PEFT LoRA for ``base``, made by anyone, as an adapter with one document in it.

    Raises FileNotFoundError; ValueError for pickled weights, for what no plain LoRA has (DoRA,
    trained biases or whole modules, a rank per module), and for linears that ``base`` lacks.
    """
    folder = Path(folder)
    if (folder / "adapter_model.bin").exists() and not (folder / PEFT_WEIGHTS).exists():
        raise ValueError(f"{folder} holds pickled weights, which could run code: save safetensors")
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; give a PEFT adapter's folder")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text())
        tensors = load_file(folder / PEFT_WEIGHTS)
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a PEFT adapter: {error}") from error
    for option, plain in _PLAIN_LORA.items():
        if (config.get(option) or plain) != plain:
            raise ValueError(f"{folder} has {option}={config[option]!r}; only plain LoRA is read")
    known, found = {s.path: s for s in sites_of(base.model)}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        path, name = match.groups() if match else ("", "")
        site = known.get(path)
        shape = site and ((r, site.d_in) if name == "A" else (site.d_out, r))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{folder}: {key!r} fits no linear of {base.name!r} at rank {r}")
        found[site, name] = tensor if name == "A" else tensor.mT
    sites = tuple(sorted({site for site, _ in found}, key=lambda s: (s.layer, s.module)))
    layers = sorted({s.layer for s in sites})

    def stack(name: str, width: str) -> dict[str, Tensor]:
        out = {}
        for m in sorted({s.module for s in sites}):
            of = {s.layer: s for s in sites if s.module == m}
            widest = max(getattr(s, width) for s in of.values())
            rows = [found.get((of.get(i), name), torch.zeros(r, 0)).to(base.device) for i in layers]
            out[m] = torch.stack([F.pad(t, (0, widest - t.shape[1])) for t in rows])
        return out

    digest = hashlib.sha256((folder / PEFT_WEIGHTS).read_bytes()).hexdigest()
    return Adapter(
        stack("A", "d_in"),
        stack("B", "d_out"),
        sources=(Source(digest, folder.name, (), r, folded=True),),
        sites=sites,
        multiplier=alpha / (r**0.5 if config.get("use_rslora") else r),
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        hypernet_id=f"peft {digest}",
    )


class Merged:
    """An adapter inside a model's weights; `unmerge`, or leaving the ``with`` block, takes it out.

    Keeps the original weights of the linears that it changed, so unmerging is exact.
    """

    def __init__(self, model: Any, original: dict[str, Tensor]) -> None:
        self._model, self._original = model, original

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; a second call does nothing."""
        for path, weight in self._original.items():
            self._model.get_submodule(path).weight.data.copy_(weight)
        if self._original:
            self._original, self._model._d2l_merged = {}, False

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        self.unmerge()


@torch.no_grad()
def merge(adapter: Adapter, model: Any) -> Merged:
    """Add delta W to the weights of ``model``: `DocToLoRA`, `LanguageModel`, or transformers'.

    Sums are made in float32.  Until it is unmerged everybody who uses the model meets the
    document, so `DocToLoRA` takes no other adapter and reads no document meanwhile.

    Raises ValueError, before anything is changed, for a model that lacks these linears or has them
    quantised, and for one with an adapter merged already.
    """
    base = getattr(model, "base", model)
    lm: Any = base.model if isinstance(base, LanguageModel) else model
    if is_merged(lm):
        raise ValueError("an adapter is merged already: unmerge it, or merge the sum of both")
    known = set(sites_of(lm))
    for site in adapter.sites:
        if site not in known:
            raise ValueError(f"the adapter was made for {adapter.base_name!r}: no {site} here")
        weight = lm.get_submodule(site.path).weight.data
        if type(weight) is not Tensor or not weight.is_floating_point():
            raise ValueError(f"{site.path} is quantised: ask with the adapter unmerged instead")
    original = {}
    for site, A, B in adapter.factors():
        weight = lm.get_submodule(site.path).weight.data
        original[site.path] = weight.clone()
        delta = (B.mT @ A).to(weight.device)
        weight.copy_(weight.float() + (delta if weight.shape == delta.shape else delta.mT))
    lm._d2l_merged = True
    return Merged(lm, original)


def _reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best factors of ``rank`` for ``B^T A``, the squared error and the squared norm.

    The SVD is of the small matrix between the orthogonal factors of A and B, in float64.
    """
    Qb, Rb = torch.linalg.qr(B.double().mT)
    Qa, Ra = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    root = S[:rank].sqrt()
    kept_A, kept_B = root[:, None] * (Vh[:rank] @ Qa.mT), (Qb @ U[:, :rank] * root).mT
    return kept_A, kept_B, float(S[rank:].square().sum()), float(S.square().sum())
