"""Figure 5: how long the documents and the questions are that a hypernetwork was trained on."""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pandas as pd

from ..artifacts import LENGTH_COLUMNS
from ..data.fact_training import FactTraining
from ..figures_data import draw_fig5
from ..measures_data import lengths
from ..train import read_curve
from .base import Request, need_gpu_and_model
from .fact_fitting import NEXT
from .facts import FactRun
from .qa import SHIPS, QaExperiment
from .shipped import load, shipped_seeds, weights_dir

PAPER = {
    "document": {"mean": 277.3, "median": 274, "std": 99.7, "min": 32, "max": 2344},
    "question and answer": {"mean": 72.4, "median": 61, "std": 40.6, "min": 18, "max": 1024},
}
"""Tokens; the paper's figure 5."""
EVERY = 10
"""Steps of training from one that is counted to the next."""


class Lengths(QaExperiment):
    """Rows are how often each length occurs; see `artifacts.LENGTH_COLUMNS`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its table."""
        return LENGTH_COLUMNS

    def context(self, wanted: FactRun) -> dict[str, Any]:
        """Say how long a chunk may be."""
        return {"chunk_tok": wanted.chunk.max_tok}

    def rows(self, asked: Request, retrain: bool) -> Iterable[pd.DataFrame]:
        """Draw the last stage's stream of every seed that ships, at the levels it was trained at.

        Other seeds and settings are counted at the last level.  Raises ValueError for ``retrain``:
        nothing is trained.
        """
        if retrain:
            raise ValueError("fig5 counts what training reads: there is nothing to train")
        wanted = self.config(asked.scale, {"train.seed": asked.seed, **asked.overrides})
        if asked.scale == "paper":
            need_gpu_and_model(self.id, wanted.base)
        tokenizer = load(wanted).tokenizer
        usual = asked.seed == 0 and not asked.overrides
        shipped = shipped_seeds(SHIPS, asked.scale) if usual else []
        for seed in shipped or [asked.seed]:
            drawn = seed + NEXT * len(wanted.before)
            stream = FactTraining(tokenizer, wanted.stream, wanted.chunk, drawn)
            counts: Counter[tuple[str, int]] = Counter()
            for step, level in _levels(wanted, asked.scale, seed if shipped else None):
                for example in stream.batch(step, wanted.train.docs_per_step, level):
                    counts["document", sum(map(len, example.chunks))] += 1
                    for q in example.queries:
                        counts["question and answer", len(q.prompt) + len(q.answer)] += 1
            rows = [(what, tok, n, seed) for (what, tok), n in sorted(counts.items())]
            yield pd.DataFrame(rows, columns=list(LENGTH_COLUMNS))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the statistics of each kind, here and in the paper, in tokens."""
    rows = {
        (what, where): found
        for what, paper in PAPER.items()
        for where, found in (("here", lengths(table, what)), ("paper", paper))
    }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def _levels(wanted: FactRun, scale: str, shipped: int | None) -> list[tuple[int, float]]:
    """List the steps that are counted, from 0, with their level of the curriculum."""
    if shipped is None:
        return [(step, 1.0) for step in range(0, wanted.train.steps, EVERY)]
    curve = read_curve(weights_dir(SHIPS, scale, shipped))
    return [(int(p["step"]) - 1, p["level"]) for p in curve if p["step"] % EVERY == 0]


FIGURE = Lengths("fig5", draw=functools.partial(draw_fig5, paper=PAPER))
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
