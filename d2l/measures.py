"""Named numbers read off a results table, which the claims of claims.toml refer to.

A measure takes the table, what the experiment says about itself (`window`, `train_tok`, in tokens)
and its own arguments, and returns a number with a note that says where it was read.  It raises
NotTestable where the table cannot answer.  Lengths are never interpolated unless the measure says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from d2l.intervals import wilson

NEAR = 2**0.25
"""An evaluated length stands for a wanted one within this factor."""


class NotTestable(Exception):
    """The table cannot answer; the message says why."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measured number and where it was read."""

    value: float
    note: str


Measure = Callable[..., Measurement]
MEASURES: dict[str, Measure] = {}


def measure(function: Measure) -> Measure:
    """Make `function` available to claims.toml under its own name."""
    MEASURES[function.__name__] = function
    return function


def pool_seeds(table: pd.DataFrame, series: str) -> pd.DataFrame:
    """Return one row per length of `series`: seeds pooled, with Wilson's 95 % interval.

    Columns haystack_tok, n_chunks, n, accuracy, ci_low, ci_high, and the mean gen_memory_mib and
    adapter_mib.  Raises NotTestable if the table holds no such series.
    """
    rows = table[table["series"] == series].dropna(subset=["accuracy"])
    rows = rows.assign(hits=rows["accuracy"] * rows["n"])
    if rows["n"].sum() == 0:
        raise NotTestable(f"the table holds no measured rows of {series}")
    pooled = rows.groupby("haystack_tok", as_index=False).agg(
        n_chunks=("n_chunks", "max"),
        n=("n", "sum"),
        hits=("hits", "sum"),
        gen_memory_mib=("gen_memory_mib", "mean"),
        adapter_mib=("adapter_mib", "mean"),
    )
    hits = pooled.pop("hits").round()
    intervals = [wilson(int(k), int(n)) for k, n in zip(hits, pooled["n"], strict=True)]
    low, high = zip(*intervals, strict=True)
    return pooled.assign(accuracy=hits / pooled["n"], ci_low=low, ci_high=high)


@measure
def accuracy_at_windows(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, windows: float
) -> Measurement:
    """Accuracy at the evaluated length nearest to `windows` times the base's window."""
    curve = pool_seeds(table, series)
    wanted = windows * context["window"]
    row = curve.loc[(np.log2(curve["haystack_tok"]) - math.log2(wanted)).abs().idxmin()]
    if not wanted / NEAR <= row["haystack_tok"] <= wanted * NEAR:
        raise NotTestable(f"{series} was not evaluated near {wanted:,.0f} tokens")
    return Measurement(float(row["accuracy"]), f"at {_length(row)}, n = {row['n']:.0f}")


@measure
def worst_accuracy_up_to(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    *,
    series: str,
    tok: float | None = None,
    windows: float | None = None,
) -> Measurement:
    """Lowest accuracy over the lengths up to `tok`, or `windows` windows, or the training length.

    A document may exceed the bound by a twentieth, since lengths come in blocks.
    """
    if tok is not None:
        bound = tok
    else:
        bound = context["train_tok"] if windows is None else windows * context["window"]
    curve = pool_seeds(table, series)
    curve = curve[curve["haystack_tok"] <= 1.05 * bound]
    if curve.empty:
        raise NotTestable(f"{series} was not evaluated up to {bound:,.0f} tokens")
    row = curve.loc[curve["accuracy"].idxmin()]
    reach = curve["haystack_tok"].max()
    if reach < bound / 2:
        raise NotTestable(f"{series} was evaluated to {reach:,.0f} tokens of {bound:,.0f}")
    note = f"lowest of {len(curve)} lengths to {reach:,.0f} tok, at {_length(row)}"
    return Measurement(float(row["accuracy"]), note)


@measure
def accuracy_kept_past_window(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str
) -> Measurement:
    """Best accuracy from 1.5 windows on, divided by the best inside the window."""
    curve, window = pool_seeds(table, series), context["window"]
    inside = curve[curve["haystack_tok"] <= window]
    past = curve[curve["haystack_tok"] >= 1.5 * window]
    if inside.empty or past.empty:
        raise NotTestable(f"{series} was not evaluated on both sides of {window:,.0f} tokens")
    best, row = inside["accuracy"].max(), past.loc[past["accuracy"].idxmax()]
    if best == 0:
        raise NotTestable(f"{series} never answers, inside its window either")
    note = f"{row['accuracy']:.3f} at {_length(row)} against {best:.3f} inside the window"
    return Measurement(float(row["accuracy"] / best), note)


