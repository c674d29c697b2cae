"""The training stream of facts: documents that grow, queries that the documents answer."""

import random
from concurrent.futures import Future

import pytest

from d2l.config import ChunkConfig
from d2l.data import fact_training
from d2l.data.fact_training import FactPool, FactStream, FactTraining, gaps, titles_for
from d2l.data.record import Fact, Question, Record
from d2l.lm.base import load_base, render_chat
from d2l.teacher import HfTeacher
from d2l.teaching import taught


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-qa")


def stream(base, **options):
    options = {"vocabulary": "closed", "words": "all", "rivals": False, "max_facts": 6, **options}
    return FactTraining(base.tokenizer, FactStream(**options), ChunkConfig(64, 8), seed=3)


def test_a_batch_is_a_function_of_seed_step_and_level(base):
    one, other = stream(base), stream(base)
    assert one.batch(5, 4, 0.5) == other.batch(5, 4, 0.5)
    assert one.batch(5, 4, 0.5) != one.batch(6, 4, 0.5)


@pytest.mark.parametrize(("level", "most"), [(0.0, 1), (0.4, 3), (1.0, 6)])
def test_documents_grow_with_the_level(base, level, most):
    counts = [len(r.facts) for r in stream(base).records(0, 60, level)]
    assert max(counts) == most
    assert counts.count(most) >= 30


def test_queries_are_the_records_questions_in_the_chat_format(base):
    drawn = stream(base, queries_per_doc=2)
    for example, record in zip(drawn.batch(1, 6), drawn.records(1, 6), strict=True):
        assert len(example.queries) == min(2, len(record.facts))
        for query, question in zip(example.queries, record.questions, strict=True):
            assert list(query.prompt) == render_chat(base.tokenizer, question.text)
            said = base.tokenizer.decode(query.answer)
            assert said == f"{question.answers[0]} <end>"
            assert question.answers[0] in record.document
        text = base.tokenizer.decode([t for chunk in example.chunks for t in chunk])
        assert record.facts[0].text.rstrip(".") in text


def test_only_whole_documents_until_the_last_level(base):
    drawn = stream(base, cut_share=1.0)
    assert {len(e.chunks) for e in drawn.batch(0, 20, 0.9)} == {1}
    assert max(len(e.chunks) for e in drawn.batch(0, 20, 1.0)) > 1


def test_a_teacher_gives_its_own_answer_with_its_log_probabilities(base):
    drawn = stream(base, max_facts=2)
    examples = taught(drawn.batch(0, 4), drawn.records(0, 4), HfTeacher(base))
    right = 0
    for example, plain in zip(examples, drawn.batch(0, 4), strict=True):
        assert example.chunks == plain.chunks
        for query, own in zip(example.queries, plain.queries, strict=True):
            assert query.prompt == own.prompt
            assert len(query.teacher_logprob) == len(query.teacher_idx) == len(query.answer)
            assert [row[0] for row in query.teacher_idx] == list(query.answer)
            right += query.answer == own.answer
    assert right >= 4


def test_several_processes_draw_the_same_documents_in_the_same_order(base):
    plain = stream(base, max_facts=3)
    pool = FactPool(2, base.tokenizer, plain.stream, plain.chunk, plain.seed)
    try:
        for step, n, level in ((4, 5, 1.0), (5, 5, 1.0), (6, 5, 0.0), (7, 3, 0.0), (2, 5, 1.0)):
            drawn = pool.drawn(step, range(n), level)
            assert drawn == plain.drawn(step, range(n), level), (step, n, level)
    finally:
        pool.close()


@pytest.fixture
def titled(monkeypatch):
    """A public set of 20 titles, a record each."""
    records = [
        Record(f"here is word {i}.", (Question("what?", (f"{i}",)),), title=f"t{i}")
        for i in range(20)
    ]
    monkeypatch.setattr(fact_training, "load", lambda *_, **__: records)
    return records


def test_the_next_step_is_drawn_ahead_and_dropped_where_the_level_changes(base, monkeypatch):
    plain, of, drawn = stream(base), (0, 1), {}
    needed = [(0, of, 0.5), (1, of, 0.5), (2, of, 1.0)]
    pool = FactPool(1, base.tokenizer, plain.stream, plain.chunk, plain.seed)

    def submit(wanted):
        assert wanted not in drawn
        drawn[wanted] = Future()
        if wanted in needed:
            drawn[wanted].set_result(plain.drawn(*wanted))
        return [drawn[wanted]]

    monkeypatch.setattr(pool, "_submit", submit)
    for wanted in needed:
        assert pool.drawn(*wanted) == plain.drawn(*wanted)
    pool.close()
    assert list(drawn) == [*needed[:2], (2, of, 0.5), (2, of, 1.0), (3, of, 1.0)]
    assert [wanted for wanted, future in drawn.items() if future.cancelled()] == [(2, of, 0.5)]


