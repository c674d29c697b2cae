"""The hypernetworks that ship load, fit their recipe, and answer documents no one has evaluated."""

from __future__ import annotations

import dataclasses

import pytest

from d2l.data.needle import NeedleGenerator
from d2l.evaluate import answer_internalized
from d2l.experiments import fig3
from d2l.experiments.fact_fitting import quick_scores
from d2l.experiments.facts import documents
from d2l.experiments.fig2 import config
from d2l.experiments.shipped import (
    finished,
    load_shipped,
    shipped_seeds,
    until_best,
    weights_dir,
)
from d2l.train import TrainConfig


@pytest.mark.parametrize(
    ("figure", "scale"), [("fig2", "tiny"), ("fig2", "small"), ("fig3", "tiny"), ("fig3", "small")]
)
def test_shipped_folders_are_complete(figure: str, scale: str) -> None:
    assert 0 in shipped_seeds(figure, scale)
    for name in ("config.json", "model.safetensors", "README.md", "curve.csv"):
        assert (weights_dir(figure, scale, 0) / name).stat().st_size > 100


def test_all_shipped_weights_stay_under_60_mb() -> None:
    root = weights_dir("fig2", "tiny", 0).parents[2]
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) < 60e6


def test_tiny_answers_fresh_documents_at_four_windows_and_not_for_a_wrong_one() -> None:
    wanted = config("tiny", {"train.seed": 0})
    model = load_shipped("fig2", {0: wanted}, "tiny")[0]
    generator = NeedleGenerator(model.base.tokenizer, split="test")
    samples = generator.stratified(20, 1900, 2048, seed=987)
    own, wrong = answer_internalized(model, samples, batch=10, max_new_tokens=8)
    assert own.hits >= 18
    assert wrong.hits == 0
    assert own.n_chunks >= 8


def test_tiny_answers_questions_about_fresh_documents_and_not_for_a_wrong_one() -> None:
    wanted = fig3.config("tiny", {"train.seed": 0})
    model = load_shipped("fig3", {0: wanted}, "tiny")[0]
    assert model.trained_chunks == 1
    records = documents(wanted, 4, 40, shift=77)
    own, wrong = quick_scores(model, records, 8)
    assert own >= 0.8
    assert wrong <= 0.15


def test_weights_of_another_recipe_are_refused() -> None:
    wanted = config("tiny", {"train.seed": 0})
    other = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, lr=1.0))
    with pytest.raises(ValueError, match=r"train\.lr.*--retrain"):
        load_shipped("fig2", {0: other}, "tiny")


def test_what_came_after_the_kept_weights_is_not_told_of_them(tmp_path) -> None:
    curve = [
        {"step": step, "loss": 1.0} | ({"held_out": score} if score else {})
        for step, score in ((10, 0.4), (20, 0.0), (30, 0.6), (40, 0.6), (50, 0.5))
    ]
    stops = TrainConfig(steps=100, eval_every=10, patience=2, stop_on="held_out")
    assert [row["step"] for row in until_best(curve, stops)] == [10, 20, 30]
    assert until_best(curve, TrainConfig(steps=100)) == curve
    lines = [f"{r['step']},{r['loss']},{r.get('held_out', '')}\n" for r in curve]
    (tmp_path / "curve.csv").write_text("".join(["step,loss,held_out\n", *lines]))
    wanted = config("tiny", {"train.steps": 100})
    assert not finished(wanted, tmp_path)
    assert finished(dataclasses.replace(wanted, train=stops), tmp_path)
