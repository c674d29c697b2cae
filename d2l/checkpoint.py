"""Our checkpoint: a folder with `config.json` and `model.safetensors`, checked when it is read.

Other files of the folder (model card, training curve) are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import ChunkConfig, HypernetConfig, from_dict, to_dict
from .hypernet import Hypernet, TargetShapes
from .lm.base import LanguageModel, load_base
from .model import DocToLoRA, target_shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = "d2l-hypernet-1"


@dataclass(frozen=True)
class SavedHypernet:
    """What a checkpoint folder holds; the hypernetwork is on the CPU, in evaluation mode."""

    hypernet: Hypernet
    chunk: ChunkConfig
    base_name: str
    base_fingerprint: str | None
    metadata: dict[str, Any]
    trained_chunks: int | None = None

    @property
    def config(self) -> HypernetConfig:
        """The hypernetwork's configuration."""
        return self.hypernet.config

    def save(self, folder: str | Path) -> None:
        """Write it as a folder of ours; as `save_hypernet`."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        save_hypernet(folder, facts.pop("hypernet"), facts.pop("chunk"), **facts)


def save_hypernet(
    folder: str | Path,
    hypernet: Hypernet,
    chunk: ChunkConfig,
    *,
    base_name: str,
    base_fingerprint: str | None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    trained_chunks: int | None = None,
) -> None:
    """Write a hypernetwork so that the folder never holds half a checkpoint.

    Both files are complete beside the folder before they are moved in, so a full disk or a kill
    leaves what was there.  ``metadata`` is anything that JSON takes; ``dtype`` rounds the weights;
    ``trained_chunks`` is the most chunks that it was trained to compose.

    Raises OSError when the files cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        named = hypernet.named_parameters()
        tensors = {n: p.detach().to("cpu", dtype or p.dtype).contiguous() for n, p in named}
        try:
            save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error
        record = {
            "format": _FORMAT,
            "weights_sha256": _sha256(part / WEIGHTS),
            "base": {"name": base_name, "fingerprint": base_fingerprint},
            "hypernet": to_dict(hypernet.config),
            "targets": asdict(hypernet.targets),
            "d_model": hypernet.d_model,
            "chunk": to_dict(chunk),
            "trained_chunks": trained_chunks,
            "metadata": dict(metadata or {}),
        }
        (part / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        os.chmod(part / WEIGHTS, 0o644)
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_model(
    folder: str | Path,
    model: DocToLoRA,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's hypernetwork with its chunk lengths and its base's fingerprint."""
    save_hypernet(
        folder,
        model.hypernet,
        model.chunk,
        base_name=model.base.name,
        base_fingerprint=model.base.fingerprint,
        metadata=metadata,
        dtype=dtype,
        trained_chunks=model.trained_chunks,
    )


def load_hypernet(folder: str | Path) -> SavedHypernet:
    """Read a checkpoint folder and verify its weights.

    Raises FileNotFoundError for a missing file; ValueError naming the file when the weights'
    sha256 is not the recorded one, or when configuration and weights do not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; give a checkpoint's folder")
    path = folder / CONFIG
    try:
        record = json.loads(path.read_text())
        if record["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT!r}, got {record['format']!r}")
        config = from_dict(HypernetConfig, record["hypernet"])
        chunk = from_dict(ChunkConfig, record["chunk"])
        targets = from_dict(TargetShapes, record["targets"])
        hypernet = Hypernet(config, targets, int(record["d_model"]))
        expected, base = str(record["weights_sha256"]), record["base"]
        base_name, fingerprint = str(base["name"]), base["fingerprint"]
    except KeyError as error:
        raise ValueError(f"{path} cannot be used: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    _load_weights(folder / WEIGHTS, expected, hypernet)
    trained, metadata = record.get("trained_chunks"), record.get("metadata", {})
    return SavedHypernet(hypernet.eval(), chunk, base_name, fingerprint, metadata, trained)


def load_model(
    folder: str | Path,
    base: LanguageModel,
    *,
    strict: bool = False,
    encoder_base: LanguageModel | None = None,
    tok_budget: int = 4096,
) -> DocToLoRA:
    """Read a checkpoint folder for ``base``; an encoder named in it is loaded unless given.

    Warns with a UserWarning when ``base`` is not the one that the hypernetwork was made for.

    Raises ValueError as `load_hypernet` does, when the base has other linears than the
    hypernetwork writes for, and instead of the warning when ``strict``.
    """
    saved = load_hypernet(folder)
    return assemble(
        saved, base, str(folder), strict=strict, encoder_base=encoder_base, tok_budget=tok_budget
    )


def assemble(
    saved: SavedHypernet,
    base: LanguageModel,
    source: str,
    *,
    strict: bool = False,
    encoder_base: LanguageModel | None = None,
    tok_budget: int = 4096,
) -> DocToLoRA:
    """Put a hypernetwork on ``base``; warns and raises as `load_model`, naming ``source``."""
    found = target_shapes(base, saved.config)
    if found != saved.hypernet.targets:
        raise ValueError(
            f"{source} was made for base {saved.base_name!r} with {saved.hypernet.targets}, "
            f"but {base.name!r} has {found}"
        )
    problem = _other_base(saved, base)
    if problem and strict:
        raise ValueError(f"{source}: {problem}")
    if problem:
        warnings.warn(f"{source}: {problem}", UserWarning, stacklevel=3)
    named = saved.config.encoder.model
    if encoder_base is None and named is not None:
        encoder_base = load_base(named, device=base.device, dtype=base.model.dtype)
    model = DocToLoRA(
        base,
        saved.config,
        saved.chunk,
        encoder_base=encoder_base,
        tok_budget=tok_budget,
        trained_chunks=saved.trained_chunks,
    )
    if model.hypernet.d_model != saved.hypernet.d_model:
        raise ValueError(
            f"{source} reads features of width {saved.hypernet.d_model}, "
            f"but encoder {model.reader.name!r} gives {model.hypernet.d_model}"
        )
    model.hypernet.load_state_dict(saved.hypernet.state_dict())
    model.hypernet.eval()
    return model


def _other_base(saved: SavedHypernet, base: LanguageModel) -> str | None:
    """Say how ``base`` differs from the recorded one; by name when no fingerprint is known."""
    if saved.base_fingerprint is None:
        if saved.base_name == base.name:
            return None
        return (
            f"made for base {saved.base_name!r} (no fingerprint recorded), used with {base.name!r}"
        )
    if saved.base_fingerprint == base.fingerprint:
        return None
    return (
        f"made for base {saved.base_name!r} with fingerprint {saved.base_fingerprint}, used with "
        f"{base.name!r} with fingerprint {base.fingerprint}: answers may be wrong; use the "
        "recorded base or train again"
    )


def _load_weights(path: Path, expected: str, hypernet: Hypernet) -> None:
    actual = _sha256(path)
    if actual != expected:
        raise ValueError(
            f"{path} is truncated or was changed: sha256 must be {expected}, but is {actual} "
            f"({path.stat().st_size} bytes); restore the file or train again"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    own = dict(hypernet.named_parameters())
    if tensors.keys() != own.keys():
        raise ValueError(f"{path} does not fit {CONFIG}: {sorted(tensors.keys() ^ own.keys())[:4]}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                f"{CONFIG} asks for {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
