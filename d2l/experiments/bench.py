"""`just bench`: the cost of internalising long documents with the hypernetworks that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pandas as pd

from ..artifacts import describe_device, paper_dir, write_csv, write_json
from ..bench import internalize_cost, query_cost
from .fig2 import config
from .shipped import load_shipped

LENGTHS = {"tiny": (2048, 8192), "small": (8192, 32768, 131072)}
CONTEXT = {"tiny": 400, "small": 8000}


def run(
    scale: str, repeats: int, only: Literal["internalize", "queries"] | None = None
) -> tuple[Path, list[pd.DataFrame]]:
    """Measure `internalize_cost` at every length of a scale, and `query_cost`; write both.

    ``only`` measures one of them and leaves the other's file as it is.  Raises ValueError for a
    scale without shipped weights.
    """
    if scale not in LENGTHS:
        raise ValueError(f"scale must be one of {', '.join(LENGTHS)}, got {scale!r}")
    model = load_shipped("fig2", {0: config(scale)}, scale)[0]
    folder = paper_dir() / "results" / "bench" / scale
    tables = {}
    if only != "queries":
        costs = [internalize_cost(model, n, repeats=repeats) for n in LENGTHS[scale]]
        tables["internalize"] = pd.DataFrame(costs)
    if only != "internalize":
        tables["queries"] = pd.DataFrame(query_cost(model, CONTEXT[scale], repeats=repeats))
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    path = folder / "device.json"
    known = json.loads(path.read_text()) if only and path.exists() else {}
    write_json(path, {**known, **dict.fromkeys(tables, describe_device())})
    return folder, [*tables.values()]
