"""Self-generated data: what is kept, resumed, refused."""

import dataclasses
import json
import math

import pytest
from filelock import FileLock

from d2l.data.needle import NeedleGenerator
from d2l.lm.base import load_base, render_chat
from d2l.self_generate import (
    SelfGeneration,
    ask_questions,
    generate,
    read,
    read_questions,
    shards,
)
from d2l.teacher import HfTeacher, Taught

CONFIG = SelfGeneration(n_questions=2, k=4, max_new_tokens=8, shard_docs=2)


@pytest.fixture(scope="module")
def teacher():
    return HfTeacher(load_base("tiny"))


@pytest.fixture(scope="module")
def samples(teacher):
    return NeedleGenerator(teacher.tokenizer, split="test").stratified(5, 50, 100, seed=1)


@pytest.fixture(scope="module")
def documents(samples):
    return [s.document for s in samples]


def one_question(document, n):
    return ["What is the special magic number? Reply with only the number."]


def counting(teacher, fail_after=math.inf):
    """Wrap a teacher so that calls are counted and, at one of them, the power fails."""

    class Counting:
        tokenizer, identity = teacher.tokenizer, teacher.identity
        calls = 0

        def reply(self, *arguments):
            if self.calls >= fail_after:
                raise KeyboardInterrupt
            self.calls += 1
            return teacher.reply(*arguments)

    return Counting()


def test_rows_hold_the_teachers_answer_and_the_students_prompt(
    teacher, samples, documents, tmp_path
):
    n = generate(documents, teacher, tmp_path, CONFIG, questions=one_question)
    assert n == 5
    assert [p.name for p in shards(tmp_path)] == [f"shard-{i:05d}.parquet" for i in range(3)]
    got = list(read(tmp_path))
    assert [document for document, _ in got] == documents
    for sample, (_, (query,)) in zip(samples, got, strict=True):
        text = teacher.tokenizer.decode(query.answer, skip_special_tokens=True)
        assert text == sample.answer
        assert query.prompt == tuple(render_chat(teacher.tokenizer, one_question("", 1)[0]))
        assert all(len(row) == 4 for row in query.teacher_logprob)
        assert [row[0] for row in query.teacher_idx] == list(query.answer)
    card = (tmp_path / "README.md").read_text()
    assert "5 answers to questions about 5 documents" in card
    assert teacher.identity in card


def test_a_stopped_run_goes_on_and_gives_the_same(teacher, documents, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    generate(documents, teacher, whole, CONFIG, questions=one_question)
    with pytest.raises(KeyboardInterrupt):
        generate(documents, counting(teacher, 1), stopped, CONFIG, questions=one_question)
    assert len(shards(stopped)) == 1
    assert not list(stopped.glob("*tmp*"))
    again = counting(teacher)
    generate(documents, again, stopped, CONFIG, questions=one_question)
    assert again.calls == 2
    assert list(read(stopped)) == list(read(whole))


def test_a_folder_of_another_run_is_refused(teacher, documents, tmp_path):
    generate(documents[:2], teacher, tmp_path, CONFIG, questions=one_question)
    before = {p.name: p.read_bytes() for p in shards(tmp_path)}
    other = counting(teacher)
    other.identity = "another model"
    for changed, match in (
        ((documents[:2], other, tmp_path, CONFIG), "another model"),
        ((documents[:3], teacher, tmp_path, CONFIG), "documents was"),
        ((documents[:2], teacher, tmp_path, dataclasses.replace(CONFIG, k=3)), '"k": 3'),
    ):
        with pytest.raises(ValueError, match=match):
            generate(*changed, questions=one_question)
    assert {p.name: p.read_bytes() for p in shards(tmp_path)} == before


def test_a_shard_cut_in_half_is_named(teacher, documents, tmp_path):
    generate(documents, teacher, tmp_path, CONFIG, questions=one_question)
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"shard-00001.parquet is damaged"):
        list(read(tmp_path))
    with pytest.raises(ValueError, match=r"shard-00001.parquet is damaged"):
        generate(documents, teacher, tmp_path, CONFIG, questions=one_question)
    path.unlink()
    assert generate(documents, teacher, tmp_path, CONFIG, questions=one_question) == 5


def test_two_runs_cannot_write_to_one_folder(teacher, documents, tmp_path):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RuntimeError, match="another run is writing"),
    ):
        generate(documents, teacher, tmp_path, CONFIG, questions=one_question)
    assert not shards(tmp_path)


def test_nan_stops_before_the_shard_is_written(teacher, documents, tmp_path):
    class Broken:
        tokenizer, identity = teacher.tokenizer, teacher.identity
        calls = 0

        def reply(self, prompts, max_new_tokens, k):
            self.calls += 1
            replies = teacher.reply(prompts, max_new_tokens, k)
            if self.calls < 2:
                return replies
            bad = ((math.nan,) * k,) * len(replies[0].ids)
            return [Taught(r.ids, bad, r.idx, r.finished) for r in replies]

    with pytest.raises(FloatingPointError, match="special magic number"):
        generate(documents, Broken(), tmp_path, CONFIG, questions=one_question)
    assert [p.name for p in shards(tmp_path)] == ["shard-00000.parquet"]


def test_unfinished_replies_are_dropped(teacher, documents, tmp_path):
    short = dataclasses.replace(CONFIG, max_new_tokens=1)
    assert generate(documents, teacher, tmp_path, short, questions=one_question) == 0
    assert list(read(tmp_path)) == []


def test_a_model_can_ask(teacher):
    """A stand-in that lists questions; later rounds see the earlier ones and do not repeat them."""
    seen = []

    class Asker:
        tokenizer, identity = teacher.tokenizer, "asker"

        def reply(self, prompts, max_new_tokens, k):
            seen.append([teacher.tokenizer.decode(p) for p in prompts])
            ids = teacher.tokenizer("The number is 1?\n1. The number is 2?\nHere we go.").input_ids
            return [Taught(tuple(ids), (), (), True) for _ in prompts]

    asked = ask_questions(Asker(), ["Here we go.", "There."], 2, rounds=2)
    assert asked == [["The number is 1?", "The number is 2?"]] * 2
    assert "The number is 1?" not in seen[0][0]
    assert "The number is 1?" in seen[1][0]


def test_lists_of_questions_are_read():
    text = " 1) Who?\n(2): What?\n• Where?\n- 3 of what?\nSure, here they are:\n\n?\nWho?"
    assert read_questions(text) == ["Who?", "What?", "Where?", "3 of what?"]


def test_bad_input_is_refused(teacher, documents, tmp_path):
    with pytest.raises(ValueError, match="document 1 of 2 is empty"):
        generate([documents[0], " \n"], teacher, tmp_path / "a", CONFIG)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match="no shards"):
        list(read(tmp_path))
    (tmp_path / "shard-00000.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="no manifest"):
        generate(documents, teacher, tmp_path, CONFIG)
    (tmp_path / "manifest.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match="cannot be read"):
        generate(documents, teacher, tmp_path, CONFIG)
