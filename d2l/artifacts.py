"""Files that a run leaves behind: atomic writers, results folders, and the manifest.

What the results mean is claims' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .home import replacing, repo_root

COLUMNS = (
    "series",
    "haystack_tok",
    "n_chunks",
    "n",
    "accuracy",
    "ci_low",
    "ci_high",
    "gen_memory_mib",
    "adapter_mib",
    "internalize_s",
    "seed",
)
QA_COLUMNS = (
    "series", "part", "n_facts", "n_docs", "n", "f1", "recall", "exact", "relative", "relative_low",
    "relative_high", "context_ratio", "update_s", "update_mib", "generation_s", "generation_mib",
    "adapter_mib", "seed",
)  # fmt: skip
SET_COLUMNS = ("set", *QA_COLUMNS, "unknown")
LENGTH_COLUMNS = ("what", "n_tok", "n", "seed")
WORD_COLUMNS = (
    "series", "part", "n_facts", "n", "document", "question", "answer", "reply", "f1", "recall",
    "seed",
)  # fmt: skip
VARIANT_COLUMNS = ("filler", "needle", *COLUMNS)
TABLES = (COLUMNS, QA_COLUMNS, SET_COLUMNS, LENGTH_COLUMNS, WORD_COLUMNS)
RESULT_FILES = ("data.csv", "variants.csv", "figure.svg", "figure.png")
DISTRIBUTIONS = ("torch", "transformers", "d2l-core", "d2l-kernels")
DEFAULT_PAPER = "doc-to-lora"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` atomically and return the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` atomically as UTF-8 with Unix line ends and return the path."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write `data` atomically as indented JSON; NaN and infinity are refused (ValueError)."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def write_csv(path: str | os.PathLike[str], table: pd.DataFrame) -> Path:
    """Write `table` atomically as CSV without the index, six significant digits."""
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    return write_text(path, buffer.getvalue())


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a results table and check that it has the columns of the nearest of ``TABLES``."""
    table = pd.read_csv(path, dtype={"part": str})
    found = set(table.columns)
    nearest = min(TABLES, key=lambda columns: (-len(found & set(columns)), len(columns)))
    check_columns(table, nearest, str(path))
    return table


def check_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raise ValueError unless `table` has exactly `columns`, in order."""
    found = list(table.columns)
    if found == list(columns):
        return
    missing = [c for c in columns if c not in found]
    extra = [c for c in found if c not in columns]
    detail = f"missing {missing}, unexpected {extra}" if missing or extra else f"order is {found}"
    raise ValueError(f"{name} must have the columns {', '.join(columns)}: {detail}")


def paper_dir(paper: str = DEFAULT_PAPER) -> Path:
    """Return the folder of one paper: its claims, references, weights and results."""
    return repo_root() / "papers" / paper


def results_dir(experiment: str, scale: str, paper: str = DEFAULT_PAPER) -> Path:
    """Return the folder of the committed results of one experiment at one scale."""
    return paper_dir(paper) / "results" / experiment / scale


def build_dir() -> Path:
    """Return the folder for what is never committed: executed notebooks, throw-away results."""
    return repo_root() / "build"


def committed_results() -> list[Path]:
    """List every committed results folder that holds a manifest, in order of its path."""
    found = (repo_root() / "papers").glob("*/results/*/*/manifest.json")
    return sorted(path.parent for path in found)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was run, on what, for how long, and what came out.

    `files` maps each result file to its sha256, so that a table edited later, or left by a run
    that died before its check, is noticed.  `context` holds what the claims are tested against.
    """

    experiment: str
    scale: str
    seed: int
    config: dict[str, Any]
    config_id: str
    seconds: float
    context: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, Any]
    commit: str | None
    files: dict[str, str]
    verdicts: list[dict[str, Any]]

    def write(self, folder: Path) -> Path:
        """Write `manifest.json` into `folder`."""
        return write_json(folder / "manifest.json", dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of `folder`; ValueError names a broken or incomplete one."""
        path = folder / "manifest.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of this version: {error}") from error

    def changed_files(self, folder: Path) -> list[str]:
        """List the files of `folder` that are missing or differ from those of this run."""
        now = file_hashes(folder)
        return [name for name, digest in self.files.items() if now.get(name) != digest]


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every result file present in `folder`."""
    present = (folder / name for name in RESULT_FILES)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in present if p.is_file()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a number."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_device() -> dict[str, Any]:
    """Describe the machine: processor, cores, threads in use, and the GPU if there is one."""
    import torch

    about: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def git_commit(root: Path | None = None) -> str | None:
    """Return the commit of the checkout, with `+changes` if the tree differs; None without git."""
    root = root or repo_root()
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
