"""The figures about answering questions: methods, numbers of facts, training (see `figures`)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .figures import COLOURS, PaperFigure, Style, look, plot
from .intervals import wilson
from .measures_qa import by_method

_QA_STYLES = {
    "base_with_context": Style("base, document in context", COLOURS[1], "s"),
    "base_without_context": Style("base, no document", (0.25, 0.25, 0.25), "X"),
    "truncated_context": Style("base, half of the document", COLOURS[5], "s", hollow=True),
    "selective_context": Style("selective context", (0.55, 0.55, 0.55), "."),
    "retrieved": Style("best chunk (BM25)", COLOURS[2], "v"),
    "d2l": Style("D2L", COLOURS[0], "o"),
    "d2l_routed": Style("D2L of the best part (BM25)", COLOURS[0], "o", hollow=True),
    "retrieved_part": Style("best part in the prompt (BM25)", COLOURS[2], "v", hollow=True),
    "d2l_with_truncated_context": Style("D2L and half of the document", COLOURS[9], "o"),
    "wrong_document": Style("D2L, wrong document", COLOURS[4], "D", hollow=True),
    "with_context_and_adapter": Style("document in prompt, adapter", COLOURS[0], "o"),
    "replaced_context": Style("base, other text in context", COLOURS[5], "s", hollow=True),
    "d2l_of_assistant": Style("D2L of an assistant's prompt", COLOURS[6], "D", hollow=True),
    "d2l_swapped": Style("D2L of the question", COLOURS[3], "o"),
    "document_alone": Style("document, no question", (0.5, 0.5, 0.5), "P"),
    "cd_oracle": Style("context distillation, oracle", COLOURS[3], "^"),
    "cd_generated": Style("context distillation, other questions", COLOURS[3], "^", hollow=True),
}
_FIG3_AXES = (
    ("context_ratio", "share of the document in the prompt", False),
    ("update_s", "update latency (s)", True),
    ("update_mib", "peak memory of the update (MiB)", True),
)
_PART_COLOURS = [COLOURS[i] for i in (0, 3, 2, 8, 6)]


def draw_fig3(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw relative performance against context ratio, update latency and update memory.

    One point a method (seeds and numbers of facts averaged), as figure 3; ``metric`` names what
    the performance is.  A method without a positive time or memory stands at the left edge.  A
    table with several sets of questions gets a row of panels for each, with what is divided by.
    """
    points = by_method(
        table, [metric, "exact", "relative", "context_ratio", "update_s", "update_mib"]
    )
    rows = list(points.groupby("set", sort=False)) if "set" in points else [("", points)]
    with look():
        figure = PaperFigure(figsize=(7.2, 1.1 + 2.2 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), 3, sharey="row", squeeze=False)
        for panels, (name, chosen) in zip(grid.tolist(), rows, strict=True):
            _fig3_row(panels, pd.DataFrame(chosen), metric)
            if name:
                base = f"{chosen[metric].iloc[0]:.2f}, exactly {chosen['exact'].iloc[0]:.2f}"
                panels[0].set_title(f"{name} (base in context {base})", loc="left", fontsize=8)
        found: dict[str, Any] = {}
        for axes in grid[:, 0]:
            found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4,
                      frameon=False, handletextpad=0.2, columnspacing=1.2)  # fmt: skip
        figure.suptitle(f"Answering about a document, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def _fig3_row(panels: Sequence[Axes], points: pd.DataFrame, metric: str) -> None:
    """Draw one point a method into three panels; where nothing can be divided by, say so."""
    known = points.dropna(subset=["relative"])
    for axes, (column, label, log) in zip(panels, _FIG3_AXES, strict=True):
        positive = [v for v in points[column] if v > 0]
        edge = min(positive) / 3 if log and positive else 0.0
        if log:
            axes.set_xscale("log")
            if positive and max(positive) < 200 * edge:  # else matplotlib labels every step
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        shown = known[["series", "part", column, "relative"]].dropna()
        for series, part, x, y in shown.itertuples(index=False):
            style = _QA_STYLES.get(series, Style(series, (0.5, 0.5, 0.5), "."))
            plot(axes, [max(x, edge)], [y], dataclasses.replace(style, dashes=""))
            if series == "selective_context" and not log:
                axes.annotate(f"{float(part):.0%}", (x, y), (4, -7), fontsize=6, color="0.4",
                              textcoords="offset points")  # fmt: skip
        axes.set_xlabel(label)
        axes.axhline(1.0, color="0.6", linewidth=0.7, zorder=1)
        if known.empty:
            axes.text(0.5, 0.4, "nothing to divide by", transform=axes.transAxes, ha="center")
    panels[0].set_ylabel(
        f"{metric.capitalize()} relative to the base\nwith the document in its prompt"
    )
    panels[0].set_ylim(bottom=min(-0.03, min(known["relative"], default=0.0) - 0.03))


def draw_tab11(
    table: pd.DataFrame, *, scale: str, title: str, metric: str, paper: Mapping[str, float]
) -> Figure:
    """Draw the base's score of every set by number of facts, and how often *unknown* is said.

    Public sets, which have 0 facts, get one bar.  Bars carry Wilson's 95 % intervals (no score
    between 0 and 1 varies more than a coin of its mean; what several seeds are asked counts once).
    ``paper`` is the paper's score of the set that each of ours stands for.
    """
    sets = list(dict.fromkeys(table["set"]))
    counts = sorted(set(table["n_facts"]) - {0})
    base = pd.DataFrame(table[table["series"] == "base_with_context"])
    replies = by_method(table, ["unknown"])
    once = pd.DataFrame(table[table["seed"] == min(table["seed"])])
    replies["n"] = by_method(once, ["unknown"])["n"]
    with look():
        figure = PaperFigure(figsize=(7.2, 1.6 + 0.3 * len(sets)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        shares = [(i, len(counts), n, f"{n} facts") for i, n in enumerate(counts)]
        for i, of, count, label in [*shares, (0, 1, 0, "public set")]:
            rows = pd.DataFrame(base[base["n_facts"] == count])
            rows = rows.groupby("set", sort=False).first()
            if rows.empty:
                continue
            shade = (*COLOURS[1], 1 - 0.3 * i) if count else COLOURS[5]
            at = _bars(left, sets, i, of, rows, metric, shade, label)
            left.plot(rows["exact"], at, "o", color="black", markersize=2.5, label="exact match")
        for name in paper:
            at = sets.index(name) if name in sets else None
            if at is not None:
                left.plot([paper[name]] * 2, [at - 0.45, at + 0.45], color="black",
                          label="paper, gemma-2-2b-it (F1)")  # fmt: skip
        named = list(dict.fromkeys(replies["series"]))
        for i, series in enumerate(named):
            rows = pd.DataFrame(replies[replies["series"] == series]).set_index("set")
            style = _QA_STYLES[str(series)]
            _bars(right, sets, i, len(named), rows, "unknown", style.colour, style.label)
        left.set_yticks(range(len(sets)), sets)
        left.invert_yaxis()
        left.set_xlabel(f"{metric.capitalize()} of the base, document in its prompt")
        right.set_xlabel("share of replies that are “unknown”")
        for axes in (left, right):
            axes.set_xlim(0, 1.03)
            axes.grid(visible=False, axis="y")
            found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            axes.legend(found.values(), found.keys(), loc="upper center", frameon=False,
                        bbox_to_anchor=(0.5, -0.18), ncols=2)  # fmt: skip
        figure.suptitle(f"What can be asked, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def _bars(
    axes: Axes,
    sets: Sequence[str],
    i: int,
    of: int,
    rows: pd.DataFrame,
    column: str,
    colour: Any,
    label: str,
) -> list[float]:
    """Draw the ``i``-th of ``of`` bars of every set in ``rows``, with intervals; return where."""
    height = 0.8 / of
    at = [sets.index(str(name)) + (i - (of - 1) / 2) * height for name in rows.index]
    values = [float(v) for v in rows[column]]
    ends = [wilson(v * n, n) for v, n in zip(values, rows["n"], strict=True)]
    low, high = zip(*ends, strict=True)
    reach = [
        [v - a for v, a in zip(values, low, strict=True)],
        [b - v for v, b in zip(values, high, strict=True)],
    ]
    lines = {"elinewidth": 0.7, "ecolor": "0.3"}
    axes.barh(at, values, height, color=colour, label=label, xerr=reach, error_kw=lines)
    return at


def draw_fig1(table: pd.DataFrame, *, scale: str, title: str, metric: str) -> Figure:
    """Draw performance, update latency and update memory of D2L and of distillation as bars."""
    points = by_method(table, ["relative", "update_s", "update_mib"])
    points = points[(points["part"] != "iterative") & (points["series"] != "base_with_context")]
    styles = [_QA_STYLES[str(series)] for series in points["series"]]
    with look():
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
    with look():
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
            plot(axes, at, mean, style)
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

    Parts of one series are told apart by colour, but for those of a wrong document.
    Public sets, which have 0 facts, stand right of the lines as single points.
    """
    named = table.assign(part=table["part"].fillna("").astype(str))
    public = named[named["n_facts"] == 0]
    with look():
        figure = PaperFigure(figsize=(5.0, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        counts = sorted(set(named["n_facts"]) - {0})
        beside = list(dict.fromkeys(public["set"])) if len(public) else []
        parts = [p for p in dict.fromkeys(named["part"]) if p]
        for series, part in named[["series", "part"]].drop_duplicates().itertuples(index=False):
            every = pd.DataFrame(named[(named["series"] == series) & (named["part"] == part)])
            rows = pd.DataFrame(every[every["n_facts"] > 0])
            style = _QA_STYLES.get(series, Style(series, (0.5, 0.5, 0.5), "."))
            if part and series != "wrong_document":
                colour = _PART_COLOURS[parts.index(part) % len(_PART_COLOURS)]
                style = dataclasses.replace(style, label=f"{style.label}: {part}", colour=colour)
            for _, one in rows.groupby("seed"):
                there, values = _mean(pd.DataFrame(one), "n_facts", metric)
                at = [counts.index(n) for n in there]
                axes.plot(at, values, color=style.colour, alpha=0.3, linewidth=0.8)
            there, values = _mean(rows, "n_facts", metric)
            plot(axes, [float(counts.index(n)) for n in there], values, style)
            for i, name in enumerate(beside, len(counts)):
                one = every[(every["n_facts"] == 0) & (every["set"] == name)]
                if len(one):
                    plot(axes, [float(i)], [statistics.fmean(one[metric])], style)
        axes.set_xticks(range(len(counts) + len(beside)), [*map(str, counts), *beside])
        axes.set(
            xlabel="facts in the document" + ", public sets" * bool(beside),
            ylabel=metric,
            ylim=(-0.04, 1.06),
        )
        found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=2,
                      frameon=False)  # fmt: skip
        figure.suptitle(f"Answering about a document, scale {scale}, {title}", fontsize=9)
        sns.despine(fig=figure)
    return figure


def _mean(rows: pd.DataFrame, by: str, column: str) -> tuple[list[float], list[float]]:
    """Return the values of ``by``, ascending, and the mean of ``column`` at each."""
    at = sorted(set(rows[by]))
    return at, [statistics.fmean(rows[rows[by] == x][column]) for x in at]
