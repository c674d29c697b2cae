"""Figure 1: D2L beside context distillation, drawn from the results of figure 3."""

from collections.abc import Iterable

import pandas as pd

from ..artifacts import read_csv, results_dir
from ..figures_qa import draw_fig1
from .base import Request
from .qa import SHIPS, QaExperiment

SERIES = ("base_with_context", "d2l", "cd_oracle", "cd_generated")


class Summary(QaExperiment):
    """Rows are those of figure 3."""

    def rows(self, asked: Request, retrain: bool) -> Iterable[pd.DataFrame]:
        """Read the results of figure 3 (smoke measures); ValueError where there are none."""
        if asked.scale == "smoke":
            yield from super().rows(asked, retrain)
            return
        table = results_dir(SHIPS, asked.scale) / "data.csv"
        if retrain or asked.overrides or asked.seed or not table.is_file():
            raise ValueError(
                f"fig1 draws the results of {SHIPS} at scale {asked.scale}, {table}: make them "
                f"first, `just reproduce {SHIPS} --scale {asked.scale}`; it takes no other settings"
            )
        found = read_csv(table)
        yield pd.DataFrame(found[found["series"].isin(SERIES)])


FIGURE = Summary("fig1", draw=draw_fig1, series=SERIES)
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
