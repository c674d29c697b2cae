"""The figures of the papers, drawn from results tables; the only place that knows matplotlib.

Nothing here computes a result.  Saved SVGs are the same bytes for the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import statistics
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
from .measures_qa import by_method

_COLOURS = sns.color_palette("colorblind")
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
class _Style:
    label: str
    colour: tuple[float, float, float]
    marker: str
    dashes: str = "-"
    hollow: bool = False


_STYLES = {
    "base_with_context": _Style("base, document in context", _COLOURS[1], "s"),
    "d2l": _Style("D2L", _COLOURS[0], "o"),
    "wrong_document": _Style("D2L, wrong document", _COLOURS[4], "D", "-", hollow=True),
    "base_without_context": _Style("base, no document", (0.25, 0.25, 0.25), "x", ":"),
}
_QA_STYLES = {
    "base_with_context": _Style("base, document in context", _COLOURS[1], "s"),
    "base_without_context": _Style("base, no document", (0.25, 0.25, 0.25), "X"),
    "truncated_context": _Style("base, half of the document", _COLOURS[5], "s", hollow=True),
    "selective_context": _Style("selective context", (0.55, 0.55, 0.55), "."),
    "retrieved": _Style("best chunk (BM25)", _COLOURS[2], "v"),
    "d2l": _Style("D2L", _COLOURS[0], "o"),
    "d2l_with_truncated_context": _Style("D2L and half of the document", _COLOURS[9], "o"),
    "wrong_document": _Style("D2L, wrong document", _COLOURS[4], "D", hollow=True),
    "with_context_and_adapter": _Style("document in prompt, adapter", _COLOURS[0], "o"),
    "d2l_swapped": _Style("D2L of the question", _COLOURS[3], "o"),
    "document_alone": _Style("document, no question", (0.5, 0.5, 0.5), "P"),
    "cd_oracle": _Style("context distillation, oracle", _COLOURS[3], "^"),
    "cd_generated": _Style("context distillation, other questions", _COLOURS[3], "^", hollow=True),
}
_FIG3_AXES = (
    ("context_ratio", "share of the document in the prompt", False),
    ("update_s", "update latency (s)", True),
    ("update_mib", "peak memory of the update (MiB)", True),
)
_PART_COLOURS = [_COLOURS[i] for i in (0, 3, 2, 8, 6)]
_WITH_ADAPTER = _Style("D2L, adapter counted", _COLOURS[9], "o", "--", hollow=True)


class PaperFigure(Figure):
    """A figure that notebooks display without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        with _look():
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
    with _look():
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
    with _look():
        figure = PaperFigure(figsize=(7.2, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        ops = list(dict.fromkeys(errors["op"]))
        dtypes = list(dict.fromkeys(errors["dtype"]))
        for op, colour in zip(ops, _COLOURS, strict=False):
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
            right.barh(at, values, 0.4, label=direction, color=_COLOURS[int(offset > 0)])
        right.axvline(1, color="black", linewidth=0.8)
        right.set(xscale="log", xlabel="times as fast as the written form")
        right.set_yticks(range(len(sizes)), [f"{op}\n{size}" for op, size in sizes], fontsize=5.5)
        right.invert_yaxis()
        right.legend()
    return figure


def draw_fig3(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw relative performance against context ratio, update latency and update memory.

    One point a method (seeds and numbers of facts averaged), as figure 3; ``metric`` names what
    the performance is.  A method without a positive time or memory stands at the left edge.
    """
    points = by_method(table, ["relative", "context_ratio", "update_s", "update_mib"])
    with _look():
        figure = PaperFigure(figsize=(7.2, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (column, label, log) in zip(panels, _FIG3_AXES, strict=True):
            positive = [v for v in points[column] if v > 0]
            edge = min(positive) / 3 if log and positive else 0.0
            if log:
                axes.set_xscale("log")
            for series, part, x, y in points[["series", "part", column, "relative"]].itertuples(
                index=False
            ):
                if x != x:
                    continue
                style = _QA_STYLES.get(series, _Style(series, (0.5, 0.5, 0.5), "."))
                _plot(axes, [max(x, edge)], [y], dataclasses.replace(style, dashes=""))
                if series == "selective_context" and not log:
                    axes.annotate(f"{float(part):.0%}", (x, y), (4, -7), fontsize=6, color="0.4",
                                  textcoords="offset points")  # fmt: skip
            axes.set_xlabel(label)
            axes.axhline(1.0, color="0.6", linewidth=0.7, zorder=1)
        panels[0].set_ylabel(
            f"{metric.capitalize()} relative to the base\nwith the document in its prompt"
        )
        panels[0].set_ylim(bottom=min(-0.03, min(points["relative"]) - 0.03))
        found = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4,
                      frameon=False, handletextpad=0.2, columnspacing=1.2)  # fmt: skip
        figure.suptitle(f"Answering about a document, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def draw_fig1(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw performance, update latency and update memory of D2L and of distillation as bars."""
    points = by_method(table, ["relative", "update_s", "update_mib"])
    points = points[(points["part"] != "iterative") & (points["series"] != "base_with_context")]
    styles = [_QA_STYLES[str(series)] for series in points["series"]]
    with _look():
        figure = PaperFigure(figsize=(7.2, 1.9), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharey=True)
        labels = (f"{metric}, relative", "update latency (s)", "update memory (MiB)")
        for axes, column, label in zip(
            panels, ("relative", "update_s", "update_mib"), labels, strict=True
        ):
            fills = [(*s.colour, 0.45 if s.hollow else 1.0) for s in styles]
            bars = axes.barh(range(len(points)), points[column], color=fills)
            axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=7)
            axes.set(xlabel=label, xscale="linear" if column == "relative" else "log")
            axes.margins(x=0.2)
            axes.grid(visible=False, axis="y")
        panels[0].set_yticks(range(len(points)), [s.label for s in styles])
        panels[0].invert_yaxis()
        figure.suptitle(f"Internalising a document, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def draw_fig6(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw performance relative to the base over training steps, single seeds faint."""
    with _look():
        figure = PaperFigure(figsize=(4.4, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for series in ("d2l", "wrong_document"):
            style = _QA_STYLES[series]
            rows = table[table["series"] == series]
            rows = rows.assign(step=rows["part"].astype(int)).sort_values("step")
            for _, one in rows.groupby("seed"):
                axes.plot(one["step"], one["relative"], color=style.colour, alpha=0.35, lw=0.8)
            at, mean = _mean(rows, "step", "relative")
            _plot(axes, at, mean, style)
        axes.axhline(1.0, color="0.6", linewidth=0.7, zorder=1)
        axes.set(
            xlabel="training step", ylabel="recall relative to the base\nthat reads the document"
        )
        axes.legend(frameon=False)
        axes.set_title(f"Training, scale {scale}, {title}")
        sns.despine(fig=figure)
    return figure


def draw_by_facts(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw the metric over the number of facts, one line a method, single seeds faint.

    Parts of one series are told apart by colour, the base and the controls keep their styles.
    """
    named = table.assign(part=table["part"].fillna("").astype(str))
    with _look():
        figure = PaperFigure(figsize=(5.0, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        counts = sorted(set(named["n_facts"]))
        parts = [p for p in dict.fromkeys(named["part"]) if p]
        for series, part in named[["series", "part"]].drop_duplicates().itertuples(index=False):
            rows = pd.DataFrame(named[(named["series"] == series) & (named["part"] == part)])
            style = _QA_STYLES.get(series, _Style(series, (0.5, 0.5, 0.5), "."))
            if part and series != "wrong_document":
                colour = _PART_COLOURS[parts.index(part) % len(_PART_COLOURS)]
                style = dataclasses.replace(style, label=f"{style.label}: {part}", colour=colour)
            for _, one in rows.groupby("seed"):
                there, values = _mean(pd.DataFrame(one), "n_facts", metric)
                at = [counts.index(n) for n in there]
                axes.plot(at, values, color=style.colour, alpha=0.3, linewidth=0.8)
            there, values = _mean(rows, "n_facts", metric)
            _plot(axes, [float(counts.index(n)) for n in there], values, style)
        axes.set_xticks(range(len(counts)), [str(n) for n in counts])
        axes.set(xlabel="facts in the document", ylabel=metric, ylim=(-0.04, 1.06))
        found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=2,
                      frameon=False)  # fmt: skip
        figure.suptitle(f"Answering about a document, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def save_figure(figure: Figure, folder: Path, name: str = "figure") -> tuple[Path, Path]:
    """Write `name`.svg and `name`.png into `folder` atomically; the same figure, the same bytes."""
    with _look():
        return (
            artifacts.write_bytes(folder / f"{name}.svg", _render(figure, "svg")),
            artifacts.write_bytes(folder / f"{name}.png", _render(figure, "png")),
        )


@contextlib.contextmanager
def _look() -> Iterator[None]:
    style: dict[Any, Any] = {**sns.axes_style("whitegrid"), **_RC}
    with mpl.rc_context(style):
        yield


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _draw_accuracy(axes: Axes, table: pd.DataFrame, name: str, style: _Style) -> None:
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
    _plot(axes, lengths, [p.accuracy for p in curve], style)


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
            _plot(axes, [tok for tok, _ in measured], [mib for _, mib in measured], style)
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


def _mean(rows: pd.DataFrame, by: str, column: str) -> tuple[list[float], list[float]]:
    """Return the values of ``by``, ascending, and the mean of ``column`` at each."""
    at = sorted(set(rows[by]))
    return at, [statistics.fmean(rows[rows[by] == x][column]) for x in at]


def _curve(table: pd.DataFrame, series: str) -> list[Point]:
    try:
        return pool_seeds(table, series)
    except NotTestable:
        return []


def _plot(axes: Axes, x: list[float], y: list[float], style: _Style) -> None:
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
