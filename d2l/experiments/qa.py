"""The frame of every figure and table about facts: config, run and train from one declaration."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import QA_COLUMNS, SET_COLUMNS, build_dir
from ..config import with_overrides
from ..figures import Figure
from ..measures_qa import by_method
from ..model import DocToLoRA
from .base import Request, Run, need_gpu_and_model, request, run_name
from .fact_fitting import trained
from .fact_scales import OVERRIDES, PAPER, SOURCES
from .facts import FactRun, card
from .measuring import CODE_ID, measure, seconds_kept
from .shipped import models, shipped_seeds, train_and_ship

SHIPS = "fig3"
"""The figure whose recipe and weights all the others start from."""
AGAIN = ("d2l", "wrong_document", "base_with_context")
COMPARED = ("d2l", "wrong_document", "base_with_context", "base_without_context")

Changes = Mapping[str, Any]
Measure = Callable[..., pd.DataFrame]

SETS: dict[str, Changes] = {
    "recall": {},
    "rivals": {"eval.rivals": True},
    "two hops": {"eval.kinds": ("two_hop",)},
    "numeric": {"eval.kinds": ("numeric",), "eval.rivals": True},
    "situational": {"eval.kinds": ("situational",)},
    "unanswerable": {"eval.kinds": ("unanswerable",)},
}
"""Sets of questions; numbers are compared, so two entities of one type have them (*rivals*)."""
PUBLIC: dict[str, Changes] = {
    "SQuAD": {"eval.public": "squad"},
    "DROP": {"eval.public": "drop"},
    "ROPES": {"eval.public": "ropes"},
}
"""Public sets, which a pretrained base can be asked about."""
INVENTED: Changes = {"eval.public": ""}
"""Asks about invented documents where a recipe would ask about a public set."""
PRETRAINED = ("small", "paper")


@dataclasses.dataclass(frozen=True)
class QaExperiment:
    """A figure or table whose rows are methods that answer questions about held-out documents.

    ``variants`` names what is compared: each is the recipe of figure 3 with some dotted keys
    changed, and becomes the ``part`` of series *d2l*.  Without variants the methods of ``series``
    (None: all) are asked with the weights that ship, those of ``again`` with every training seed.
    ``sets`` of questions, each a change to the evaluation, are asked one after another; those of
    ``public`` instead at scales with a pretrained base.  ``changes`` are made to the recipe of a
    scale first, as a rule to its evaluation.
    """

    id: str
    draw: Callable[..., Figure]
    series: tuple[str, ...] | None = None
    variants: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    sets: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    public: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    again: tuple[str, ...] = AGAIN
    measure: Measure = measure

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its table."""
        return SET_COLUMNS if self.sets else QA_COLUMNS

    def sets_at(self, scale: str) -> Mapping[str, Changes]:
        """Return the sets of questions of a scale, one without a name where there are none."""
        return (self.public if scale in PRETRAINED else self.sets) or {"": {}}

    def context(self, wanted: FactRun) -> dict[str, Any]:
        """Return what the claims and the picture refer to."""
        return {"metric": wanted.eval.metric}

    def config(self, scale: str, overrides: Changes | None = None) -> FactRun:
        """Return the complete config of a scale, with dotted overrides applied last.

        Raises ValueError for an unknown key or a value of another type.
        """
        recipe = with_overrides(PAPER, OVERRIDES[scale])
        return with_overrides(with_overrides(recipe, self.changes.get(scale, {})), overrides or {})

    def run(
        self,
        scale: str = "tiny",
        seed: int = 0,
        overrides: str | dict[str, Any] = "{}",
        out_dir: str = "",
        retrain: bool = False,
    ) -> QaRun:
        """Ask every method the same held-out questions; hand back table, figure and verdicts.

        Weights that ship are used, others are trained first; an interrupted training resumes, and
        so does the asking until `QaRun.check`, unless the code has changed.  ``retrain`` trains
        all of them again.  Raises ValueError for a request that cannot be served
        and CannotRun where the scale needs a GPU or the hub.
        """
        asked = request(self.id, scale, seed, overrides, out_dir)
        began = time.monotonic() - seconds_kept(_keep(asked))
        wanted = self.config(scale, {"train.seed": seed} | asked.overrides)
        self._check_overrides(asked.overrides)
        measured = pd.concat(self.rows(asked, retrain), ignore_index=True)
        drawn = QaRun(
            request=asked,
            config=wanted,
            paper=self.config("paper"),
            sources=SOURCES,
            table=pd.DataFrame(measured[list(self.columns)]),
            context=self.context(wanted),
            title=wanted.base,
            seconds=time.monotonic() - began,
            draw=self.draw,
            columns=self.columns,
        )
        drawn.save()
        return drawn

    def train(self, scale: str, seed: int = 0, overrides: Changes | None = None) -> Path:
        """Train the hypernetwork of a scale, or of each variant; see `shipped.train_and_ship`.

        A variant that ships is left out; the last folder is returned.  Raises ValueError where the
        weights are those of another figure, and for an override of what the variants compare.
        """
        if self.id != SHIPS and not self.variants:
            raise ValueError(f"{self.id} uses the hypernetwork of {SHIPS}: `just train {SHIPS}`")
        self._check_overrides(overrides or {})
        folder = Path()
        for changes in self.variants.values() or ({},):
            chosen = {"train.seed": seed, **changes, **(overrides or {})}
            wanted = self.config(scale, chosen)
            standard = wanted == self.config(scale, {"train.seed": seed})
            if self.variants and standard and seed in shipped_seeds(SHIPS, scale):
                continue
            custom = bool(overrides or self.variants)
            folder = train_and_ship(SHIPS, scale, wanted, trained, card, custom=custom)
        return folder

    def rows(self, asked: Request, retrain: bool) -> Iterable[pd.DataFrame]:
        """Measure every seed that ships, or every variant with as many; what repeats, once."""
        if not self.variants:
            wanted, found = self.models(asked, {}, asked.seed, retrain=retrain)
            for i, (seed, model) in enumerate(found.items()):
                only = self.again if i else self.series
                for name, changes in self.sets_at(asked.scale).items():
                    asks = with_overrides(wanted, changes)
                    table = self.measure(asks, model, seed=seed, only=only, keep=_keep(asked))
                    yield table.assign(set=name)
            return
        usual = asked.scale != "smoke" and asked.seed == 0 and not asked.overrides
        seeds = (shipped_seeds(SHIPS, asked.scale) if usual else []) or [asked.seed]
        for i, (part, changes) in enumerate(self.variants.items()):
            for j, seed in enumerate(seeds):
                wanted, found = self.models(asked, changes, seed, retrain=retrain)
                first = i == j == 0
                only = COMPARED if first else AGAIN
                model, keep = found[seed], _keep(asked)
                table = self.measure(wanted, model, seed=seed, only=only, keep=keep)
                yield _as_variant(table, part, with_base=first)

    def models(
        self, asked: Request, changes: Changes, seed: int, *, retrain: bool
    ) -> tuple[FactRun, dict[int, DocToLoRA]]:
        """Return the config with ``changes``, and its models by seed; see `shipped.models`.

        Raises CannotRun where the scale needs a GPU or the hub.
        """
        standard = with_overrides(PAPER, {**OVERRIDES[asked.scale], "train.seed": seed})
        wanted = self.config(asked.scale, {"train.seed": seed, **changes, **asked.overrides})
        if asked.scale == "paper":
            need_gpu_and_model(self.id, wanted.base)
        how = {"retrain": retrain, "base_too": not self.variants}
        return wanted, models(SHIPS, asked.scale, wanted, standard, trained, **how)

    def _check_overrides(self, overrides: Changes) -> None:
        named = [*self.variants.values(), *self.sets.values(), *self.public.values()]
        compared = {key for changes in named for key in changes}
        if compared & set(overrides):
            key = min(compared & set(overrides))
            raise ValueError(f"{self.id} compares values of {key}: it cannot be set beside that")


