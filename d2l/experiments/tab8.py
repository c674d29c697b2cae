"""Table 8: what an adapter does to questions that it does not concern.

A pretrained base is asked as in the paper too: about what it may know, with another text, or the
prompt of an assistant, in place of the document.
"""

import functools
from collections.abc import Sequence

from ..baselines import Method, d2l_batched, d2l_with_truncated_context, in_context, without_context
from ..data.record import Record
from ..figures_qa import draw_by_facts
from .facts import FactRun, following, reading, wrong_document
from .measuring import measure
from .qa import INVENTED, PUBLIC, QaExperiment
from .shipped import FROM_SCRATCH

ASSISTANT = "You are a useful assistant."
"""The paper's first replacement; its second is a chapter of a book, here the next document."""


def methods(wanted: FactRun, records: Sequence[Record]) -> dict[tuple[str, str], Method]:
    """List the base with the document in its prompt, bare and with two adapters, and controls."""
    found: dict[tuple[str, str], Method] = {
        ("base_with_context", ""): in_context,
        ("base_without_context", ""): without_context,
        ("with_context_and_adapter", "own"): d2l_with_truncated_context,
        ("with_context_and_adapter", "other"): wrong_document(records, in_context=True),
        ("wrong_document", ""): wrong_document(records),
    }
    if wanted.base not in FROM_SCRATCH:
        found["replaced_context", "other"] = reading(in_context, following(records).__getitem__)
        found["replaced_context", "assistant"] = reading(in_context, lambda _: ASSISTANT)
        found["d2l_of_assistant", ""] = reading(d2l_batched, lambda _: ASSISTANT)
    return found


TABLE = QaExperiment(
    "tab8",
    draw=draw_by_facts,
    again=(
        "with_context_and_adapter", "wrong_document", "d2l_of_assistant", "base_with_context",
    ),
    measure=functools.partial(measure, methods=methods),
    sets={"recall": {}},
    public={"recall": INVENTED, "SQuAD": PUBLIC["SQuAD"]},
    changes={
        "small": {
            "eval.n_facts": (8,), "eval.n_docs": (50,), "eval.n_questions": 1,
            "eval.n_alternatives": None,
        },
    },
)  # fmt: skip
config, run, train = TABLE.config, TABLE.run, TABLE.train
