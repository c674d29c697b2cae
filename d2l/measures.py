"""Named numbers read off a results table, which the claims of claims.toml refer to.

A measure takes the table, what the experiment says about itself (`window`, `train_tok`, in tokens)
and its own arguments, and returns a number with a note that says where it was read.  It raises
NotTestable where the table cannot answer.  Lengths are never interpolated unless the measure says.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from .intervals import wilson

NEAR = 2**0.25
"""An evaluated length stands for a wanted one within this factor."""


class NotTestable(Exception):
    """The table cannot answer; the message says why."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measured number and where it was read."""

    value: float
    note: str


@dataclasses.dataclass(frozen=True)
class Point:
    """One series at one length, seeds pooled; a memory that was not measured is NaN."""

    tok: float
    n_chunks: int
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    gen_memory_mib: float
    adapter_mib: float

    def __str__(self) -> str:
        chunks = f" ({self.n_chunks} chunk{'s' if self.n_chunks > 1 else ''})"
        return f"{self.tok:,.0f} tok" + (chunks if self.n_chunks else "")


Measure = Callable[..., Measurement]
MEASURES: dict[str, Measure] = {}


def measure(function: Measure) -> Measure:
    """Make `function` available to claims.toml under its own name."""
    MEASURES[function.__name__] = function
    return function


