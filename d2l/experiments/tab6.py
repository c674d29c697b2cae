"""Table 6: what the hypernetwork learns from, probabilities of the teacher or tokens."""

from ..figures_qa import draw_by_facts
from .qa import QaExperiment

TABLE = QaExperiment(
    "tab6",
    draw=draw_by_facts,
    variants={"kl": {"train.loss": "kl"}, "next token": {"train.loss": "ce"}},
)
config, run, train = TABLE.config, TABLE.run, TABLE.train
