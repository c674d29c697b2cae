"""Where things lie on disk: the checkout that holds the package, and the cache.

Standard library only, so that every layer may ask.
"""

from __future__ import annotations

import os
from pathlib import Path


def repo_root() -> Path:
    """Return the checkout with `papers/` and `notebooks/`: `D2L_HOME`, else this package's own.

    Raises FileNotFoundError where there is none (a package installed without its checkout).
    """
    named = os.environ.get("D2L_HOME")
    root = Path(named).expanduser() if named else Path(__file__).resolve().parents[1]
    if not (root / "papers").is_dir():
        where = f"D2L_HOME={named}" if named else str(root)
        raise FileNotFoundError(
            f"{where} holds no papers/ folder; set D2L_HOME to a checkout of the repository, "
            "or install it from there with `pip install -e .`"
        )
    return root.resolve()


def cache_dir() -> Path:
    """Return the folder for fetched and derived files: `D2L_CACHE`, else `~/.cache/d2l`."""
    named = os.environ.get("D2L_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "d2l"