@measure
def windows_until_fall(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, level: float
) -> Measurement:
    """Length, in windows, where accuracy first falls below `level` (interpolated in log length).

    The longest evaluated length if it never does, 0 if the shortest is already below.
    """
    curve = pool_seeds(table, series).reset_index(drop=True)
    below = curve.index[curve["accuracy"] < level]
    window = context["window"]
    if below.empty:
        last = curve.iloc[-1]
        note = f"still {last['accuracy']:.3f} at {_length(last)}, the longest evaluated"
        return Measurement(float(last["haystack_tok"] / window), note)
    first = int(below[0])
    if first == 0:
        return Measurement(0.0, f"below {level} at the shortest, {_length(curve.iloc[0])}")
    a, b = curve.iloc[first - 1], curve.iloc[first]
    share = (a["accuracy"] - level) / (a["accuracy"] - b["accuracy"])
    log_tok = (1 - share) * math.log2(a["haystack_tok"]) + share * math.log2(b["haystack_tok"])
    note = f"about {2**log_tok:,.0f} tok; {a['accuracy']:.3f} at {_length(a)}, "
    note += f"{b['accuracy']:.3f} at {_length(b)}"
    return Measurement(float(2**log_tok / window), note)


@measure
def memory_exponent(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, from_windows: float = 0.0
) -> Measurement:
    """Exponent p of memory ~ length^p over the measured lengths: 0 is constant, 1 is linear.

    Least squares in log-log from `from_windows` windows on (a short document weighs less than the
    question), over a factor of four in length.  The adapter is not counted.
    """
    curve = pool_seeds(table, series).dropna(subset=["gen_memory_mib"])
    long_enough = curve["haystack_tok"] >= from_windows * context["window"]
    curve = curve[long_enough & (curve["gen_memory_mib"] > 0)]
    if len(curve) < 3 or curve["haystack_tok"].max() < 4 * curve["haystack_tok"].min():
        raise NotTestable(f"too few lengths with a measured memory of {series}")
    slope = np.polyfit(np.log(curve["haystack_tok"]), np.log(curve["gen_memory_mib"]), 1)[0]
    a, b = curve.iloc[0], curve.iloc[-1]
    note = f"{a['gen_memory_mib']:.3g} MiB at {_length(a)}, "
    note += f"{b['gen_memory_mib']:.3g} MiB at {_length(b)}"
    return Measurement(float(slope), note)


@measure
def largest_memory_mib(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str
) -> Measurement:
    """Largest memory for generation at any length, adapter not counted."""
    curve = pool_seeds(table, series).dropna(subset=["gen_memory_mib"])
    if curve.empty:
        raise NotTestable(f"no measured memory of {series}")
    row = curve.loc[curve["gen_memory_mib"].idxmax()]
    return Measurement(float(row["gen_memory_mib"]), f"at {_length(row)}")


@measure
def memory_share_with_adapter(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, of: str
) -> Measurement:
    """Memory of `series`, adapter counted, over that of `of`, at the longest length of both."""
    ours = pool_seeds(table, series).dropna(subset=["gen_memory_mib", "adapter_mib"])
    theirs = pool_seeds(table, of).dropna(subset=["gen_memory_mib"])
    both = ours.merge(theirs, on="haystack_tok", suffixes=("", "_of"))
    if both.empty:
        raise NotTestable(f"no length where the memory of both {series} and {of} was measured")
    row = both.loc[both["haystack_tok"].idxmax()]
    counted = row["gen_memory_mib"] + row["adapter_mib"]
    note = f"{counted:.3g} of {row['gen_memory_mib_of']:.3g} MiB at {_length(row)}"
    return Measurement(float(counted / row["gen_memory_mib_of"]), note)


@measure
def highest_plausible_accuracy(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, min_n: int
) -> Measurement:
    """Upper end of Wilson's 95 % interval of the accuracy over all lengths and seeds.

    For a control that should be at chance: small means that nothing above it is plausible.
    """
    curve = pool_seeds(table, series)
    n = int(curve["n"].sum())
    if n < min_n:
        raise NotTestable(f"{n} questions of {series} cannot exclude luck, {min_n} would")
    hits = round(float((curve["accuracy"] * curve["n"]).sum()))
    return Measurement(wilson(hits, n)[1], f"{hits} of {n:,} correct, over all lengths")


def _length(row: pd.Series) -> str:
    chunks = row["n_chunks"]
    shown = f"{row['haystack_tok']:,.0f} tok"
    if pd.notna(chunks) and chunks > 0:
        shown += f" ({chunks:.0f} chunk{'s' if chunks != 1 else ''})"
    return shown