def single_seeds(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Split `table` by seed, in order."""
    return [rows for _, rows in table.groupby("seed")]


def pool_seeds(table: pd.DataFrame, series: str) -> list[Point]:
    """Return the curve of `series`, shortest first: seeds pooled, with Wilson's 95 % interval.

    Memories are means over seeds.  Raises NotTestable if the table holds no such series.
    """
    by_length: dict[float, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        if row["series"] == series and row["n"] > 0 and not math.isnan(row["accuracy"]):
            by_length.setdefault(float(row["haystack_tok"]), []).append(row)
    if not by_length:
        raise NotTestable(f"the table holds no measured rows of {series}")
    return [_pool(tok, rows) for tok, rows in sorted(by_length.items())]


@measure
def accuracy_at_windows(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, windows: float
) -> Measurement:
    """Accuracy at the evaluated length nearest to `windows` times the base's window."""
    point = _nearest(pool_seeds(table, series), windows * context["window"], series)
    return Measurement(point.accuracy, f"at {point}, n = {point.n}")


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
    bound = context["train_tok"] if windows is None else windows * context["window"]
    bound = bound if tok is None else tok
    curve = [p for p in pool_seeds(table, series) if p.tok <= 1.05 * bound]
    if not curve or curve[-1].tok < bound / 2:
        raise NotTestable(f"{series} was not evaluated up to {bound:,.0f} tokens")
    worst = min(curve, key=lambda p: p.accuracy)
    note = f"lowest of {len(curve)} lengths to {curve[-1].tok:,.0f} tok, at {worst}"
    return Measurement(worst.accuracy, note)


@measure
def accuracy_kept_past_window(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str
) -> Measurement:
    """Best accuracy from 1.5 windows on, divided by the best inside the window."""
    curve, window = pool_seeds(table, series), context["window"]
    inside = [p.accuracy for p in curve if p.tok <= window]
    past = [p for p in curve if p.tok >= 1.5 * window]
    if not inside or not past:
        raise NotTestable(f"{series} was not evaluated on both sides of {window:,.0f} tokens")
    if max(inside) == 0:
        raise NotTestable(f"{series} never answers, inside its window either")
    best = max(past, key=lambda p: p.accuracy)
    note = f"{best.accuracy:.3f} at {best} (n = {best.n}) against {max(inside):.3f} inside"
    return Measurement(best.accuracy / max(inside), note)


@measure
def windows_until_fall(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, level: float
) -> Measurement:
    """Length, in windows, where accuracy first falls below `level` (interpolated in log length).

    The longest evaluated length if it never does, 0 if the shortest is already below.
    """
    curve, window = pool_seeds(table, series), context["window"]
    below = next((i for i, p in enumerate(curve) if p.accuracy < level), None)
    if below is None:
        note = f"still {curve[-1].accuracy:.3f} at {curve[-1]}, the longest evaluated"
        return Measurement(curve[-1].tok / window, note)
    if below == 0:
        return Measurement(0.0, f"below {level} at the shortest, {curve[0]}")
    a, b = curve[below - 1], curve[below]
    share = (a.accuracy - level) / (a.accuracy - b.accuracy)
    tok = a.tok * (b.tok / a.tok) ** share
    note = f"about {tok:,.0f} tok; {a.accuracy:.3f} at {a}, {b.accuracy:.3f} at {b}"
    return Measurement(tok / window, note)


@measure
def memory_exponent(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, from_windows: float = 0.0
) -> Measurement:
    """Exponent p of memory ~ length^p over the measured lengths: 0 is constant, 1 is linear.

    Least squares in log-log from `from_windows` windows on (a short document weighs less than the
    question), over a factor of four in length.  The adapter is not counted.
    """
    shortest = max(1.0, from_windows * context["window"])
    curve = [p for p in pool_seeds(table, series) if p.tok >= shortest and p.gen_memory_mib > 0]
    if len(curve) < 3 or curve[-1].tok < 4 * curve[0].tok:
        raise NotTestable(f"too few lengths with a measured memory of {series}")
    a, b = curve[0], curve[-1]
    slope, _ = statistics.linear_regression(
        [math.log(p.tok) for p in curve], [math.log(p.gen_memory_mib) for p in curve]
    )
    note = f"{_mib(a.gen_memory_mib)} MiB at {a}, {_mib(b.gen_memory_mib)} MiB at {b}"
    return Measurement(slope, note)


@measure
def largest_memory_mib(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str
) -> Measurement:
    """Largest memory for generation at any length, adapter not counted."""
    curve = [p for p in pool_seeds(table, series) if p.gen_memory_mib >= 0]
    if not curve:
        raise NotTestable(f"the memory of {series} was not measured")
    most = max(curve, key=lambda p: p.gen_memory_mib)
    return Measurement(most.gen_memory_mib, f"at {most}")


@measure
def memory_share_with_adapter(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, of: str
) -> Measurement:
    """Memory of `series`, adapter counted, over that of `of`, at the longest length of `of`."""
    ours = [p for p in pool_seeds(table, series) if p.gen_memory_mib + p.adapter_mib >= 0]
    theirs = [p for p in pool_seeds(table, of) if p.gen_memory_mib > 0]
    if not ours or not theirs:
        raise NotTestable(f"the memory of {series} or of {of} was not measured")
    full = theirs[-1]
    point = _nearest(ours, full.tok, series)
    counted = point.gen_memory_mib + point.adapter_mib
    note = f"{_mib(counted)} of {_mib(full.gen_memory_mib)} MiB at {point}"
    return Measurement(counted / full.gen_memory_mib, note)


@measure
def highest_plausible_accuracy(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, min_n: int
) -> Measurement:
    """Upper end of Wilson's 95 % interval of the accuracy over all lengths and seeds.

    For a control that should be at chance: small means that nothing above it is plausible.
    """
    curve = pool_seeds(table, series)
    n = sum(p.n for p in curve)
    if n < min_n:
        raise NotTestable(f"{n} questions of {series} cannot exclude luck, {min_n} would")
    hits = round(sum(p.accuracy * p.n for p in curve))
    return Measurement(wilson(hits, n)[1], f"{hits} of {n:,} correct, over all lengths")


def _pool(tok: float, rows: list[dict[str, Any]]) -> Point:
    n = sum(int(row["n"]) for row in rows)
    hits = round(sum(row["accuracy"] * row["n"] for row in rows))
    chunks = [row["n_chunks"] for row in rows if row["n_chunks"] == row["n_chunks"]]
    return Point(
        tok=tok,
        n_chunks=int(max(chunks, default=0)),
        n=n,
        accuracy=hits / n,
        ci_low=wilson(hits, n)[0],
        ci_high=wilson(hits, n)[1],
        gen_memory_mib=statistics.fmean(row["gen_memory_mib"] for row in rows),
        adapter_mib=statistics.fmean(row["adapter_mib"] for row in rows),
    )


def _nearest(curve: list[Point], wanted_tok: float, series: str) -> Point:
    """Return the point whose length is nearest to `wanted_tok`, if it is near enough."""
    point = min(curve, key=lambda p: abs(math.log(max(p.tok, 1) / wanted_tok)))
    if not 1 / NEAR <= point.tok / wanted_tok <= NEAR:
        raise NotTestable(f"{series} was not evaluated near {wanted_tok:,.0f} tokens")
    return point


def _mib(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
