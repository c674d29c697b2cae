"""Table 11: what the base answers with the document in its prompt, and how often it declines.

The scores are what all relative results are divided by.  D2L is asked too, for the share of its
replies that say *unknown*: rightly about what the document does not say, wrongly otherwise.
"""

import functools
from collections.abc import Sequence

import pandas as pd

from ..baselines import Method, d2l_batched, in_context, without_context
from ..data.record import Record
from ..figures import Figure
from ..figures_qa import draw_tab11
from .facts import FactRun
from .measuring import measure
from .qa import INVENTED, PUBLIC, SETS, QaExperiment

PAPER = {"recall": 0.8692, "numeric": 0.4541, "situational": 0.7457, "two hops": 0.3387}
PAPER |= {"SQuAD": PAPER["recall"], "DROP": PAPER["numeric"], "ROPES": PAPER["situational"]}
"""F1 of gemma-2-2b-it on SQuAD, DROP, ROPES and 2WikiMultihopQA, and what stands for them."""


def methods(wanted: FactRun, records: Sequence[Record]) -> dict[tuple[str, str], Method]:
    """List the base with the document and without, and D2L."""
    return {
        ("base_with_context", ""): in_context,
        ("d2l", "batched"): d2l_batched,
        ("base_without_context", ""): without_context,
    }


def draw(table: pd.DataFrame, *, metric: str, scale: str, title: str) -> Figure:
    """Draw F1, as the paper gives it, whatever a scale compares its methods by."""
    return draw_tab11(table, scale=scale, title=title, metric="f1", paper=PAPER)


TABLE = QaExperiment(
    "tab11",
    draw=draw,
    again=("base_with_context", "d2l"),
    measure=functools.partial(measure, methods=methods),
    sets=SETS,
    public={
        **{name: {**INVENTED, **changes} for name, changes in SETS.items() if name != "rivals"},
        **PUBLIC,  # all documents of these scales are drawn with rivals
    },
    changes={
        "smoke": {"eval.n_facts": (4,)},
        "small": {"eval.n_facts": (8,), "eval.n_docs": (40,), "eval.n_questions": 1},
        "tiny": {
            "eval.n_facts": (4, 8, 16), "eval.n_docs": (50,) * 3, "eval.n_questions": 2,
        },
    },
)  # fmt: skip
config, run, train = TABLE.config, TABLE.run, TABLE.train
