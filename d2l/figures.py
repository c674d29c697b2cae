"""The figures of the papers, drawn from results tables: their look, figure 2 and the kernels' page.

Nothing here computes a result; only this module and its kin (`figures_qa`, `figures_data`) know
matplotlib.  Saved SVGs are the same bytes for the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import artifacts
from .measures import NotTestable, Point, pool_seeds, single_seeds

COLOURS = sns.color_palette("colorblind")
_RC = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.linewidth": 0.7,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.hashsalt": "d2l",
    "savefig.dpi": 220,
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a series is drawn: label, colour (RGB, 0 to 1), marker, line, and whether hollow."""

    label: str
    colour: tuple[float, float, float]
    marker: str
    dashes: str = "-"
    hollow: bool = False


_STYLES = {
    "base_with_context": Style("base, document in context", COLOURS[1], "s"),
    "d2l": Style("D2L", COLOURS[0], "o"),
    "wrong_document": Style("D2L, wrong document", COLOURS[4], "D", "-", hollow=True),
    "base_without_context": Style("base, no document", (0.25, 0.25, 0.25), "x", ":"),
}
_WITH_ADAPTER = Style("D2L, adapter counted", COLOURS[9], "o", "--", hollow=True)


class PaperFigure(Figure):
    """A figure that notebooks display without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        with look():
            return _render(self, "png")


def draw_fig2(
    table: pd.DataFrame,
    *,
    scale: str,
    window: int,
    train_tok: int,
    title: str,
    chance: float = 1e-4,
) -> Figure:
    """Draw accuracy (top) and memory for generation (bottom) over haystack length, as figure 2.

    `table` has the columns of `artifacts.COLUMNS`.  Several seeds are pooled into one line with a
    95 % band, single seeds stay visible as faint lines.  `window` (of the base) and `train_tok`
    (longest training document) are marked; `title` names the base model.  Missing series and
    missing memories are left out; a series measured at 0 tokens alone holds for every length.
    """
    artifacts.check_columns(table, artifacts.COLUMNS, "the table of figure 2")
    with look():
        figure = PaperFigure(figsize=(4.6, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
        for name, style in _STYLES.items():
            _draw_accuracy(top, table, name, style)
        top.axhline(chance, color="0.35", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1)
        top.set(ylabel="exact match", ylim=(-0.06, 1.06), yticks=[0, 0.25, 0.5, 0.75, 1])
        figure.suptitle(f"Needle in a haystack, scale {scale}\n{title}", fontsize=9)
        _draw_memory(bottom, table)
        bottom.set(ylabel="memory for generation (MiB)", xlabel="haystack length (tokens)")
        _scale_lengths(bottom, table)
        for axes in (top, bottom):
            for x, kind in ((train_tok, (0, (4, 2))), (window, "-")):
                axes.axvline(x, color="0.45", linewidth=0.9, linestyle=kind, zorder=1)
        _label_lines(top, train_tok, window)
        top.plot([], [], color="0.35", linewidth=0.8, linestyle=(0, (1, 1.5)), label="chance")
        _legend(top, ["D2L", "base, document in context", "D2L, wrong document",
                      "base, no document", "chance"], (0.0, 0.47))  # fmt: skip
        _legend(
            bottom,
            ["base, KV cache", "D2L, adapter counted", "D2L, adapter not counted"],
            (0.0, 0.84),
        )
        sns.despine(fig=figure)
    return figure


def draw_kernels(errors: pd.DataFrame, speed: pd.DataFrame) -> PaperFigure:
    """Draw each op's error by dtype (left) and its speed over the written form by size (right)."""
    with look():
        figure = PaperFigure(figsize=(7.2, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        ops = list(dict.fromkeys(errors["op"]))
        dtypes = list(dict.fromkeys(errors["dtype"]))
        for op, colour in zip(ops, COLOURS, strict=False):
            for form, marker in (("torch", "o"), ("reference", "x")):
                rows = errors[(errors["op"] == op) & (errors["form"] == form)]
                at = [dtypes.index(dtype) + 0.15 * (ops.index(op) - 1.5) for dtype in rows["dtype"]]
                label = op if form == "torch" else None
                left.scatter(at, rows["error"], color=colour, marker=marker, s=22, label=label)
        left.set(yscale="log", ylabel="relative error from float64", xticks=range(len(dtypes)))
        left.set_xticklabels(dtypes)
        left.legend(title="ours o, written form x", frameon=True)

        ours = speed[speed["form"] == "ours"]
        sizes = list(dict.fromkeys(zip(ours["op"], ours["size"], strict=True)))
        for direction, offset in (("forward", -0.2), ("forward+backward", 0.2)):
            one = pd.DataFrame(ours[ours["direction"] == direction])
            found = dict(zip(zip(one["op"], one["size"], strict=True), one["speedup"], strict=True))
            values = [found[size] for size in sizes]
            at = [i + offset for i in range(len(sizes))]
            right.barh(at, values, 0.4, label=direction, color=COLOURS[int(offset > 0)])
        right.axvline(1, color="black", linewidth=0.8)
        right.set(xscale="log", xlabel="times as fast as the written form")
        right.set_yticks(range(len(sizes)), [f"{op}\n{size}" for op, size in sizes], fontsize=5.5)
        right.invert_yaxis()
        right.legend()
    return figure


def save_figure(figure: Figure, folder: Path, name: str = "figure") -> tuple[Path, Path]:
    """Write `name`.svg and `name`.png into `folder` atomically; the same figure, the same bytes."""
    with look():
        return (
            artifacts.write_bytes(folder / f"{name}.svg", _render(figure, "svg")),
            artifacts.write_bytes(folder / f"{name}.png", _render(figure, "png")),
        )


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Draw and save in the style of the house while this lasts."""
    style: dict[Any, Any] = {**sns.axes_style("whitegrid"), **_RC}
    with mpl.rc_context(style):
        yield


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _draw_accuracy(axes: Axes, table: pd.DataFrame, name: str, style: Style) -> None:
    curve = _curve(table, name)
    if not curve:
        return
    if curve[-1].tok == 0:
        line = {"color": style.colour, "linestyle": style.dashes, "zorder": 4}
        axes.axhline(curve[0].accuracy, label=style.label, **line)
        return
    singles = [_curve(rows, name) for rows in single_seeds(table)]
    for one in singles if len(singles) > 1 else []:
        lengths, accuracies = [p.tok for p in one], [p.accuracy for p in one]
        axes.plot(lengths, accuracies, color=style.colour, alpha=0.35, linewidth=0.8, zorder=2)
    lengths = [p.tok for p in curve]
    low, high = [p.ci_low for p in curve], [p.ci_high for p in curve]
    axes.fill_between(lengths, low, high, color=style.colour, alpha=0.16, linewidth=0)
    plot(axes, lengths, [p.accuracy for p in curve], style)


def _draw_memory(axes: Axes, table: pd.DataFrame) -> None:
    base = dataclasses.replace(_STYLES["base_with_context"], label="base, KV cache")
    without = dataclasses.replace(_STYLES["d2l"], label="D2L, adapter not counted")
    ours = _curve(table, "d2l")
    lines = [
        (base, [(p.tok, p.gen_memory_mib) for p in _curve(table, "base_with_context")]),
        (_WITH_ADAPTER, [(p.tok, p.gen_memory_mib + p.adapter_mib) for p in ours]),
        (without, [(p.tok, p.gen_memory_mib) for p in ours]),
    ]
    values: list[float] = []
    for style, points in lines:
        measured = [(tok, mib) for tok, mib in points if mib > 0]
        values += [mib for _, mib in measured]
        if measured:
            plot(axes, [tok for tok, _ in measured], [mib for _, mib in measured], style)
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
        return
    low, high = min(values) / 2.5, max(10 * min(values), 2.5 * max(values))
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator([10.0**k for k in decades]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _curve(table: pd.DataFrame, series: str) -> list[Point]:
    try:
        return pool_seeds(table, series)
    except NotTestable:
        return []


def plot(axes: Axes, x: list[float], y: list[float], style: Style) -> None:
    """Add one line or, without dashes, points of a series to ``axes``."""
    axes.plot(
        x,
        y,
        color=style.colour,
        marker=style.marker,
        linestyle=style.dashes,
        label=style.label,
        markerfacecolor="white" if style.hollow else style.colour,
        markeredgewidth=1.1,
        zorder=3,
        clip_on=False,
    )


def _scale_lengths(axes: Axes, table: pd.DataFrame) -> None:
    lengths = [float(tok) for tok in table["haystack_tok"] if tok > 0]
    low, high = min(lengths), max(lengths)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 2**0.3, high * 2**0.3)
    powers = range(math.ceil(math.log2(low) - 0.3), math.floor(math.log2(high) + 0.3) + 1)
    step = 1 if len(powers) <= 9 else 2
    last = powers[-1]
    axes.xaxis.set_major_locator(FixedLocator([2.0**p for p in powers if (last - p) % step == 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tok(value)))


def _label_lines(axes: Axes, train_tok: int, window: int) -> None:
    """Name the two vertical lines above the axes, on either side if they lie close together."""
    close = abs(math.log2(window / train_tok)) < 3
    left, right = ("right", "left") if close else ("center", "center")
    if close and window < train_tok:
        left, right = right, left
    for x, text, side in ((train_tok, "training length", left), (window, "window", right)):
        axes.annotate(f"{text}\n{x:,} tok", (x, 1), (0, 2), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", ha=side, va="bottom", fontsize=7, color="0.3",
                      linespacing=0.95, annotation_clip=False)  # fmt: skip


def _legend(axes: Axes, order: list[str], place: tuple[float, float]) -> None:
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in order if label in found]
    if labels:
        axes.legend(
            [found[label] for label in labels],
            labels,
            loc="center left",
            bbox_to_anchor=place,
            framealpha=0.85,
            edgecolor="none",
            handlelength=2.4,
            borderpad=0.3,
        )


def _tok(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"