def _keep(asked: Request) -> Path:
    """Return where the rows of a request are kept until its claims are judged, for this code."""
    place = hashlib.sha256(str(asked.out_dir).encode()).hexdigest()[:6]
    name = f"{run_name(asked.scale, asked.seed, asked.overrides)}-{place}"
    return build_dir() / "rows" / asked.experiment / name / CODE_ID


def _as_variant(table: pd.DataFrame, part: str, *, with_base: bool) -> pd.DataFrame:
    """Keep D2L and its control as ``part``, and the base's rows where wanted."""
    own = table["series"].isin(["d2l", "wrong_document"]) & (table["part"] != "iterative")
    kept = pd.DataFrame(table[own | (with_base & table["series"].str.startswith("base"))])
    return kept.assign(part=kept["part"].where(~own, part))


class QaRun(Run):
    """A run whose table has one row for each method and number of facts."""

    def check(self) -> pd.DataFrame:
        """Judge the claims as every run does; what was kept to go on with is no longer needed."""
        verdicts = super().check()
        shutil.rmtree(_keep(self.request).parent, ignore_errors=True)
        return verdicts

    def summary(self) -> pd.DataFrame:
        """Return one row a method (and set), seeds and numbers of facts averaged."""
        shown = ["recall", "f1", "exact", "relative", "context_ratio", "update_s", "update_mib",
                 "generation_s", "generation_mib", "adapter_mib"]  # fmt: skip
        return by_method(self.table, shown).round(4)

    def by_facts(self) -> pd.DataFrame:
        """Return the metric by (set and) number of facts (rows) and method (columns)."""
        named = self.table.assign(method=self.table["series"] + " " + self.table["part"].fillna(""))
        return named.pivot_table(
            index=[key for key in ("set", "n_facts") if key in named],
            columns="method",
            values=self.context["metric"],
            sort=False,
        ).round(3)
