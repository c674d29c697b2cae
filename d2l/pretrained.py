"""Find a hypernetwork by name, folder, file or hub repository, and put it on its base."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from .checkpoint import CONFIG, WEIGHTS, SavedHypernet, assemble, load_hypernet
from .home import shipped, weights_home
from .lm.base import LanguageModel, load_base, native_dtype
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

    ``name_or_path`` is one of `d2l.home.shipped`, a folder of ours, a released checkpoint (its
    folder or file), or a hub name ``org/repository`` or ``org/repository/folder``. No pickle in any
    of them is run. ``base`` takes the place of the recorded base: a name for `load_base`, or a
    loaded one, which keeps its device and dtype. ``device`` "auto" is CUDA, else MPS, else the CPU;
    ``dtype`` "auto" the one that the hypernetwork was trained with where it is recorded, else
    bfloat16 on a GPU; a CPU that only emulates bfloat16 gets float32. A released checkpoint that
    read through a 4-bit encoder gets one (NF4) where bitsandbytes is installed, else it warns.

    Raises ValueError for an unknown name, a damaged or foreign file, or a base that does not fit;
    OSError for what cannot be fetched.  Warns when the base has other weights than recorded.
    """
    found = find(name_or_path)
    saved = load_hypernet(found) if isinstance(found, Path) else found
    if not isinstance(base, LanguageModel):
        at = pick_device(device)
        usual = saved.metadata.get("run", {}).get("dtype")
        usual = usual or ("float32" if at.type == "cpu" else "bfloat16")
        kind = getattr(torch, usual if dtype == "auto" else str(dtype).removeprefix("torch."), None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {dtype!r}")
        base = load_base(base or saved.base_name, device=at, dtype=native_dtype(at, kind))
    return assemble(saved, base, str(name_or_path), encoder_base=_quantized_reader(saved, base))


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device: the best of this machine for "auto".

    Raises ValueError for one that torch does not know or that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next((d for d in there if there[d]), "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: {error}") from error
    if not there.get(found.type, True):
        raise ValueError(f"device {device!r} is not available here; use auto or cpu")
    return found


def find(name_or_path: str | Path) -> Path | SavedHypernet:
    """Locate a checkpoint: a folder of ours, or the content of a released one.

    Raises ValueError and OSError as `from_pretrained` does.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    for folder in (path, weights_home() / name / "seed0"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    released = path / PUBLISHED_WEIGHTS if path.is_dir() else path
    if released.is_file():
        return read_published(released).saved(released.name)
    org, _, rest = name.partition("/")
    if path.exists() or isinstance(name_or_path, Path) or not rest or org in ("", ".", "..", "~"):
        raise ValueError(
            f"{name!r} is no checkpoint: give one of {', '.join(shipped())}, a folder with "
            f"{CONFIG} and {WEIGHTS} or with {PUBLISHED_WEIGHTS}, or a hub name org/repository"
        )
    repository, _, folder = rest.partition("/")
    wanted = [str(Path(folder) / f) for f in (CONFIG, WEIGHTS, PUBLISHED_WEIGHTS)]
    try:
        home = Path(snapshot_download(f"{org}/{repository}", allow_patterns=wanted))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"no checkpoint {name!r}, here or on the hub; shipped: {', '.join(shipped())}"
        ) from error
    except OSError as error:
        raise OSError(f"cannot fetch {name!r} from the hub ({error}); check the network") from error
    return find(home / folder)


def _quantized_reader(saved: SavedHypernet, base: LanguageModel) -> LanguageModel | None:
    if not saved.metadata.get("quantized_encoder"):
        return None
    name = saved.config.encoder.model or base.name
    if base.device.type != "mps" and importlib.util.find_spec("bitsandbytes"):
        return load_base(name, device=base.device, dtype=base.model.dtype, nf4=True)
    warnings.warn(
        f"this hypernetwork was trained to read through a 4-bit (NF4) copy of {name!r}; here it "
        f"reads in {base.model.dtype}, so adapters differ a little (4 bits need the package "
        "bitsandbytes)",
        UserWarning,
        stacklevel=3,
    )
    return None
