"""A stand-in for an experiment: the config, the table and the training of fig2 in no time."""

import dataclasses

from needle_table import CONTEXT, needle_table

from d2l.config import with_overrides
from d2l.experiments import CannotRun, base
from d2l.figures import draw_fig2


@dataclasses.dataclass(frozen=True)
class StubConfig:
    steps: int = 100
    fall_tok: int = 32_768


def config(scale, overrides=None):
    return with_overrides(StubConfig(steps=10), overrides or {})


def run(scale, seed, backend, overrides, out_dir, retrain):
    request = base.request("fig2", scale, seed, overrides, out_dir)
    chosen = config(scale, request.overrides)
    if chosen.steps == 0:
        raise ValueError("steps must be 1 or more, got 0")
    if scale == "paper":
        raise CannotRun("fig2 at scale paper needs a CUDA GPU")
    table = needle_table(fall_tok=chosen.fall_tok)
    return base.Run(
        request=request,
        config=chosen,
        paper=StubConfig(),
        sources={"steps": "Appendix A"},
        table=table,
        variants=table.assign(filler="prose", needle="word")[["filler", "needle", *table.columns]],
        context=CONTEXT,
        title="stub",
        seconds=0.1,
        draw=draw_fig2,
    ).save()


def train(scale, seed, overrides):
    print(f"trained {scale} {seed} {overrides}")
