"""Named numbers read off a table of question answering, for claims.toml (see d2l.measures).

A row is one method (``series`` with its ``part``) at one number of facts; seeds are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .measures import Measurement, NotTestable, measure

LEAST_DENOMINATOR = 0.3
"""A ratio to a base that answers less says nothing; the paper's lowest is 0.34 (table 11)."""


def cell(table: pd.DataFrame, column: str, series: str, part: str = "") -> float:
    """Return a column's mean over seeds and numbers of facts, weighted by questions.

    Raises NotTestable where the method was not run or the column not measured.
    """
    chosen = (table["series"] == series) & (table["part"].fillna("").astype(str) == part)
    rows = pd.DataFrame(table[chosen]).dropna(subset=[column])
    if rows.empty:
        raise NotTestable(f"{_name(series, part)} has no measured {column}")
    return float(np.average(rows[column], weights=rows["n"]))


@measure
def qa_value(
    table: pd.DataFrame, context: Mapping[str, Any], *, column: str, series: str, part: str = ""
) -> Measurement:
    """Read a method's own number, e.g. its recall."""
    value = cell(table, column, series, part)
    return Measurement(value, f"{column} of {_name(series, part)}")


@measure
def qa_relative(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    *,
    series: str,
    part: str = "",
    of: str = "",
    of_part: str = "",
) -> Measurement:
    """Read a method's score relative to the base with context, less that of ``of`` if named.

    Raises NotTestable where the base answers below `LEAST_DENOMINATOR`: exactly, where the metric
    is F1, which half rewards a mixture of two names that are compared; else by recall.
    """
    column = "exact" if context["metric"] == "f1" else "recall"
    base = cell(table, column, "base_with_context")
    if base < LEAST_DENOMINATOR:
        raise NotTestable(f"{column} of the base with the document in its prompt is {base:.3g}")
    less = cell(table, "relative", of, of_part) if of else 0.0
    value = cell(table, "relative", series, part)
    note = f"{value:.3g} of the base" + (f", {_name(of, of_part)} {less:.3g}" if of else "")
    return Measurement(value - less, note)


@measure
def qa_ratio(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    *,
    column: str,
    series: str,
    of: str,
    part: str = "",
    of_part: str = "",
) -> Measurement:
    """Divide a method's number by another's; NotTestable where the other is 0."""
    ours, theirs, note = _both(table, column, (series, part), (of, of_part))
    if theirs == 0:
        raise NotTestable(f"{column} of {_name(of, of_part)} is 0")
    return Measurement(ours / theirs, note)


@measure
def qa_f1_kept(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, part: str = ""
) -> Measurement:
    """Divide a method's F1 by its recall: what is left where it names the answer among other words.

    Raises NotTestable where it names hardly any (recall below 0.1).
    """
    f1, recall = cell(table, "f1", series, part), cell(table, "recall", series, part)
    if recall < 0.1:
        raise NotTestable(f"recall of {_name(series, part)} is {recall:.3g}")
    return Measurement(f1 / recall, f"{_name(series, part)}: F1 {f1:.3g}, recall {recall:.3g}")


@measure
def qa_difference(
    table: pd.DataFrame,
    context: Mapping[str, Any],
    *,
    column: str,
    series: str,
    of: str,
    part: str = "",
    of_part: str = "",
) -> Measurement:
    """Subtract another method's number from a method's."""
    ours, theirs, note = _both(table, column, (series, part), (of, of_part))
    return Measurement(ours - theirs, note)


@measure
def qa_gap(
    table: pd.DataFrame, context: Mapping[str, Any], *, series: str, part: str = ""
) -> Measurement:
    """Return the share of the base's gain from reading the document that a method reaches (recall).

    Raises NotTestable where reading gains the base less than 0.1.
    """
    low, high = (cell(table, "recall", f"base_{x}_context") for x in ("without", "with"))
    if high - low < 0.1:
        raise NotTestable(f"the base answers {low:.3g} without the document and {high:.3g} with it")
    ours = cell(table, "recall", series, part)
    note = (
        f"recall {low:.3g} without, {high:.3g} with the document, {_name(series, part)} {ours:.3g}"
    )
    return Measurement((ours - low) / (high - low), note)


def by_method(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Average ``columns`` over seeds and numbers of facts; one row a method (and set), in order.

    Rows in which a column is not known are left out of its mean.
    """
    keyed = table.assign(part=table["part"].fillna("").astype(str))
    keys = [key for key in ("set", "series", "part") if key in keyed]
    rows = []
    for _, group in keyed.groupby(keys, sort=False):
        known = {c: pd.DataFrame(group).dropna(subset=[c]) for c in columns}
        mean = {
            c: float(np.average(rows[c], weights=rows["n"])) if len(rows) else math.nan
            for c, rows in known.items()
        }
        named = {key: group[key].iloc[0] for key in keys}
        rows.append({**named, **mean, "n": int(np.sum(group["n"]))})
    return pd.DataFrame(rows)


def _both(
    table: pd.DataFrame, column: str, one: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float, str]:
    ours, theirs = cell(table, column, *one), cell(table, column, *other)
    return ours, theirs, f"{column}: {ours:.3g} of {_name(*one)}, {theirs:.3g} of {_name(*other)}"


def _name(series: str, part: str) -> str:
    return f"{series} ({part})" if part else series
