"""Table 8: what an adapter does to questions that it does not concern."""

import functools
from collections.abc import Sequence

from ..baselines import Method, d2l_with_truncated_context, in_context, without_context
from ..data.record import Record
from ..figures_qa import draw_by_facts
from .facts import FactRun, measure, wrong_document
from .qa import QaExperiment


def methods(wanted: FactRun, records: Sequence[Record]) -> dict[tuple[str, str], Method]:
    """List the base with the document in its prompt, bare and with two adapters, and controls."""
    return {
        ("base_with_context", ""): in_context,
        ("base_without_context", ""): without_context,
        ("with_context_and_adapter", "own"): d2l_with_truncated_context,
        ("with_context_and_adapter", "other"): wrong_document(records, in_context=True),
        ("wrong_document", ""): wrong_document(records),
    }


TABLE = QaExperiment(
    "tab8",
    draw=draw_by_facts,
    again=("with_context_and_adapter", "wrong_document", "base_with_context"),
    measure=functools.partial(measure, methods=methods),
)
config, run, train = TABLE.config, TABLE.run, TABLE.train
