"""`just bench`: the cost of internalising long documents with the hypernetworks that ship."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..artifacts import describe_device, paper_dir, write_csv, write_json
from ..bench import internalize_cost, query_cost
from .fig2 import config
from .shipped import load_shipped

LENGTHS = {"tiny": (2048, 8192), "small": (8192, 32768, 131072)}
CONTEXT = {"tiny": 400, "small": 8000}


def run(scale: str, repeats: int) -> tuple[Path, list[pd.DataFrame]]:
    """Measure `internalize_cost` at every length of a scale, and `query_cost`; write both.

    Raises ValueError for a scale without shipped weights.
    """
    if scale not in LENGTHS:
        raise ValueError(f"scale must be one of {', '.join(LENGTHS)}, got {scale!r}")
    model = load_shipped("fig2", {0: config(scale)}, scale)[0]
    table = pd.DataFrame([internalize_cost(model, n, repeats=repeats) for n in LENGTHS[scale]])
    folder = paper_dir() / "results" / "bench" / scale
    write_csv(folder / "internalize.csv", table)
    queries = pd.DataFrame(query_cost(model, CONTEXT[scale], repeats=repeats))
    write_csv(folder / "queries.csv", queries)
    write_json(folder / "device.json", describe_device())
    return folder, [table, queries]
