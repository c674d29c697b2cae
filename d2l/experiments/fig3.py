"""Figure 3: answers from the document's adapter against every alternative (paper section 5.1)."""

from ..figures_qa import draw_fig3
from .qa import QaExperiment

FIGURE = QaExperiment("fig3", draw=draw_fig3)
config, run, train = FIGURE.config, FIGURE.run, FIGURE.train
