import math

import pytest
from needle_table import CONTEXT, needle_table

from d2l import artifacts, claims
from d2l.experiments import EXPERIMENTS, SCALES
from d2l.measures import MEASURES, NotTestable, pool_seeds

TABLE = needle_table()


def measured(name, table=TABLE, **args):
    return MEASURES[name](table, CONTEXT, **args).value


def verdicts(table, scale="tiny"):
    about = [c for c in claims.load() if c.figure == "fig2"]
    return {v.claim: v for v in claims.judge(table, about, scale, CONTEXT)}


def test_every_claim_is_complete_and_of_a_known_figure():
    loaded = claims.load()
    assert loaded
    for claim in loaded:
        assert claim.figure in EXPERIMENTS
        assert set(claim.tests) == set(SCALES)
        assert claim.id.startswith(f"{claim.figure}.")


def test_the_papers_shape_holds_everywhere_and_smoke_judges_nothing():
    assert {v.verdict for v in verdicts(TABLE).values()} == {"holds"}
    assert {v.verdict for v in verdicts(TABLE, "smoke").values()} == {"not testable at this scale"}


def test_verdicts_carry_measured_value_paper_value_and_tolerance():
    v = verdicts(TABLE)["fig2.d2l-four-windows"]
    assert (v.measured, v.tolerance, v.scale) == (1.0, ">= 0.95", "tiny")
    assert "32K" in v.paper_value
    assert "2,048 tok (8 chunks)" in v.note


@pytest.mark.parametrize(
    ("claim", "spoil"),
    [
        ("fig2.base-reads-its-window", ("base_with_context", 256, 0.5)),
        ("fig2.base-collapses", ("base_with_context", 2048, 0.2)),
        ("fig2.d2l-near-perfect", ("d2l", 64, 0.96)),
        ("fig2.d2l-four-windows", ("d2l", 2048, 0.9)),
        ("fig2.d2l-degrades-late", ("d2l", 1024, 0.5)),
        ("fig2.d2l-sixteen-windows", ("d2l", 8192, 0.9)),
        ("fig2.wrong-document-at-chance", ("wrong_document", 64, 0.3)),
        ("fig2.no-context-at-chance", ("base_without_context", 64, 0.3)),
    ],
)
def test_one_bad_accuracy_breaks_the_claim_that_is_about_it(claim, spoil):
    series, tok, accuracy = spoil
    table = TABLE.copy()
    here = (table["series"] == series) & (table["haystack_tok"] == tok)
    table.loc[here, "accuracy"] = accuracy
    assert verdicts(table)[claim].verdict == "does not hold"


def test_growing_memory_breaks_the_memory_claims():
    table = TABLE.copy()
    ours = table["series"] == "d2l"
    table.loc[ours, "gen_memory_mib"] = table.loc[ours, "haystack_tok"] * 0.004
    found = verdicts(table)
    assert found["fig2.d2l-memory-constant"].verdict == "does not hold"
    assert found["fig2.d2l-memory-with-adapter"].verdict == "does not hold"
    assert found["fig2.base-memory-grows"].verdict == "holds"


def test_measures_read_the_table():
    assert measured("accuracy_at_windows", series="base_with_context", windows=1) == 1
    assert measured("accuracy_kept_past_window", series="base_with_context") == 0
    assert measured("worst_accuracy_up_to", series="base_with_context", tok=1024) == 0
    assert measured("windows_until_fall", series="d2l", level=0.9) == 16
    assert measured("memory_exponent", series="d2l") == pytest.approx(0, abs=1e-9)
    assert measured("largest_memory_mib", series="d2l") == pytest.approx(0.08)
    share = measured("memory_share_with_adapter", series="d2l", of="base_with_context")
    assert share == pytest.approx((0.08 + 0.05 * 32) / (0.004 * 8212))


def test_the_fall_is_interpolated_in_log_length():
    table = needle_table(fall_tok=4096)  # 1 at 2048, 0 at 4096: .9 is a tenth of an octave on
    value = measured("windows_until_fall", table, series="d2l", level=0.9)
    assert value == pytest.approx(4 * 2**0.1)
    assert measured("windows_until_fall", needle_table(fall_tok=32), series="d2l", level=0.9) == 0


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("accuracy_at_windows", {"series": "d2l", "windows": 64}, "not evaluated near 32,768"),
        ("accuracy_at_windows", {"series": "icl", "windows": 1}, "no measured rows of icl"),
        ("worst_accuracy_up_to", {"series": "d2l", "tok": 99_999}, "not evaluated up to"),
        ("highest_plausible_accuracy", {"series": "d2l", "min_n": 901}, "900 questions"),
        ("memory_exponent", {"series": "d2l", "from_windows": 9}, "too few lengths"),
    ],
)
def test_measures_say_why_the_table_cannot_answer(name, args, reason):
    with pytest.raises(NotTestable, match=reason):
        measured(name, **args)


