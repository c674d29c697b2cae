"""Find a hypernetwork by name, folder, file or hub repository, and put it on its base."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from .checkpoint import CONFIG, WEIGHTS, SavedHypernet, assemble, load_hypernet
from .home import repo_root
from .lm.base import LanguageModel, load_base
from .model import DocToLoRA
from .published import PUBLISHED_WEIGHTS, read_published


def from_pretrained(
    name_or_path: str | Path,
    base: str | LanguageModel | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> DocToLoRA:
    """Load a hypernetwork and the base that it was made for.

    ``name_or_path`` is one of `shipped`, a folder of ours, a released checkpoint (its folder or
    file), or a hub name ``org/repository`` or ``org/repository/folder``.  No pickle in any of them
    is run.  ``base`` takes the place of the recorded base: a name for `load_base`, or a loaded one.
    ``device`` "auto" is CUDA, else MPS, else the CPU; ``dtype`` "auto" is the one that the
    hypernetwork was trained with where it is recorded, else bfloat16 on a GPU, float32 on the CPU.

    A released checkpoint that read through a 4-bit encoder gets one (NF4, with bitsandbytes on
    CUDA); elsewhere it reads in ``dtype``, with a warning.

    Raises ValueError for an unknown name, a damaged or foreign file, or a base that does not fit;
    OSError for what cannot be fetched.  Warns when the base has other weights than recorded.
    """
    found = find(name_or_path)
    saved = load_hypernet(found) if isinstance(found, Path) else found
    if isinstance(base, LanguageModel):
        if (device, dtype) != ("auto", "auto"):
            raise ValueError("device and dtype are those of the loaded base: leave them out")
    else:
        at = pick_device(device)
        base = load_base(base or saved.base_name, device=at, dtype=_pick_dtype(dtype, at, saved))
    return assemble(saved, base, str(name_or_path), encoder_base=_quantized_reader(saved, base))


def shipped() -> list[str]:
    """List the names of the hypernetworks that ship with the repository.

    >>> "fig2/tiny" in shipped()
    True
    """
    folder = _weights()
    return sorted(
        str(config.parents[1].relative_to(folder)) for config in folder.glob(f"*/*/seed0/{CONFIG}")
    )


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device: the best of this machine for "auto".

    Raises ValueError for one that torch does not know or that is not there.
    """
    backends = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device == "auto":
        return torch.device(next((d for d, there in backends.items() if there()), "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: {error}") from error
    if not backends.get(found.type, lambda: True)():
        raise ValueError(f"device {device!r} is not available here; use auto or cpu")
    return found


def find(name_or_path: str | Path) -> Path | SavedHypernet:
    """Locate a checkpoint: a folder of ours, or the content of a released one.

    Raises ValueError and OSError as `from_pretrained` does.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    shipped_here = _weights() / name / "seed0"
    for folder in (path, shipped_here):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if path.is_file():
        if path.name in (CONFIG, WEIGHTS):
            return path.parent
        return read_published(path).saved(path.name)
    if (path / PUBLISHED_WEIGHTS).is_file():
        return read_published(path / PUBLISHED_WEIGHTS).saved(path.name)
    if path.is_dir():
        raise ValueError(
            f"{path} holds no checkpoint: neither {CONFIG} with {WEIGHTS}, nor {PUBLISHED_WEIGHTS}"
        )
    parts = name.split("/")
    if isinstance(name_or_path, Path) or len(parts) < 2 or parts[0] in ("", ".", "..", "~"):
        raise ValueError(
            f"no checkpoint {name!r}: give one of {', '.join(shipped())}, a folder or file, or a "
            "hub name like org/repository"
        )
    return find(_fetch("/".join(parts[:2]), "/".join(parts[2:])))


def _fetch(repository: str, folder: str) -> Path:
    """Fetch one checkpoint's files from the hub, or take them from the cache."""
    try:
        files = HfApi().list_repo_files(repository)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"no checkpoint {repository!r}, here or on the hub; shipped: {', '.join(shipped())}"
        ) from error
    except OSError:
        files = None
    wanted = {CONFIG, WEIGHTS, PUBLISHED_WEIGHTS}
    if files is not None:
        weights = [f for f in files if Path(f).name in (WEIGHTS, PUBLISHED_WEIGHTS)]
        inside = sorted({str(Path(f).parent) for f in weights if Path(f).is_relative_to(folder)})
        if len(inside) != 1:
            raise ValueError(
                f"{repository} holds {len(inside)} checkpoints below {folder or 'its root'!r}; "
                f"name one: {', '.join(f'{repository}/{f}' for f in inside) or 'none is there'}"
            )
        folder = inside[0].removeprefix(".")
    patterns = [f"{folder}/{name}" if folder else name for name in sorted(wanted)]
    try:
        home = snapshot_download(
            repository, allow_patterns=patterns, local_files_only=files is None
        )
    except OSError as error:
        raise OSError(
            f"checkpoint {repository!r} could not be fetched from the hub ({error}); check the "
            "network, or give a local folder"
        ) from error
    return Path(home) / folder


def _weights() -> Path:
    return repo_root() / "papers" / "doc-to-lora" / "weights"


def _pick_dtype(
    dtype: str | torch.dtype, device: torch.device, saved: SavedHypernet
) -> torch.dtype:
    if dtype == "auto":
        usual = "float32" if device.type == "cpu" else "bfloat16"
        dtype = saved.metadata.get("run", {}).get("dtype", usual)
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {dtype!r}")
    return found


def _quantized_reader(saved: SavedHypernet, base: LanguageModel) -> LanguageModel | None:
    if not saved.metadata.get("quantized_encoder"):
        return None
    name = saved.config.encoder.model or base.name
    if base.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
        return load_base(name, device=base.device, dtype=torch.bfloat16, nf4=True)
    warnings.warn(
        f"this hypernetwork was trained to read through a 4-bit (NF4) copy of {name!r}; here it "
        f"reads in {base.model.dtype}, so adapters differ a little (4 bits need CUDA and the "
        "package bitsandbytes)",
        UserWarning,
        stacklevel=3,
    )
    return None
