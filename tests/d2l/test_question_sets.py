"""Sets of questions, lengths and words: tables 11, figures 5, 7 and 8."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from qa_table import METHODS, qa_table

from d2l import artifacts, claims, figures_data, figures_qa
from d2l.baselines.setting import reply_to
from d2l.config import with_overrides
from d2l.data.fact_training import FactTraining
from d2l.data.record import Question, Record
from d2l.experiments import fact_fitting, facts, fig3, fig5, fig7, fig8, qa, tab11
from d2l.experiments.facts import documents
from d2l.experiments.measuring import _relative, measure
from d2l.experiments.qa import PUBLIC, SETS, QaExperiment
from d2l.experiments.shipped import load, load_shipped
from d2l.measures import MEASURES, NotTestable
from d2l.measures_qa import by_method
from d2l.meter import Meter
from d2l.model import DocToLoRA
from d2l.qa_metrics import QaScore

RIGHT, WRONG = QaScore(1.0, 1.0, 1.0, 1.0), QaScore(0.0, 0.0, 0.0, 0.0)


def set_table(**score_of_base: float) -> pd.DataFrame:
    """Give the base a score of its own in each set; D2L is 0.9 of it everywhere."""
    tables = []
    for name, base in score_of_base.items():
        table = qa_table(METHODS, seeds=(0,)).assign(set=name, unknown=0.25)
        tables.append(table.assign(f1=base * table["relative"], exact=base * table["relative"]))
    return pd.concat(tables, ignore_index=True)[list(artifacts.SET_COLUMNS)]


@pytest.fixture(scope="module")
def shipped() -> DocToLoRA:
    return load_shipped("fig3", {0: fig3.config("tiny")}, "tiny")[0]


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_its_questions_at_every_number_of_facts(name: str) -> None:
    for experiment in (tab11.TABLE, fig7.FIGURE):
        if name not in experiment.sets:
            continue
        for scale in ("smoke", "tiny"):
            wanted = with_overrides(experiment.config(scale), SETS[name])
            for n_facts in wanted.eval.n_facts:
                for record in documents(wanted, n_facts, 20):
                    kinds = {q.kind for q in record.questions}
                    assert kinds == set(wanted.eval.kinds)
                    assert len(record.questions) == 2


def test_rivals_are_of_one_type() -> None:
    def names(record):
        return {f.attribute: {g.entity for g in record.facts if g.attribute == f.attribute}
                for f in record.facts}  # fmt: skip

    for rivals in (False, True):
        wanted = fig3.config("tiny", {"eval.rivals": rivals})
        shared = [
            any(len(entities) > 1 for entities in names(r).values())
            for r in documents(wanted, 8, 20)
        ]
        assert any(shared) == rivals


def test_sets_are_asked_one_after_another_by_every_seed(monkeypatch, tmp_path) -> None:
    asked = []

    def measured(wanted, model, *, seed, only, keep):
        asked.append((seed, wanted.eval.kinds, wanted.eval.rivals, only))
        return qa_table(seeds=(seed,)).assign(unknown=0.0)

    sets = {name: SETS[name] for name in ("recall", "numeric")}
    table = QaExperiment("fig7", draw=figures_qa.draw_fig3, sets=sets, again=("d2l",),
                         measure=measured)  # fmt: skip
    models = dict.fromkeys((0, 1), DocToLoRA.__new__(DocToLoRA))
    monkeypatch.setattr(qa, "models", lambda *_, **how: models)
    run = table.run("tiny", out_dir=str(tmp_path))
    kinds = [(("recall",), None), (("numeric",), True)]
    assert asked == [(0, *k, None) for k in kinds] + [(1, *k, ("d2l",)) for k in kinds]
    assert tuple(run.table.columns) == artifacts.SET_COLUMNS
    assert list(run.table["set"].drop_duplicates()) == ["recall", "numeric"]
    pd.testing.assert_frame_equal(
        artifacts.read_csv(tmp_path / "data.csv").fillna(""), run.table, check_dtype=False
    )
    assert list(run.by_facts().index) == [("recall", 1), ("recall", 8), ("numeric", 1),
                                          ("numeric", 8)]  # fmt: skip
    with pytest.raises(ValueError, match=r"fig7 compares values of eval\.kinds"):
        table.run("tiny", overrides={"eval.kinds": ["recall"]}, out_dir=str(tmp_path))


def test_what_the_base_cannot_do_divides_nothing() -> None:
    theirs = {"a": [WRONG, WRONG], "b": [WRONG]}
    assert all(map(math.isnan, _relative({"a": [RIGHT, WRONG], "b": [RIGHT]}, theirs, "f1")))
    table = set_table(good=0.9, poor=0.2)
    relative = MEASURES["qa_relative"]
    context = {"metric": "f1"}

    def found(name: str, **args: str) -> float:
        rows = table[table["set"] == name]
        return relative(rows, context, series="d2l", part="batched", **args).value

    assert found("good") == pytest.approx(0.9)
    assert found("good", of="cd_generated", of_part="20") == pytest.approx(0.3)
    with pytest.raises(NotTestable, match=r"exact of the base .* is 0\.2"):
        found("poor")


def test_a_claim_may_be_about_some_rows() -> None:
    test = {"scales": ["tiny"], "measure": "qa_value", "op": ">=", "threshold": 0.5}
    test |= {"args": {"column": "f1", "series": "base_with_context"}}
    texts = dict.fromkeys(("statement", "source", "paper_value"), "x")
    other = {"scales": ["smoke", "small", "paper"], "not_testable": "x"}
    verdicts = []
    for where in ({}, {"set": "good"}, {"set": "poor"}, {"set": "none"}, {"no": 1}):
        entry = {
            "id": "tab11.x",
            "figure": "tab11",
            **texts,
            "test": [{**test, "where": where}, other],
        }
        claim = claims._claim(entry)
        (verdict,) = claims.judge(set_table(good=0.9, poor=0.2), [claim], "tiny", {})
        verdicts.append((verdict.verdict, verdict.measured))
    untested = ("not testable at this scale", None)
    assert verdicts == [
        ("holds", pytest.approx(0.55)),
        ("holds", pytest.approx(0.9)),
        ("does not hold", pytest.approx(0.2)),
        untested,
        untested,
    ]


def test_methods_are_averaged_set_by_set() -> None:
    found = by_method(set_table(a=1.0, b=0.5), ["f1"])
    rows = found[found["series"] == "d2l"]
    assert list(zip(rows["set"], rows["f1"].round(3), strict=True)) == [("a", 0.9), ("b", 0.45)]
    assert "set" not in by_method(qa_table(), ["f1"])


def test_the_share_of_unknown_replies(shipped: DocToLoRA) -> None:
    changes = {"eval.n_facts": (4,), "eval.n_docs": (5,), "eval.n_questions": 2}
    wanted = with_overrides(fig3.config("tiny"), changes)
    only = ("base_with_context", "base_without_context")
    table = measure(wanted, shipped, seed=0, only=only).set_index("series")
    assert table.loc["base_without_context", "unknown"] == 1.0, "it was trained to say so"
    assert table.loc["base_with_context", "unknown"] == 0.0
    assert table.loc["base_with_context", "recall"] == 1.0


def test_a_row_of_panels_for_each_set() -> None:
    table = set_table(numeric=0.9, situational=0.0)
    table.loc[table["set"] == "situational", "relative"] = math.nan
    axes = figures_qa.draw_fig3(table, scale="tiny", title="x", metric="f1").axes
    assert len(axes) == 6
    assert axes[0].get_title("left") == "numeric (base in context 0.90, exactly 0.90)"
    assert len(axes[0].get_lines()) == len(METHODS) + 1
    assert len(axes[3].get_lines()) == 1
    assert axes[3].texts[0].get_text() == "nothing to divide by"


def test_table_11_draws_every_set_beside_the_papers() -> None:
    table = set_table(recall=0.9, numeric=0.2)
    left, right = figures_qa.draw_tab11(
        table, scale="tiny", title="x", metric="f1", paper={"recall": 0.87, "situational": 0.7}
    ).axes
    assert [round(bar.get_width(), 3) for bar in left.patches] == [0.9, 0.2, 0.9, 0.2]
    assert [list(x.get_xdata()) for x in left.get_lines() if x.get_label()[:5] == "paper"] == [
        [0.87] * 2
    ]
    assert {round(bar.get_width(), 3) for bar in right.patches} == {0.25}
    assert [t.get_text() for t in left.get_yticklabels()] == ["recall", "numeric"]


def test_public_sets_have_one_bar_at_their_own_name() -> None:
    invented = qa_table({("base_with_context", ""): 0.9, ("d2l", "batched"): 0.5}, seeds=(0,))
    public = qa_table({("base_with_context", ""): 0.4, ("d2l", "batched"): 0.2}, (0,), (0,))
    table = pd.concat([invented.assign(set="recall"), public.assign(set="SQuAD", n=8)])
    left, _ = figures_qa.draw_tab11(
        table.assign(unknown=0.0), scale="small", title="x", metric="recall", paper={"SQuAD": 0.87}
    ).axes
    bars = [(round(b.get_width(), 3), round(b.get_y() + b.get_height() / 2, 3))
            for b in left.patches]  # fmt: skip
    assert bars == [(0.9, -0.2), (0.9, 0.2), (0.4, 1.0)]
    line = next(x for x in left.get_lines() if str(x.get_label()).startswith("paper"))
    assert list(line.get_ydata()) == pytest.approx([0.55, 1.45])


def test_lengths_are_those_of_the_training_stream(tmp_path) -> None:
    run = fig5.run("smoke", out_dir=str(tmp_path))
    assert tuple(artifacts.read_csv(tmp_path / "data.csv").columns) == artifacts.LENGTH_COLUMNS
    counted = run.table.groupby("what")["n"].sum()
    assert counted["document"] == run.config.train.docs_per_step
    wanted = run.config
    stream = FactTraining(load(wanted).tokenizer, wanted.stream, wanted.chunk, 0)
    asked = [q for e in stream.batch(0, wanted.train.docs_per_step) for q in e.queries]
    assert counted["question and answer"] == len(asked)
    lengths = run.table[run.table["what"] == "question and answer"]["n_tok"]
    assert set(lengths) == {len(q.prompt) + len(q.answer) for q in asked}
    assert set(run.check()["verdict"]) == {"not testable at this scale"}
    assert len(run.figure().axes) == 2
    with pytest.raises(ValueError, match="nothing to train"):
        fig5.run("smoke", retrain=True, out_dir=str(tmp_path))


def test_levels_are_those_that_training_reached() -> None:
    wanted = fig3.config("tiny")
    levels = fig5._levels(wanted, "tiny", 0)
    assert [step for step, _ in levels] == list(range(9, wanted.train.steps, 10))
    assert levels[0][1] == 0.0
    assert levels[-1][1] == 1.0
    assert fig5._levels(wanted, "tiny", None)[0] == (0, 1.0)


def test_length_measures_count_every_document() -> None:
    rows = [("document", 10, 3, 0), ("document", 30, 1, 1), ("question and answer", 6, 2, 0)]
    table = pd.DataFrame(rows, columns=list(artifacts.LENGTH_COLUMNS))
    here = fig5.summary(table).loc[("document", "here")]
    assert (here["mean"], here["median"], here["min"], here["max"], here["n"]) == (
        15,
        10,
        10,
        30,
        4,
    )
    ratio, context = MEASURES["length_ratio"], {"chunk_tok": 60}

    def found(**args: str) -> float:
        return ratio(table, context, **args).value

    assert found(what="document", statistic="max", of_statistic="chunk") == 0.5
    assert found(what="question and answer", statistic="mean") == pytest.approx(0.4)
    with pytest.raises(NotTestable, match="no page was counted"):
        found(what="page", statistic="mean")


def test_words_are_those_of_the_model_with_the_document_or_the_question(tmp_path) -> None:
    run = fig8.run("tiny", out_dir=str(tmp_path))
    assert list(run.table["series"]) == ["d2l", "d2l_swapped", "document_alone"] * 3
    assert list(run.table["n_facts"].drop_duplicates()) == [1, 4, 8]
    f1 = run.table.groupby("series")["f1"].mean()
    assert f1["d2l"] == 1.0
    assert f1["d2l_swapped"] < 0.5, "the question is no document"
    written = artifacts.read_csv(tmp_path / "data.csv")
    assert list(written["reply"]) == list(run.table["reply"])
    assert written["document"][8] == run.table["document"][8]
    drawn = " ".join(t.get_text() for t in run.figure().axes[0].texts)
    for row in run.table.to_dict("records"):
        for words in (row["question"], row["answer"], *row["reply"].split()):
            assert words in drawn
    assert "1.00" in drawn


def test_a_long_reply_is_wrapped() -> None:
    row = {"series": "d2l", "part": "", "n_facts": 1, "n": 1, "document": "It is so.\n" * 2,
           "question": "Is it?", "answer": "so", "reply": "word " * 40, "f1": 0.1, "recall": 1.0,
           "seed": 0}  # fmt: skip
    table = pd.DataFrame([row, row | {"reply": ""}])
    drawn = figures_data.draw_fig8(table, scale="tiny", title="x", metric="f1")
    texts = [t.get_text() for t in drawn.axes[0].texts]
    assert "(nothing)" in texts
    assert max(map(len, texts)) <= 56


def test_a_pretrained_base_is_asked_about_public_sets(monkeypatch) -> None:
    drawn = {
        "test": [Record(f"the answer is {i}.", (Question("what?", (f"{i}",)),)) for i in range(20)],
        "whole": [Record("b and c.", tuple(Question(a, (a,)) for a in "bc"))],
    }
    monkeypatch.setattr(facts, "titles_for", lambda name, part: drawn[part])
    monkeypatch.setattr(facts, "load", lambda *_: drawn["whole"])
    assert fig7.FIGURE.sets_at("small") == PUBLIC
    assert set(fig7.FIGURE.sets_at("tiny")) == set(fig7.FIGURE.sets)
    asked = {
        name: documents(with_overrides(fig7.config("small"), changes), 0, 9)
        for name, changes in PUBLIC.items()
    }
    assert len(asked["SQuAD"]) == 9
    assert set(asked["SQuAD"]) <= set(drawn["test"])
    assert [len(r.questions) for r in asked["DROP"]] == [1]
    watched = fact_fitting.on_the_way(fig3.config("paper"))  # asks SQuAD, but only in the end
    assert {r.source for rs in watched.values() for r in rs} == {"encyclopedia-test"}


def test_alternatives_may_see_fewer_documents_than_the_base_and_d2l(monkeypatch) -> None:
    def method(setting, document, questions):
        return [reply_to(setting, document, q, Meter()) for q in questions]

    wanted = fig3.config("tiny", {"eval.n_docs": (3,), "eval.n_facts": (2,), "eval.n_slow": 1,
                                  "eval.n_questions": 1, "eval.n_alternatives": 2})  # fmt: skip
    series = ("base_with_context", "d2l", "wrong_document", "retrieved", "cd_oracle")
    table = measure(
        wanted,
        load_shipped("fig3", {0: fig3.config("tiny")}, "tiny")[0],
        seed=0,
        methods=lambda *_: {(name, ""): method for name in series},
    )
    assert dict(zip(table["series"], table["n_docs"], strict=True)) == dict(
        zip(series, (3, 3, 3, 2, 1), strict=True)
    )
