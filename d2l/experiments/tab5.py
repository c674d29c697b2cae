"""Table 5: what the hypernetwork learns on, with or without data of the evaluation's kind.

The paper leaves out the training halves of the question answering sets that it evaluates on.  Here
evaluation has sentence and question forms of its own, which the recipe that ships never shows: that
is the run without.  The run with them trains on all forms; names and documents stay apart.  A third
run, which the paper does not have, is never asked a question.
"""

from ..figures_qa import draw_by_facts
from .qa import QaExperiment

TABLE = QaExperiment(
    "tab5",
    draw=draw_by_facts,
    variants={
        "with QA data": {"stream.forms": "all"},
        "without QA data": {},
        "sentences only": {"stream.queries": "sentences"},
    },
)
config, run, train = TABLE.config, TABLE.run, TABLE.train
