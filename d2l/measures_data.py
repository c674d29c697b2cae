"""Named numbers read off a table of lengths, for claims.toml (see d2l.measures).

A row says how many documents (``what`` is *document*), or questions with their answers, of one
training seed are ``n_tok`` tokens long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .measures import Measurement, NotTestable, measure


def lengths(table: pd.DataFrame, what: str) -> dict[str, float]:
    """Return mean, median, std, min and max, in tokens, and the count ``n``, over all seeds.

    Raises NotTestable where nothing of the kind was counted.
    """
    rows = table[table["what"] == what]
    every = np.repeat(np.asarray(rows["n_tok"]), np.asarray(rows["n"]))
    if not every.size:
        raise NotTestable(f"no {what} was counted")
    return {
        "mean": float(every.mean()),
        "median": float(np.median(every)),
        "std": float(every.std()),
        "min": float(every.min()),
        "max": float(every.max()),
        "n": float(every.size),
    }


@measure
def length_ratio(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    *,
    what: str,
    statistic: str,
    of: str = "document",
    of_statistic: str = "mean",
) -> Measurement:
    """Divide one statistic of lengths by another; ``of_statistic`` *chunk* is the longest chunk."""
    ours = lengths(table, what)[statistic]
    theirs = context["chunk_tok"] if of_statistic == "chunk" else lengths(table, of)[of_statistic]
    named = "of a chunk" if of_statistic == "chunk" else f"{of_statistic} of a {of}"
    note = f"{statistic} of a {what} {ours:.3g} tok, {named} {theirs:.3g} tok"
    return Measurement(ours / theirs, note)