def test_unmeasured_memory_is_not_testable():
    table = TABLE.assign(gen_memory_mib=math.nan)
    found = verdicts(table)
    memory = [v for name, v in found.items() if "memory" in name]
    assert {v.verdict for v in memory} == {"not testable at this scale"}
    assert found["fig2.d2l-four-windows"].verdict == "holds"


def test_seeds_are_pooled_and_their_range_is_noted():
    table = needle_table(seeds=(0, 1))
    here = (table["series"] == "d2l") & (table["haystack_tok"] == 2048) & (table["seed"] == 1)
    table.loc[here, "accuracy"] = 0.5
    found = verdicts(table)["fig2.d2l-four-windows"]
    assert found.measured == 0.75
    assert "n = 200" in found.note
    assert "2 seeds: 0.5 to 1" in found.note
    assert [p.n for p in pool_seeds(table, "d2l")] == [200] * 9


def test_count_reads_as_a_sentence():
    assert claims.count(["holds"]) == "1 holds"
    many = ["holds"] * 2 + ["does not hold"] + ["not testable at this scale"] * 3
    assert claims.count(many) == "2 hold, 1 does not, 3 not testable"


CLAIM = """
[[claim]]
id = "fig2.x"
figure = "fig2"
statement = "s"
source = "section 1"
paper_value = "1"
  [[claim.test]]
  scales = ["smoke", "tiny", "small", "paper"]
  {test}
"""
GOOD = 'measure = "windows_until_fall"\nop = ">"\nthreshold = 1'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CLAIM.format(test=GOOD.replace("fall", "fail")), "did you mean 'windows_until_fall'"),
        (CLAIM.format(test=GOOD.replace('">"', '"=="')), "needs an op of >="),
        (CLAIM.format(test=GOOD + '\nnot_testable = "no"'), "both a measure and a reason"),
        (CLAIM.format(test=GOOD + "\ntol = 1"), r"unknown keys \['tol'\]"),
        (CLAIM.format(test=GOOD).replace(', "paper"', ""), "says nothing about paper"),
        (CLAIM.format(test=GOOD).replace('"paper"', '"huge"'), "scale 'huge'"),
        (CLAIM.format(test=GOOD).replace('source = "section 1"', ""), "lacks source"),
        (CLAIM.format(test=GOOD) * 2, r"used twice: fig2\.x"),
        ("[[claim]", "claims.toml"),
    ],
)
def test_broken_claims_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        claims.parse(path)


def test_committed_verdicts_equal_a_fresh_judgement():
    for folder, fresh, changed in claims.ledger():
        manifest = artifacts.Manifest.read(folder)
        assert changed == [], folder
        stated = {v["claim"]: v["verdict"] for v in manifest.verdicts}
        assert stated == {v.claim: v.verdict for v in fresh}, folder


def test_f1_kept_is_precision_seen_through_recall():
    from qa_table import qa_table

    table = qa_table({("x", ""): 0.5, ("silent", ""): 0.05}, seeds=(0,)).assign(f1=0.1)
    kept = claims.MEASURES["qa_f1_kept"]
    assert kept(table, {}, series="x").value == pytest.approx(0.2)
    with pytest.raises(claims.NotTestable, match="recall of silent"):
        kept(table, {}, series="silent")


def test_the_gap_that_a_method_closes():
    from qa_table import qa_table

    rows = {("base_without_context", ""): 0.1, ("base_with_context", ""): 0.5, ("d2l", "x"): 0.2}
    gap = claims.MEASURES["qa_gap"]
    assert gap(qa_table(rows, seeds=(0,)), {}, series="d2l", part="x").value == pytest.approx(0.25)
    idle = rows | {("base_with_context", ""): 0.15}
    with pytest.raises(claims.NotTestable, match=r"0\.1 without the document and 0\.15 with it"):
        gap(qa_table(idle, seeds=(0,)), {}, series="d2l", part="x")
