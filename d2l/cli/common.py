"""What the commands share: the console, JSON, and short paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..home import repo_root

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def console(stderr: bool = False) -> Console:
    """Make a console that colours only what it is told to."""
    return Console(stderr=stderr, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON, one key a line."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def short(path: Path) -> str:
    """Return a path as it reads best: inside the checkout from its root."""
    return str(path.relative_to(repo_root())) if path.is_relative_to(repo_root()) else str(path)
