"""The tiny base that answers questions: rows it is trained on, and what ships."""

import random

import pytest
import torch

from d2l.data.encyclopedia import KINDS, EncyclopediaGenerator
from d2l.data.lexicon_closed import closed_words
from d2l.lm.base import load_base, render_chat
from d2l.tiny_qa import QaTask
from d2l.tiny_training import TinyTraining, exact, pad_rows, train_tiny


@pytest.fixture(scope="module")
def task():
    return QaTask()


def decoded(task, row):
    ids, spans = row
    return [task.tokenizer.decode(ids[start:stop]) for start, stop in spans]


def test_rows_are_the_chat_turns_of_a_record(task):
    generator = EncyclopediaGenerator("train", vocabulary="closed")
    record = generator.sample(random.Random(0), 4, 3, KINDS)
    ids, spans = task.row(record)
    messages = []
    for i, question in enumerate(record.questions):
        text = question.text if i else f"{record.document}\n\n{question.text}"
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": question.answers[0]},
        ]
    system = {"role": "system", "content": ""}
    whole = task.tokenizer.apply_chat_template([system, *messages], tokenize=False)
    assert ids == task.tokenizer(whole, add_special_tokens=False).input_ids
    assert decoded(task, (ids, spans)) == [f"{q.answers[0]} <end>" for q in record.questions]
    prompt = render_chat(task.tokenizer, messages[0]["content"])
    assert ids[: spans[0][0]] == prompt
    assert task.tokenizer.unk_token_id not in ids


def test_without_a_document_nothing_is_known(task):
    record = EncyclopediaGenerator("train", vocabulary="closed").sample(random.Random(0), 4, 2)
    asked = task.row(record, document=False)
    assert decoded(task, asked) == ["unknown <end>"] * 2
    assert record.facts[0].text not in task.tokenizer.decode(asked[0])
    kept = task.row(record, document=False, answer=True)
    assert decoded(task, kept) == [f"{q.answers[0]} <end>" for q in record.questions]


def test_documents_grow_with_the_level_and_stay_in_the_window(task):
    longest = []
    for level in (0.0, 0.5, 1.0):
        rows = [row for seed in range(3) for row in task.rows(random.Random(seed), level, 16)]
        longest.append(max(len(ids) for ids, _ in rows))
        assert all(len(spans) == task.n_questions for _, spans in rows)
    assert longest[0] < longest[1] < longest[2] <= 512
    mixed = [decoded(task, row) for row in task.rows(random.Random(0), 1.0, 32)]
    assert ["unknown <end>"] * task.n_questions in mixed


def test_answers_are_judged_one_by_one():
    rows = [([1, 2, 3, 4, 5], [(1, 2), (3, 5)])]
    ids, answers = pad_rows(rows, 0, "cpu")
    assert answers.tolist() == [[-100, 2, -100, 4, 5]]
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 9, 4, 6]]), 10).float()
    assert exact(logits, ids, rows) == [True, False]


def test_training_reports_and_writes_a_card(tmp_path, monkeypatch):
    small = QaTask(width=32, n_layers=1, facts=(1, 2))
    monkeypatch.setattr(
        QaTask,
        "measure",
        lambda *_: {
            "by_facts": {1: 0.5},
            "by_kind": {"recall": 0.25},
            "rivals": 0.1,
            "without": 0.0,
        },
    )
    steps = []
    recipe = TinyTraining(growing=1, settling=2, batch=8, n_levels=1)
    train_tiny(small, tmp_path / "qa", 0, recipe, report=lambda *step: steps.append(step))
    assert len(steps) >= 2
    assert "recall 0.25" in (tmp_path / "qa" / "README.md").read_text()
    base = load_base(str(tmp_path / "qa"))
    assert base.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert len(base.tokenizer) >= len(closed_words())


def test_every_number_of_the_card_can_be_measured():
    small = QaTask(width=32, n_layers=1)
    measured = small.measure(small.build(0))
    assert set(measured) == {"by_facts", "by_kind", "rivals", "without"}
    assert set(measured["by_kind"]) == set(KINDS)


def test_shipped_base_answers_from_its_prompt_and_not_without(task):
    model = load_base("tiny-qa").model
    for n_facts in (2, 8):
        assert task.accuracy(model, n_facts, n=40, seed=9) >= 0.9
    assert task.accuracy(model, 8, document=False, n=40, seed=9) <= 0.1
