"""Adapters in other forms: PEFT folders, merged weights, and the commands that vLLM needs.

Only PEFT's file format is used (two files, safetensors and JSON); the package is not needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter import Adapter, Source
from .home import replacing
from .lm.base import LanguageModel
from .lm.hooks import Site, is_merged, sites_of

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


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
    ``VLLM_RANKS`` (vLLM loads no more than the last; beyond it a warning says so).  With ``rank``
    every delta W becomes its best approximation of that rank (SVD).  Factors keep their dtype.

    Raises ValueError for a rank below 1, OSError when the folder cannot be written.
    """
    folder = Path(folder)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    legal = next((r for r in VLLM_RANKS if r >= adapter.rank), adapter.rank)
    if rank is None and legal > VLLM_RANKS[-1]:
        warnings.warn(
            f"rank {legal} is more than the {VLLM_RANKS[-1]} that vLLM loads; give rank= to reduce "
            "it (the error is reported), or merge the adapter",
            UserWarning,
            stacklevel=2,
        )
    tensors, lost, total = {}, 0.0, 0.0
    for site, A, B in _factors(adapter):
        if rank is not None:
            A, B, gone, whole = _reduced(A, B, rank)
            lost, total = lost + gone, total + whole
        rows = (0, 0, 0, (legal if rank is None else rank) - len(A))
        key, dtype = f"base_model.model.{site.path}", adapter.A[site.module].dtype
        A, B = (torch.nn.functional.pad(t, rows).to("cpu", dtype) for t in (A, B))
        tensors[f"{key}.lora_A.weight"] = A.contiguous()
        tensors[f"{key}.lora_B.weight"] = B.mT.contiguous()
    size = legal if rank is None else rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "inference_mode": True,
        "r": size,
        "lora_alpha": size,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [s.path for s in adapter.sites],
    } | _short_names(adapter.sites)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PEFT_WEIGHTS) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(0, str(error)) from error
    with replacing(folder / PEFT_CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    return PeftExport(folder, size, (lost / total) ** 0.5 if total else 0.0)


def from_peft(folder: str | Path, base: LanguageModel) -> Adapter:
    """Read a PEFT LoRA for ``base``, made by anyone, as an adapter with one document in it.

    Raises FileNotFoundError; ValueError for what no plain LoRA has (DoRA, trained biases or whole
    modules, pickled weights) and for linears that ``base`` does not have.
    """
    folder = Path(folder)
    if (folder / "adapter_model.bin").exists() and not (folder / PEFT_WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds pickled weights, which are refused because reading them could run "
            "code; save the adapter as safetensors"
        )
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; give a PEFT adapter's folder")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text())
        tensors = load_file(folder / PEFT_WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    plain = {"peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None)}
    plain |= {"modules_to_save": (None, []), "fan_in_fan_out": (False, None)}
    for option, legal in plain.items():
        if config.get(option) not in legal:
            raise ValueError(f"{folder} has {option}={config[option]!r}; only plain LoRA is read")
    known, found = {s.path: s for s in sites_of(base.model)}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key
        )
        if not match or match[1] not in known:
            raise ValueError(f"{folder} adapts {key!r}, which is no linear of {base.name!r}")
        found.setdefault(known[match[1]], {})[match[2]] = tensor
    sites = tuple(sorted(found, key=lambda s: (s.layer, s.module)))
    rank = max((t.shape[0] for f in found.values() for n, t in f.items() if n == "A"), default=0)
    layers = sorted({s.layer for s in sites})
    A, B = {}, {}
    for module in sorted({s.module for s in sites}):
        of_module = [s for s in sites if s.module == module]
        dtype = next(iter(tensors.values())).dtype
        A[module] = torch.zeros(len(layers), rank, max(s.d_in for s in of_module), dtype=dtype)
        B[module] = torch.zeros(len(layers), rank, max(s.d_out for s in of_module), dtype=dtype)
        for site in of_module:
            a, b = found[site].get("A"), found[site].get("B")
            if a is None or b is None or (a.shape[1], b.shape[0]) != (site.d_in, site.d_out):
                raise ValueError(
                    f"{folder}: lora_A and lora_B of {site.path!r} do not fit the base"
                )
            row = layers.index(site.layer)
            A[module][row, : len(a), : site.d_in] = a
            B[module][row, : len(a), : site.d_out] = b.mT * _peft_scale(config, site, len(a))
    digest = hashlib.sha256((folder / PEFT_WEIGHTS).read_bytes()).hexdigest()
    return Adapter(
        A, B,
        sources=(Source(digest, folder.name, (), rank, folded=True),),
        sites=sites,
        multiplier=1.0,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        hypernet_id=f"peft {digest}",
    )  # fmt: skip


class Merged:
    """An adapter inside a model's weights; `unmerge`, or leaving the ``with`` block, takes it out.

    Keeps the original weights of the linears that it changed, so unmerging is exact.
    """

    def __init__(self, model: Any, original: dict[str, Tensor]) -> None:
        self._model, self._original = model, original

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; a second call does nothing."""
        modules = dict(self._model.named_modules())
        for path, weight in self._original.items():
            modules[path].weight.data.copy_(weight)
        if self._original:
            self._original, self._model._d2l_merged = {}, False

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.unmerge()


@torch.no_grad()
def merge(adapter: Adapter, model: Any) -> Merged:
    """Add delta W to the weights of ``model``: `DocToLoRA`, `LanguageModel`, or transformers'.

    Sums are made in float32.  Until it is unmerged everybody who uses the model meets the
    document, so `DocToLoRA` refuses other adapters and reads no documents meanwhile.

    Raises ValueError for a model with other linears or quantised ones, or one with an adapter
    merged already, before anything is changed.
    """
    base = getattr(model, "base", model)
    lm: Any = base.model if isinstance(base, LanguageModel) else model
    if is_merged(lm):
        raise ValueError("an adapter is merged already: unmerge it, or merge the sum of both")
    known, modules = set(sites_of(lm)), dict(lm.named_modules())
    for site in adapter.sites:
        if site not in known:
            raise ValueError(
                f"the adapter was made for base {adapter.base_name!r}: this model has no linear "
                f"{site.path!r} of {site.d_in} x {site.d_out}"
            )
        weight = modules[site.path].weight
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ValueError(
                f"{site.path!r} is quantised, so nothing can be added to it; ask with the adapter "
                "unmerged, or merge into the unquantised model"
            )
    original = {}
    lm._d2l_merged = True
    for site, A, B in _factors(adapter):
        weight = modules[site.path].weight
        original[site.path] = weight.data.clone()
        delta = B.to(weight.device).mT @ A.to(weight.device)
        delta = delta if weight.shape == delta.shape else delta.mT
        weight.data.copy_(weight.data.float() + delta)
    return Merged(lm, original)


def vllm_script(export: PeftExport, base: str, name: str = "document", port: int = 8000) -> str:
    """Return a shell script that serves ``base`` with vLLM and loads the export at run time.

    `VLLM_ALLOW_RUNTIME_LORA_UPDATING` and `/v1/load_lora_adapter` are vLLM's own interface.
    Raises ValueError for a rank that vLLM does not load.
    """
    allowed = next((r for r in VLLM_RANKS if r >= export.rank), None)
    if allowed is None:
        raise ValueError(
            f"vLLM loads ranks up to {VLLM_RANKS[-1]}, the export has {export.rank}: export it "
            "again with a smaller rank"
        )
    request = json.dumps({"lora_name": name, "lora_path": str(export.folder.resolve())})
    return f"""#!/usr/bin/env bash
# serve the base once; leave this line out where a server already runs with these options
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --port {port} \\
    --enable-lora --max-lora-rank {allowed} &
until curl --silent --fail http://localhost:{port}/health; do sleep 2; done
curl --fail-with-body http://localhost:{port}/v1/load_lora_adapter \\
    --header 'Content-Type: application/json' --data '{request}'
curl --fail-with-body http://localhost:{port}/v1/chat/completions \\
    --header 'Content-Type: application/json' \\
    --data '{{"model": "{name}", "messages": [{{"role": "user", "content": "QUESTION"}}]}}'
"""


def _factors(adapter: Adapter) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Yield every linear with its own ``A (rank, d_in)`` and ``B (rank, d_out)``, all scales in B.

    ``delta W = B^T A``, float32.
    """
    for site in adapter.sites:
        row = adapter.layers.index(site.layer)
        A = adapter.A[site.module][row, :, : site.d_in].float()
        B = adapter.B[site.module][row, :, : site.d_out].float()
        yield site, A, B * adapter.gain(B.device)[:, None]


def _reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best factors of ``rank`` for ``B^T A``, the squared error and the squared norm.

    The SVD is of the small matrix between the orthogonal factors of A and B, in float64.
    """
    Qb, Rb = torch.linalg.qr(B.double().mT)
    Qa, Ra = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    root = S[:rank].sqrt()
    kept_B, kept_A = (Qb @ U[:, :rank] * root).mT, root[:, None] * (Vh[:rank] @ Qa.mT)
    lost = float(S[rank:].square().sum())
    return kept_A.float(), kept_B.float(), lost, float(S.square().sum())


def _short_names(sites: tuple[Site, ...]) -> dict[str, Any]:
    """Name the targets by module and layer where paths have the form ``...layers.3...module``."""
    parts = [re.fullmatch(r"(?:.*\.)?(\w+)\.(\d+)\.(?:.*\.)?(\w+)", s.path) for s in sites]
    pairs = zip(parts, sites, strict=True)
    if not all(p and int(p[2]) == s.layer and p[3] == s.module for p, s in pairs):
        return {}
    return {
        "target_modules": sorted({s.module for s in sites}),
        "layers_to_transform": sorted({s.layer for s in sites}),
        "layers_pattern": sites[0].path.split(f".{sites[0].layer}.")[0].rpartition(".")[2],
    }


def _peft_scale(config: dict[str, Any], site: Site, rank: int) -> float:
    """PEFT's factor on delta W: ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", site.path):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
