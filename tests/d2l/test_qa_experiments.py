"""The figures and tables about facts: one recipe, what each changes, and what each refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from qa_table import METHODS, qa_table

from d2l import artifacts, experiments, figures_qa
from d2l.baselines import Setting
from d2l.config import ChunkConfig, diff, flatten, from_dict, to_dict
from d2l.data.record import Question, Record
from d2l.experiments import (
    fact_fitting,
    fig1,
    fig3,
    fig5,
    fig6,
    fig7,
    fig8,
    qa,
    tab3,
    tab4,
    tab5,
    tab6,
    tab7,
    tab8,
    tab11,
)
from d2l.experiments.fact_fitting import on_the_way
from d2l.experiments.fact_scales import SOURCES
from d2l.experiments.facts import (
    FactRun,
    Stage,
    card,
    counts,
    documents,
    following,
    reading,
    wrong_document,
)
from d2l.experiments.qa import QaExperiment, _as_variant
from d2l.experiments.shipped import fresh, load_shipped, weights_dir
from d2l.lm.base import load_base
from d2l.model import DocToLoRA
from d2l.train import read_curve

ALL = (
    fig1.FIGURE,
    fig3.FIGURE,
    fig5.FIGURE,
    fig6.FIGURE,
    fig7.FIGURE,
    fig8.FIGURE,
    tab3.TABLE,
    tab4.TABLE,
    tab5.TABLE,
    tab6.TABLE,
    tab7.TABLE,
    tab8.TABLE,
    tab11.TABLE,
)


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: e.id)
def test_every_experiment_starts_from_the_recipe_of_figure_3(experiment: QaExperiment) -> None:
    for scale in experiments.EXPERIMENTS[experiment.id].scales:
        changed = set(diff(fig3.config(scale), experiment.config(scale)))
        allowed = {"train.eval_every"} if scale == "smoke" else set()
        assert {key for key in changed if not key.startswith("eval.")} <= allowed
    with pytest.raises(ValueError, match=r"train\.step"):
        experiment.config("tiny", {"train.step": 3})


def test_every_source_names_a_setting() -> None:
    known = flatten(fig3.config("paper"))
    assert [key for key in SOURCES if not any(k.startswith(key) for k in known)] == []


def test_variants_differ_in_what_their_table_is_about() -> None:
    kl, tokens = (tab6.config("tiny", dict(c)) for c in tab6.TABLE.variants.values())
    assert diff(kl, tokens) == {"train.loss": ("kl", "ce")}
    eight, sixteen = (tab7.config("tiny", dict(c)) for c in tab7.TABLE.variants.values())
    assert diff(eight, sixteen) == {"hypernet.lora.rank": (8, 16)}
    forms, ships, gaps = (tab5.config("tiny", dict(c)) for c in tab5.TABLE.variants.values())
    assert diff(forms, ships) == {"stream.forms": ("all", "train")}
    assert diff(ships, gaps) == {"stream.queries": ("questions", "sentences")}
    assert ships == tokens == sixteen == fig3.config("tiny"), "what ships need not be trained again"


def test_a_variant_keeps_its_own_rows_and_the_base_once() -> None:
    methods = METHODS | {("d2l", "iterative"): 0.8}
    first = _as_variant(qa_table(methods), "kl", with_base=True)
    later = _as_variant(qa_table(methods), "tokens", with_base=False)
    assert set(first["series"]) == {"base_with_context", "d2l", "wrong_document"}
    assert set(later["series"]) == {"d2l", "wrong_document"}
    assert set(first[first["series"] == "base_with_context"]["part"]) == {""}
    assert set(later["part"]) == {"tokens"}
    assert len(first[first["series"] == "d2l"]) == 4, "one row a seed and number of facts"


def test_compared_models_are_measured_variant_by_variant(monkeypatch, tmp_path) -> None:
    asked = []

    def measured(wanted, model, *, seed, only, keep):
        asked.append((wanted.hypernet.lora.rank, seed))
        return qa_table(seeds=(seed,))

    table = QaExperiment("tab7", draw=figures_qa.draw_by_facts, variants=tab7.TABLE.variants,
                         measure=measured)  # fmt: skip
    monkeypatch.setattr(
        qa, "models", lambda *_, **how: dict.fromkeys((0, 1, 2), DocToLoRA.__new__(DocToLoRA))
    )
    monkeypatch.setattr(qa, "shipped_seeds", lambda *_: [0, 1, 2])
    run = table.run("tiny", out_dir=str(tmp_path))
    assert asked == [(rank, seed) for rank in (8, 16) for seed in (0, 1, 2)]
    rows = run.table.groupby(["series", "part"]).size().to_dict()
    assert rows == {
        ("base_with_context", ""): 2,
        ("d2l", "rank 8"): 6,
        ("d2l", "rank 16"): 6,
        ("wrong_document", "rank 8"): 6,
        ("wrong_document", "rank 16"): 6,
    }
    verdicts = run.check()
    assert list(verdicts["verdict"]) == ["does not hold"], "both were given the same numbers"


def test_the_curve_is_the_one_that_ships_relative_to_the_base(tmp_path) -> None:
    run = fig6.run("tiny", out_dir=str(tmp_path))
    table = run.table
    base = table[table["series"] == "base_with_context"]["recall"].item()
    assert base > 0.9
    for seed in (0, 1, 2):
        points = [p for p in read_curve(weights_dir("fig3", "tiny", seed)) if "held_out" in p]
        own = table[(table["series"] == "d2l") & (table["seed"] == seed)]
        assert [int(p) for p in own["part"]] == [p["step"] for p in points]
        assert list(own["relative"]) == pytest.approx([p["held_out"] / base for p in points])
    (line,) = [x for x in run.figure().axes[0].get_lines() if x.get_label() == "D2L"]
    assert len(line.get_xdata()) == len(points)
    assert set(run.check()["verdict"]) == {"holds"}
    assert len(run.by_facts()) == 1


def test_what_is_compared_or_was_measured_before_cannot_be_set(tmp_path) -> None:
    out = {"out_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"tab7 compares values of hypernet\.lora\.rank"):
        tab7.run("smoke", overrides={"hypernet.lora.rank": 4}, **out)
    with pytest.raises(ValueError, match=r"tab6 compares values of train\.loss"):
        tab6.train("smoke", overrides={"train.loss": "ce"})
    with pytest.raises(ValueError, match=r"eval\.seed is fixed"):
        fig6.run("tiny", overrides={"eval.seed": 1}, **out)
    assert list(tmp_path.iterdir()) == []


def test_another_documents_adapter_beside_the_right_document() -> None:
    wanted = fig3.config("tiny", {"train.seed": 0})
    model = load_shipped("fig3", {0: wanted}, "tiny")[0]
    records = documents(wanted, 2, 2, shift=5)
    setting = Setting(model.base, model, max_new_tokens=6)
    method = wrong_document(records, in_context=True)
    for record, other in (records, records[::-1]):
        question = record.questions[0].text
        (reply,) = method(setting, record.document, [question])
        asked = f"{record.document}\n\n{question}"
        (expected,) = model.generate([asked], [model.internalize(other.document)], max_new_tokens=6)
        assert reply.text.strip() == expected.strip()
        assert reply.context_ratio == 1.0


def test_the_watched_documents_are_not_those_of_the_evaluation() -> None:
    wanted = fig3.config("tiny")
    watched: list[Record] = on_the_way(wanted)[""]
    asked = documents(wanted, wanted.stream.max_facts, 40)
    assert not {r.document for r in watched} & {r.document for r in asked}


def test_figure_1_is_drawn_from_figure_3(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(fig1, "results_dir", lambda *_: tmp_path)
    with pytest.raises(ValueError, match="just reproduce fig3 --scale tiny"):
        fig1.run("tiny", out_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="just reproduce fig3 --scale paper"):
        fig1.run("paper", out_dir=str(tmp_path / "out"))
    artifacts.write_csv(tmp_path / "data.csv", qa_table())
    for other in ({"overrides": {"train.steps": 1}}, {"seed": 1}, {"retrain": True}):
        with pytest.raises(ValueError, match="takes no other settings"):
            fig1.run("tiny", out_dir=str(tmp_path / "out"), **other)
    run = fig1.run("tiny", out_dir=str(tmp_path / "out"))
    assert "wrong_document" not in set(run.table["series"])
    widths = [round(bar.get_width(), 3) for bar in run.figure().axes[0].patches]
    assert widths == [0.895, 0.995, 0.595]


def test_training_is_asked_of_the_figure_that_ships() -> None:
    with pytest.raises(ValueError, match="tab8 uses the hypernetwork of fig3"):
        tab8.train("tiny")


@pytest.mark.parametrize(("scale", "ranks"), [("tiny", [8]), ("paper", [8, 16])])
def test_variants_that_ship_are_not_trained_again(monkeypatch, scale, ranks) -> None:
    trained = []

    def ship(figure, scale, wanted, *_, custom):
        trained.append(wanted.hypernet.lora.rank)
        assert custom
        return Path(figure)

    monkeypatch.setattr(qa, "train_and_ship", ship)
    assert tab7.train(scale) == Path("fig3")
    assert trained == ranks


def test_lines_by_facts_are_means_over_seeds() -> None:
    methods = {("d2l", "kl"): 0.9, ("d2l", "tokens"): 0.7, ("wrong_document", "kl"): 0.1}
    table = qa_table(methods)
    drawn = figures_qa.draw_by_facts(table, scale="tiny", title="x", metric="recall")
    lines = {x.get_label(): list(x.get_ydata()) for x in drawn.axes[0].get_lines()}
    assert lines["D2L: kl"] == pytest.approx([0.895, 0.895])
    assert lines["D2L: tokens"] == pytest.approx([0.695, 0.695])
    assert lines["D2L, wrong document"] == pytest.approx([0.095, 0.095])


def test_public_sets_stand_right_of_the_lines() -> None:
    invented = qa_table({("d2l", ""): 0.9}, n_facts=(1, 8)).assign(set="recall")
    public = qa_table({("d2l", ""): 0.3, ("replaced_context", "other"): 0.1}, n_facts=(0,))
    table = pd.concat([invented, public.assign(set="SQuAD")], ignore_index=True)
    axes = figures_qa.draw_by_facts(table, scale="small", title="x", metric="recall").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "SQuAD"]
    found = [x for x in axes.get_lines() if x.get_label() == "D2L"]
    assert [list(x.get_xdata()) for x in found] == [[0, 1], [2]]
    assert list(found[1].get_ydata()) == pytest.approx([0.295])
    one = [x for x in axes.get_lines() if str(x.get_label()).endswith("other")]
    assert [list(x.get_xdata()) for x in one if len(x.get_xdata())] == [[2]]


def test_a_pretrained_base_is_asked_about_public_sets_too() -> None:
    for table in (tab3.TABLE, tab8.TABLE):
        assert list(table.sets_at("tiny")) == ["recall"]
        assert list(table.sets_at("small")) == list(table.sets_at("paper")) == ["recall", "SQuAD"]
    assert set(tab11.TABLE.sets_at("small")) == {*qa.SETS, *qa.PUBLIC} - {"rivals"}
    assert tab11.config("small").stream.rivals, "they are in every set"
    for scale in ("small", "paper"):
        asked = tab11.config(scale, tab11.TABLE.sets_at(scale)["numeric"])
        assert (asked.eval.public, asked.eval.kinds) == ("", ("numeric",))
    squad = tab3.config("small", tab3.TABLE.sets_at("small")["SQuAD"])
    assert counts(squad) == [(0, 25)]
    assert counts(tab3.config("small")) == [(1, 25), (8, 25)]


def test_another_text_is_read_in_place_of_the_document() -> None:
    records = [Record(text, (Question("Who?", ("Ann",)),)) for text in ("One.", "Two.", "Three.")]
    read = []

    def method(setting, document, questions):
        read.append(document)
        return []

    other = reading(method, following(records).__getitem__)
    for record in records:
        other(None, record.document, ["Who?"])
    assert read == ["Two.", "Three.", "One."]
    tiny, small = (tab8.methods(tab8.config(scale), records) for scale in ("tiny", "small"))
    assert set(small) - set(tiny) == {
        ("replaced_context", "other"),
        ("replaced_context", "assistant"),
        ("d2l_of_assistant", ""),
    }


def test_a_curve_draws_seeds_and_their_mean() -> None:
    rows = [
        qa_table({("d2l", str(step)): value, ("wrong_document", str(step)): 0.0}, n_facts=(8,))
        for step, value in ((10, 0.2), (20, 0.8))
    ]
    table = pd.concat(rows, ignore_index=True)
    drawn = figures_qa.draw_fig6(table, scale="tiny", title="x", metric="recall")
    lines = {x.get_label(): list(x.get_ydata()) for x in drawn.axes[0].get_lines()}
    assert lines["D2L"] == pytest.approx([0.195, 0.795])


def test_a_second_stage_goes_on_with_other_documents(tmp_path, monkeypatch):
    seeds, real = [], fact_fitting.FactTraining

    def seen(tokenizer, stream, chunk, seed):
        seeds.append((stream.max_facts, chunk.max_tok, seed))
        return real(tokenizer, stream, chunk, seed)

    monkeypatch.setattr(fact_fitting, "FactTraining", seen)
    one = fig3.config("smoke", {"train.steps": 2, "train.seed": 3, "stream.max_facts": 2})
    still = dataclasses.replace(one.train, lr=0.0, min_lr=0.0)
    first = Stage(dataclasses.replace(one.stream, max_facts=5), one.train, ChunkConfig(99, 9))
    base = load_base(one.base)
    both = dataclasses.replace(one, train=still, before=(first,))
    model = fact_fitting.trained(both, base, tmp_path)
    assert seeds == [(5, 99, 3), (2, 256, 10)]
    assert model.chunk == one.chunk
    kept = torch.load(tmp_path / "stage0" / "checkpoint.pt", weights_only=True)["hypernet"]
    start = fresh(one, base).hypernet.state_dict()
    after = model.hypernet.state_dict()
    assert all(torch.equal(after[k], kept[k]) for k in after)  # nothing moves at a rate of 0
    assert not all(torch.equal(after[k], start[k]) for k in after)
    for folder in (tmp_path, tmp_path / "stage0"):
        assert read_curve(folder)[-1]["step"] == 2
    again = fact_fitting.trained(both, base, tmp_path).hypernet.state_dict()
    assert all(torch.equal(after[k], again[k]) for k in after)
    assert "Before that 2 steps of 4 documents" in card(both, model, read_curve(tmp_path), "x")
    assert from_dict(FactRun, to_dict(both)) == both


def test_the_ends_of_the_last_stages_are_averaged(tmp_path):
    one = fig3.config("smoke", {"train.steps": 1, "train.lr": 0.01})
    stage, base = Stage(one.stream, one.train, one.chunk), load_base(one.base)
    run = dataclasses.replace(one, before=(stage, stage), averaged=2)
    mean = fact_fitting.trained(run, base, tmp_path).hypernet.state_dict()
    stage0, *ends = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["hypernet"]
        for folder in (tmp_path / "stage0", tmp_path / "stage1", tmp_path)
    )
    moved = [k for k in mean if not torch.equal(*(end[k] for end in ends))]
    assert moved
    assert not torch.equal(stage0[moved[0]], ends[0][moved[0]])
    for k in mean:
        torch.testing.assert_close(mean[k].double(), (ends[0][k].double() + ends[1][k]) / 2)
    assert "the mean of what the last 2" in card(run, fresh(run, base), read_curve(tmp_path), "x")
    for averaged in (0, 4):
        with pytest.raises(ValueError, match=f"averaged is 1 to the 3 stages, not {averaged}"):
            fact_fitting.trained(dataclasses.replace(run, averaged=averaged), base, tmp_path)
