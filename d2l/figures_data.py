"""The figures of the data itself: how long it is, and what is said about it (see `figures`)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import COLOURS, PaperFigure, look
from .measures_data import lengths

_LINE_INCHES = 0.155
_HEAD = ("what is where", "reply", "F1", "recall")
_AT = (0.02, 0.45, 0.88, 0.94)
_ROWS = {
    "d2l": "document in the adapter",
    "d2l_swapped": "question in the adapter, document in the prompt",
    "document_alone": "document in the prompt, no question",
}


def draw_fig5(
    table: pd.DataFrame,
    *,
    scale: str,
    title: str,
    chunk_tok: int,
    paper: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Draw a histogram of lengths of each kind, with its numbers and those of the ``paper``."""
    with look():
        figure = PaperFigure(figsize=(7.2, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, what in zip(figure.subplots(1, 2), paper, strict=True):
            rows, here = table[table["what"] == what], lengths(table, what)
            width = max(1, round((here["max"] - here["min"]) / 40))
            bins = np.arange(here["min"] - 0.5, here["max"] + width + 0.5, width)
            axes.hist(rows["n_tok"], bins=bins, weights=rows["n"], color=COLOURS[0], linewidth=0)
            axes.axvline(here["mean"], color="black", linestyle="--", linewidth=0.9)
            if what == "document":
                axes.axvline(chunk_tok, color="0.4", linestyle=":", linewidth=1.2)
            axes.set(xlabel=f"{what} (tokens)", xlim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(f"here {_numbers(here)}\npaper {_numbers(paper[what])}", fontsize=7.5)
        n_runs = len(set(table["seed"]))
        figure.axes[0].set_ylabel(f"counted in {n_runs} training run{'s' * (n_runs > 1)}")
        figure.suptitle(f"Lengths of the training data, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def draw_fig8(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Write each document with its question, and the replies side by side with their scores."""
    lines: list[list[tuple[float, str, dict[str, Any]]]] = []
    for _, rows in table.groupby(["document", "question"], sort=False):
        for paragraph in rows["document"].iloc[0].splitlines():
            lines += [[(0.0, text, {})] for text in textwrap.wrap(paragraph, 118)]
        asked = f"{rows['question'].iloc[0]}  [{rows['answer'].iloc[0]}]"
        lines.append([(0.0, asked, {"fontweight": "bold"})])
        lines.append([(x, text, {"color": "0.4"}) for x, text in zip(_AT, _HEAD, strict=True)])
        for row in rows.to_dict("records"):
            first, *more = textwrap.wrap(row["reply"], 56) or ["(nothing)"]
            shade = {0.0: COLOURS[3], 1.0: COLOURS[2]}.get(row["f1"], COLOURS[1])
            cells = (_ROWS[row["series"]], first, f"{row['f1']:.2f}", f"{row['recall']:.2f}")
            colours = ("0", shade, "0", "0")
            lines.append(
                [(x, c, {"color": k}) for x, c, k in zip(_AT, cells, colours, strict=True)]
            )
            lines += [[(_AT[1], text, {"color": shade})] for text in more]
        lines.append([])
    with look():
        figure = PaperFigure(figsize=(7.4, 0.5 + _LINE_INCHES * len(lines)), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(len(lines), 0))
        axes.set_axis_off()
        for at, line in enumerate(lines):
            for x, text, how in line:
                axes.text(x, at, text, fontsize=7.5, va="top", parse_math=False, **how)
            if not line and at + 1 < len(lines):
                axes.axhline(at + 0.4, color="0.8", linewidth=0.6)
        figure.suptitle(f"A document or its question internalised, scale {scale}, {title}",
                        fontsize=9)  # fmt: skip
    return figure


def _numbers(found: Mapping[str, float]) -> str:
    middle = f"mean {found['mean']:.0f}, median {found['median']:.0f}, std {found['std']:.0f}"
    return f"{middle}, {found['min']:,.0f} to {found['max']:,.0f}"
