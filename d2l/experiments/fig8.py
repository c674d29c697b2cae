"""Figure 8: what is said with the document internalised, and with the question instead."""

from collections.abc import Iterable

import pandas as pd

from ..artifacts import WORD_COLUMNS
from ..baselines import Setting, d2l_batched, d2l_swapped, document_alone
from ..config import with_overrides
from ..figures_data import draw_fig8
from ..qa_metrics import score
from .base import Request
from .facts import counts, documents
from .qa import INVENTED, PUBLIC, QaExperiment

METHODS = {"d2l": d2l_batched, "d2l_swapped": d2l_swapped, "document_alone": document_alone}
SHOWN = {"eval.n_facts": (1, 4, 8), "eval.n_docs": (1, 1, 1), "eval.n_questions": 1}
"""The first held-out document of each number of facts, and of SQuAD: nobody chose them."""


class Words(QaExperiment):
    """Rows are single replies; see `artifacts.WORD_COLUMNS`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its table."""
        return WORD_COLUMNS

    def rows(self, asked: Request, retrain: bool) -> Iterable[pd.DataFrame]:
        """Ask every document its questions in each way, with one training seed."""
        wanted, found = self.models(asked, {}, asked.seed, retrain=retrain)
        model = found[asked.seed]
        setting = Setting(model.base, model, max_new_tokens=wanted.eval.max_new_tokens)
        sets = [with_overrides(wanted, changes) for changes in self.sets_at(asked.scale).values()]
        for asks, n_facts, n_docs in ((s, *count) for s in sets for count in counts(s)):
            for record in documents(asks, n_facts, n_docs):
                texts = [q.text for q in record.questions]
                for series, method in METHODS.items():
                    replies = method(setting, record.document, texts)
                    for question, reply in zip(record.questions, replies, strict=True):
                        got = score(reply.text, question.answers)
                        row = {"series": series, "part": "", "n_facts": n_facts, "n": 1}
                        row |= {"document": record.document, "question": question.text}
                        row |= {"answer": question.answers[0], "reply": reply.text.strip()}
                        row |= {"f1": got.f1, "recall": got.recall, "seed": asked.seed}
                        yield pd.DataFrame([row])


FIGURE = Words(
    "fig8",
    draw=draw_fig8,
    public={"recall": INVENTED, "SQuAD": PUBLIC["SQuAD"]},
    changes=dict.fromkeys(("smoke", "tiny", "small", "paper"), SHOWN),
)
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
