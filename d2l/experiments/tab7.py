"""Table 7: how many ranks the hypernetwork writes for a chunk."""

from ..figures_qa import draw_by_facts
from .qa import QaExperiment

TABLE = QaExperiment(
    "tab7",
    draw=draw_by_facts,
    variants={f"rank {r}": {"hypernet.lora.rank": r} for r in (8, 16)},
)
config, run, train = TABLE.config, TABLE.run, TABLE.train
