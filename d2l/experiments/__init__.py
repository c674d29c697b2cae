"""The experiments that can be reproduced, by id; nothing heavy is imported until one is run.

An experiment module offers `config(scale, overrides)`, `run(...)` and `train(...)`; see base.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any

SCALES = ("smoke", "tiny", "small", "paper")


class CannotRun(Exception):
    """This machine lacks what the scale needs; the message says what, and what to run instead."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One figure or table: what it shows, what each scale costs, and where its code lies."""

    id: str
    title: str
    default_scale: str
    cost: dict[str, str]
    module: str
    paper: str = "doc-to-lora"

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales that it runs at, smallest first."""
        return tuple(scale for scale in SCALES if scale in self.cost)

    @property
    def notebook(self) -> str:
        """Path of its notebook inside the checkout."""
        return f"notebooks/{self.id}.ipynb"

    def function(self, name: str) -> Callable[..., Any]:
        """Import the experiment's module and return its function `name`."""
        return getattr(importlib.import_module(self.module), name)


EXPERIMENTS = {
    e.id: e
    for e in (
        Experiment(
            id="fig2",
            title="Needle in a haystack: retrieval and memory against haystack length",
            default_scale="small",
            cost={
                "smoke": "half a minute",
                "tiny": "4 min; with --retrain 9, everything from scratch",
                "small": "6 min with bfloat16 instructions, 9 without; shipped weights",
                "paper": "one GPU; training took the authors about 3 h on an H200",
            },
            module="d2l.experiments.fig2",
        ),
        Experiment(
            id="fig3",
            title="Answering questions from an adapter, against every alternative",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "7 min; with --retrain 13, everything from scratch",
                "small": "half an hour from the shipped hypernetwork",
                "paper": "one GPU; training took the authors 5 days on 8 H200",
            },
            module="d2l.experiments.fig3",
        ),
        Experiment(
            id="fig1",
            title="D2L beside context distillation: quality, latency, memory",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "seconds, from the results of fig3",
                "small": "seconds, from the results of fig3",
                "paper": "seconds, from the results of fig3",
            },
            module="d2l.experiments.fig1",
        ),
        Experiment(
            id="fig5",
            title="How long the documents and questions of training are",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "half a minute",
                "small": "half a minute; needs SQuAD",
                "paper": "one GPU",
            },
            module="d2l.experiments.fig5",
        ),
        Experiment(
            id="fig6",
            title="Performance while the hypernetwork trains",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "seconds, from the curves that ship",
                "paper": "training the hypernetwork, days on 8 H200",
            },
            module="d2l.experiments.fig6",
        ),
        Experiment(
            id="fig7",
            title="Answering about numbers, situations and two hops",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "4 min",
                "small": "48 min on one core; needs the public sets",
                "paper": "one GPU",
            },
            module="d2l.experiments.fig7",
        ),
        Experiment(
            id="fig8",
            title="The words of table 3: a document or its question internalised",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "seconds",
                "small": "half a minute; needs SQuAD",
                "paper": "one GPU",
            },
            module="d2l.experiments.fig8",
        ),
        Experiment(
            id="tab3",
            title="Internalising the question instead of the document",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "2 min",
                "small": "17 min on one core; needs SQuAD",
                "paper": "one GPU",
            },
            module="d2l.experiments.tab3",
        ),
        Experiment(
            id="tab4",
            title="What distilling one document costs, by its number of questions",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "4 min",
                "small": "16 min on one core",
                "paper": "one GPU",
            },
            module="d2l.experiments.tab4",
        ),
        Experiment(
            id="tab5",
            title="What the hypernetwork learns on: with or without data of the evaluation's kind",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "5 min, after 15 min of training six hypernetworks",
                "paper": "training three hypernetworks, days on 8 H200",
            },
            module="d2l.experiments.tab5",
        ),
        Experiment(
            id="tab6",
            title="What the hypernetwork learns from: probabilities or tokens",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "4 min, after 8 min of training three hypernetworks",
                "paper": "training two hypernetworks, days on 8 H200",
            },
            module="d2l.experiments.tab6",
        ),
        Experiment(
            id="tab7",
            title="How many ranks the hypernetwork writes",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "4 min, after 6 min of training three hypernetworks",
                "paper": "training two hypernetworks, days on 8 H200",
            },
            module="d2l.experiments.tab7",
        ),
        Experiment(
            id="tab8",
            title="What an adapter does to questions that it does not concern",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "2 min",
                "small": "19 min on one core; needs SQuAD",
                "paper": "one GPU",
            },
            module="d2l.experiments.tab8",
        ),
        Experiment(
            id="tab11",
            title="What the base answers from its prompt, the denominators",
            default_scale="tiny",
            cost={
                "smoke": "half a minute",
                "tiny": "3 min",
                "small": "27 min on one core; needs the public sets",
                "paper": "one GPU",
            },
            module="d2l.experiments.tab11",
        ),
    )
}


def find(experiment_id: str) -> Experiment:
    """Return the experiment; ValueError names the nearest id for an unknown one."""
    if experiment_id not in EXPERIMENTS:
        raise ValueError(unknown("figure or table", experiment_id, EXPERIMENTS))
    return EXPERIMENTS[experiment_id]


def check_scale(experiment: Experiment, scale: str) -> str:
    """Return `scale`; ValueError names the nearest one for a scale that it does not run at."""
    if scale not in experiment.scales:
        raise ValueError(unknown(f"scale of {experiment.id}", scale, experiment.scales))
    return scale


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """Say that `word` is no known `what`, with the nearest known one and the whole list."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {word!r}; {hint}known: {', '.join(known)}"
