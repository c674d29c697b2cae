"""Figure 7: figure 3 for numbers, situations and two hops, which stand for DROP, ROPES and 2Wiki.

The hypernetwork is figure 3's, which at tiny learned to recall single facts and nothing else, at
small also from paragraphs of public sets.  There sentences are also read apart, and the best for
each question is asked (`d2l.routing`).
"""

from ..figures_qa import draw_fig3
from .qa import COMPARED, PUBLIC, SETS, QaExperiment

FIGURE = QaExperiment(
    "fig7",
    draw=draw_fig3,
    series=(
        *COMPARED, "d2l_routed", "retrieved_part", "selective_context", "cd_oracle", "cd_generated",
    ),
    sets={name: SETS[name] for name in ("numeric", "situational", "two hops")},
    public=PUBLIC,
    changes={
        "small": {
            "eval.n_docs": (100,), "eval.n_questions": 1, "eval.rates": (), "eval.n_slow": 0,
            "eval.routed": True, "eval.n_alternatives": None,
        },
        "smoke": {"eval.n_facts": (4,)},
        "tiny": {
            "eval.n_facts": (8,), "eval.n_docs": (75,), "eval.n_questions": 2, "eval.n_slow": 3,
        },
    },
)  # fmt: skip
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