def test_titles_for_training_watching_and_tests_are_apart(titled):
    parts = {part: titles_for("squad", part) for part in ("train", "watch", "test")}
    assert parts == {"train": titled[:5], "watch": titled[5:10], "test": titled[10:]}


@pytest.mark.parametrize(("share", "kinds"), [(0.0, {"recall"}), (1.0, {"in_place"})])
def test_passages_are_asked_about_in_their_own_words(base, monkeypatch, share, kinds):
    asked = (Question("who came?", ("Ann",)),)
    records = [
        Record("At noon on Sunday came Ann to see the old mill.", asked, title=f"t{i}")
        for i in range(20)
    ]
    monkeypatch.setattr(fact_training, "load", lambda *_, **__: records)
    drawn = stream(base, mix={"squad": 9.0}, in_place=share).records(0, 60)
    assert {q.kind for r in drawn if "mill" in r.document for q in r.questions} == kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_place": 1.5}, r"in_place is a share, 0 to 1, not 1\.5"),
        ({"in_place": -0.1}, "in_place"),
        ({"full": 1.5}, r"full is a share, 0 to 1, not 1\.5"),
        ({"mix": {"squad": -0.5}}, r"above 0, not \{'squad': -0\.5\}"),
        ({"mix": {"squad": float("nan")}}, "above 0"),
        ({"mix": {"ropes": 1.0}}, "ropes is not for training, only squad, squad/train"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_at_once(base, titled, options, message):
    with pytest.raises(ValueError, match=message):
        stream(base, **options)


@pytest.mark.parametrize(("full", "least", "most"), [(0.0, 6, 26), (1.0, 64, 64)])
def test_a_share_of_the_documents_has_all_facts(base, full, least, most):
    documents = stream(base, full=full, max_facts=8).records(0, 64)
    assert least <= sum(len(r.facts) == 8 for r in documents) <= most


def test_the_training_split_of_a_set_is_watched_and_tested_on_the_same_titles(monkeypatch):
    def load(name, split, **_):
        asked = (Question("what?", (split,)),)
        return [Record(f"{name} {split}", asked, title=f"{split}{i}") for i in range(20)]

    monkeypatch.setattr(fact_training, "load", load)
    monkeypatch.setattr(fact_training, "articles", lambda: load("wikipedia", "article"))
    monkeypatch.setattr(fact_training, "asked_articles", lambda: load("wikipedia", "asked"))
    titles = {
        (name, part): {r.title for r in titles_for(name, part)}
        for name in fact_training.TRAINING_SETS
        for part in ("train", "watch", "test")
    }
    assert titles["squad/train", "train"] == {f"train{i}" for i in range(20)}
    for part in ("watch", "test"):
        assert titles["squad/train", part] == titles["squad", part]
    for name, which in (("wikipedia", "article"), ("wikipedia/written", "asked")):
        listed = [titles[name, part] for part in ("train", "watch", "test")]
        assert [len(t) for t in listed] == [5, 5, 10]
        assert set.union(*listed) == {f"{which}{i}" for i in range(20)}


def test_a_share_of_the_documents_comes_from_public_sets(base, titled):
    drawn = stream(base, mix={"squad": 3.0}).records(0, 200)
    passages = [r for r in drawn if r.title in {t.title for t in titled}]
    assert 120 < len(passages) < 180
    assert {r.title for r in passages} == {f"t{i}" for i in range(5)}


def test_sentences_ask_for_what_they_leave_out(base):
    asked, plain = stream(base, queries="sentences", queries_per_doc=3), stream(base)
    for level in (0.0, 1.0):
        records, usual = asked.records(2, 30, level), plain.records(2, 30, level)
        for record, same in zip(records, usual, strict=True):
            assert record.document == same.document
            assert len(record.questions) == min(3, len(record.facts))
            for question in record.questions:
                (i,) = question.facts
                fact, gap = record.facts[i], question.text
                assert question.kind == "gap"
                assert question.answers == (fact.value,)
                assert fact.entity in gap
                assert gap == fact.text.replace(fact.value, "").strip()
        assert any("?" in q.text for r in usual for q in r.questions)


def test_a_sentence_that_gives_its_answer_away_is_not_asked():
    names = Fact("Lin Tin", "metal", "Tin", "metal0", "Lin Tin is made of Tin.")
    pronoun = Fact("Ada Lin", "pet", "goat", "pet0", "She keeps a goat.")
    record = Record("...", (Question("What?", ("goat",)),), (names, pronoun))
    assert gaps(record, 2, random.Random(0)) == record
