"""Rows of an interrupted run: kept, found again, and only where nothing has changed."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from d2l import artifacts, figures_qa
from d2l.baselines.setting import reply_to
from d2l.experiments import fig3, measuring, qa
from d2l.experiments.facts import documents
from d2l.experiments.measuring import CODE_ID, Kept, _code_id, measure, seconds_kept
from d2l.experiments.qa import QaExperiment
from d2l.experiments.shipped import load_shipped
from d2l.meter import Meter
from d2l.model import DocToLoRA

SERIES = ("base_with_context", "retrieved", "wrong_document")
CHANGES = {
    "eval.n_docs": (2, 1), "eval.n_facts": (1, 2), "eval.n_questions": 1, "eval.n_metered": 1,
    "eval.n_alternatives": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DocToLoRA:
    return load_shipped("fig3", {0: fig3.config("tiny")}, "tiny")[0]


class Killed(Exception):
    pass


class Counted:
    """Methods that count how often they are asked; one of them fails at its ``fails``-th call."""

    def __init__(self, fails=-1):
        self.asked, self.fails = [], fails

    def __call__(self, wanted, records):
        return {(name, ""): self.method(name) for name in SERIES}

    def method(self, name):
        def answer(setting, document, questions):
            self.asked.append(name)
            if len(self.asked) == self.fails:
                raise Killed
            context = document if name == "base_with_context" else ""
            return [reply_to(setting, document, q, Meter(), context=context) for q in questions]

        return answer


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    timed = ["generation_s"]
    pd.testing.assert_frame_equal(one.drop(columns=timed), other.drop(columns=timed))


def test_an_interrupted_measurement_goes_on_where_it_was(model, tmp_path) -> None:
    wanted = fig3.config("tiny", CHANGES)
    whole = measure(wanted, model, seed=0, methods=Counted())
    broken = Counted(fails=8)  # 2 documents and one metered: the third method of the first number
    with pytest.raises(Killed):
        measure(wanted, model, seed=0, methods=broken, keep=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-30])  # cut as well, in the middle of the second row
    rest = Counted()
    same(measure(wanted, model, seed=0, methods=rest, keep=tmp_path), whole)
    assert rest.asked == ["retrieved"] * 3 + ["wrong_document"] * 3 + [
        name for name in SERIES for _ in range(2)
    ]
    again = Counted()
    kept = measure(wanted, model, seed=0, methods=again, keep=tmp_path)
    same(kept, whole)
    assert again.asked == []
    assert 0 < seconds_kept(tmp_path) < 100
    assert seconds_kept(tmp_path / "nothing") == 0


def test_what_was_measured_otherwise_is_not_taken(model, tmp_path) -> None:
    wanted = fig3.config("tiny", CHANGES)
    measure(wanted, model, seed=0, methods=Counted(), keep=tmp_path)
    for changed in ({"eval.seed": 5}, {"eval.max_new_tokens": 3}):
        others = Counted()
        asks = fig3.config("tiny", CHANGES | changed)
        measure(asks, model, seed=0, methods=others, keep=tmp_path)
        assert len(others.asked) == 15
    another = load_shipped("fig3", {1: fig3.config("tiny", {"train.seed": 1})}, "tiny")[1]
    records = documents(wanted, 1, 2)
    assert Kept.of(tmp_path, wanted, model, records).path.exists()
    assert not Kept.of(tmp_path, wanted, another, records).path.exists()
    assert not Kept.of(tmp_path, wanted, model, records[:1]).path.exists()


def test_the_code_decides_what_may_be_taken(monkeypatch, tmp_path) -> None:
    assert _code_id() == CODE_ID
    (tmp_path / "new.py").write_text("changed = True")
    monkeypatch.setattr(measuring, "_SOURCES", (*measuring._SOURCES, tmp_path))
    assert _code_id() != CODE_ID


def test_a_run_resumes_and_clears_what_it_kept(model, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(qa, "build_dir", lambda: tmp_path)
    monkeypatch.setattr(qa, "models", lambda *_, **how: {0: model})
    table = QaExperiment(
        "fig3", draw=figures_qa.draw_fig3,
        measure=lambda *a, **how: measure(*a, **how, methods=asked),
    )  # fmt: skip
    asked = Counted(fails=8)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        table.run("tiny", overrides=CHANGES, out_dir=str(out))
    kept = list(tmp_path.glob("rows/fig3/tiny-*/*/*.jsonl"))
    assert len(kept) == 1
    asked = Counted()
    run = table.run("tiny", overrides=CHANGES, out_dir=str(out))
    assert len(asked.asked) == 15 - 6
    assert list(tmp_path.glob("rows/fig3/*")), "it has no verdicts yet"
    run.check()
    assert not list(tmp_path.glob("rows/fig3/*"))
    assert len(artifacts.read_csv(out / "data.csv")) == 6
    assert dataclasses.replace(run.config.eval, **{k[5:]: v for k, v in CHANGES.items()}) == (
        run.config.eval
    )
