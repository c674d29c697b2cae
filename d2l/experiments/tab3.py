"""Table 3 and figure 8: internalise the question and read the document, instead of the reverse."""

import functools
from collections.abc import Sequence

from ..baselines import (
    Method,
    d2l_batched,
    d2l_swapped,
    document_alone,
    in_context,
    without_context,
)
from ..data.record import Record
from ..figures_qa import draw_by_facts
from .facts import FactRun
from .measuring import measure
from .qa import INVENTED, PUBLIC, QaExperiment


def methods(wanted: FactRun, records: Sequence[Record]) -> dict[tuple[str, str], Method]:
    """List D2L either way round, the base, and the base that is asked nothing."""
    return {
        ("base_with_context", ""): in_context,
        ("base_without_context", ""): without_context,
        ("d2l", "batched"): d2l_batched,
        ("d2l_swapped", ""): d2l_swapped,
        ("document_alone", ""): document_alone,
    }


TABLE = QaExperiment(
    "tab3",
    draw=draw_by_facts,
    again=("base_with_context", "d2l", "d2l_swapped"),
    measure=functools.partial(measure, methods=methods),
    sets={"recall": {}},
    public={"recall": INVENTED, "SQuAD": PUBLIC["SQuAD"]},
    changes={
        "small": {
            "eval.n_facts": (1, 8), "eval.n_docs": (25, 25), "eval.n_alternatives": None,
        },
    },
)  # fmt: skip
config, run, train = TABLE.config, TABLE.run, TABLE.train
