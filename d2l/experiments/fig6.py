"""Figure 6: performance while the hypernetwork trains, relative to the base that reads."""

import statistics
from collections.abc import Iterable

import pandas as pd

from ..artifacts import QA_COLUMNS
from ..baselines import Setting, in_context
from ..figures_qa import draw_fig6
from ..lm.base import LanguageModel
from ..qa_metrics import score
from ..train import read_curve
from .base import Request
from .fact_fitting import on_the_way
from .facts import FactRun
from .qa import SHIPS, QaExperiment
from .shipped import run_dir, shipped_seeds, weights_dir


class TrainingCurve(QaExperiment):
    """Rows are the evaluations made during training; ``part`` is the step."""

    def rows(self, asked: Request, retrain: bool) -> Iterable[pd.DataFrame]:
        """Read the curve of every seed, and ask the base the same questions once."""
        fixed = [key for key in asked.overrides if key.startswith("eval.")]
        if fixed:
            raise ValueError(f"fig6 shows what was measured during training: {fixed[0]} is fixed")
        wanted, found = self.models(asked, {}, asked.seed, retrain=retrain)
        base, n = recall_in_context(wanted, next(iter(found.values())).base)
        same = {"n_facts": wanted.stream.max_facts, "n_docs": n, "n": n}
        rows = [{"series": "base_with_context", "recall": base, "seed": asked.seed, **same}]
        ships = shipped_seeds(SHIPS, asked.scale) if not (retrain or asked.overrides) else []
        for seed in found:
            folder = run_dir(wanted, f"{SHIPS}-{asked.scale}")
            for point in read_curve(
                weights_dir(SHIPS, asked.scale, seed) if seed in ships else folder
            ):
                if "held_out" in point:
                    own = {"part": f"{point['step']:.0f}", "seed": seed, **same}
                    rows.append({"series": "d2l", "recall": point["held_out"], **own})
                    wrong = {"series": "wrong_document", "recall": point["held_out_wrong"]}
                    rows.append(wrong | own)
        table = pd.DataFrame(rows, columns=list(QA_COLUMNS))
        yield table.assign(
            part=table["part"].fillna(""), relative=table["recall"] / max(base, 1e-9)
        )


def recall_in_context(wanted: FactRun, base: LanguageModel) -> tuple[float, int]:
    """Return the base's recall on the documents that training is watched with, and their number."""
    setting = Setting(base, max_new_tokens=wanted.eval.max_new_tokens)
    found = [
        score(reply.text, r.questions[0].answers).recall
        for r in on_the_way(wanted)[""]
        for reply in in_context(setting, r.document, [r.questions[0].text])
    ]
    return statistics.fmean(found), len(found)


WATCHED = {"eval.metric": "recall"}
FIGURE = TrainingCurve(
    "fig6",
    draw=draw_fig6,
    changes={"smoke": {"train.eval_every": 3} | WATCHED, "tiny": WATCHED, "paper": WATCHED},
)
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
