"""Passages of public sets: sentences that answer their questions, more of them with the level."""

import random

import pytest

from d2l.data.passages import Passages
from d2l.data.record import Question, Record

TEXT = 'In 1901 Ann came to Rome. "Why?" asked Bob. He left in 1902, as Dr. Cole said. Ann stayed!'
ASKED = (
    Question("When did Ann come to Rome?", ("1901",)),
    Question("Who asked why?", ("Bob",)),
    Question("When did he leave?", ("1902", "in 1902")),
    Question("Who stayed?", ("Ann",)),
)


def passages(*questions):
    return Passages([Record(TEXT, questions or ASKED)])


def test_one_sentence_at_first_and_all_of_them_at_last():
    at = {level: set() for level in (0.0, 0.5, 1.0)}
    for level, found in at.items():
        rng = random.Random(1)
        found |= {passages().sample(rng, level, 9).document for _ in range(60)}
    assert at[0.0] == {
        "In 1901 Ann came to Rome.", '"Why?" asked Bob.', "He left in 1902, as Dr.", "Ann stayed!",
    }  # fmt: skip
    assert all(text in TEXT for found in at.values() for text in found)
    assert TEXT in at[1.0]
    assert TEXT not in at[0.5]


def test_a_question_comes_with_the_sentence_that_shares_its_words():
    rng = random.Random(2)
    for _ in range(80):
        record = passages().sample(rng, 0.0, 9)
        assert record.questions
        assert all(q.answers[0] in record.document for q in record.questions)
        if record.document == "In 1901 Ann came to Rome.":
            assert [q.text for q in record.questions] == ["When did Ann come to Rome?"]


def test_no_more_questions_than_asked_for_and_the_record_is_not_lost():
    record = passages().sample(random.Random(0), 1.0, 2)
    assert len(record.questions) <= 2


def test_records_without_their_answers_are_named():
    with pytest.raises(ValueError, match="none of 1 records"):
        passages(Question("Who?", ("Zoe",)))
