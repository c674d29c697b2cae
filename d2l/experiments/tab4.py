"""Table 4: what distilling one document costs, by the number of questions it trains on."""

from ..figures_qa import draw_fig3
from .qa import COMPARED, QaExperiment

TABLE = QaExperiment(
    "tab4",
    draw=draw_fig3,
    series=(*COMPARED, "cd_oracle", "cd_generated"),
    changes={
        "tiny": {"eval.cd_queries": (4, 8, 16), "eval.n_slow": 8}
        | {"eval.n_facts": (8,), "eval.n_docs": (8,)},
        "small": {"eval.cd_queries": (5, 20), "eval.cd_epochs": 60, "eval.n_slow": 4}
        | {"eval.n_facts": (8,), "eval.n_docs": (4,)},
        "paper": {"eval.cd_queries": (20, 50, 100), "eval.n_docs": (100,)},
    },
)
config, run, train = TABLE.config, TABLE.run, TABLE.train
