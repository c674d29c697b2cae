"""Passages of public sets: sentences that answer their questions, more of them with the level."""

import random

import pytest

from d2l.data.passages import Passages, asked_in_place
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


SENTENCE = "The old castle of Kirkwall was built by Ann Lee-Cole in 1190, and sold to 3,000 men."


def test_what_is_asked_in_place_can_be_put_back():
    """The question word stands exactly where the answer stood, among words of the sentence."""
    seen = set()
    for seed in range(300):
        question = asked_in_place(SENTENCE, random.Random(seed))
        assert question is not None
        (answer,) = question.answers
        (word,) = [w for w in ("who or what", "how many", "what year") if w in question.text] or [
            "what"
        ]
        back = question.text.removesuffix("?").replace(word, answer, 1)
        assert back in SENTENCE
        assert len(back.split()) - len(answer.split()) >= 3
        seen.add((word, answer))
    assert {
        ("who or what", "Kirkwall"), ("who or what", "Ann Lee-Cole"), ("what year", "1190"),
        ("how many", "3,000"), ("what", "castle"),
    } <= seen  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "answers"),
    [
        ("", set()),
        ("Ann saw Bob there.", set()),
        ("so it is as it was", set()),
        ("we met Ann, Ann met us", set()),
        ("¿Dónde está ella en Österreich?", {"Österreich"}),
        ('they met in "1,200.5" of (May)', {"1,200.5", "May"}),
        ("it was on 31 October 2005 that", {"31 October 2005"}),
    ],
)
def test_what_can_be_asked_for(sentence, answers):
    found = [asked_in_place(sentence, random.Random(seed)) for seed in range(80)]
    assert {q.answers[0] for q in found if q} == answers


def test_a_date_is_asked_for_by_when():
    asked = asked_in_place("it was on 31 October 2005 that", random.Random(1))
    assert asked is not None
    assert " when " in asked.text


def test_a_share_of_the_passages_is_asked_about_in_its_own_words():
    long = Passages([Record(SENTENCE, (Question("Who built it?", ("Ann Lee-Cole",)),))])

    def kinds(share):
        rng = random.Random(3)
        drawn = [long.sample(rng, 1.0, 3, share) for _ in range(200)]
        return [q.kind == "in_place" for r in drawn for q in r.questions]

    assert not any(kinds(0.0))
    assert all(kinds(1.0))
    assert 0.6 < sum(kinds(0.5)) / len(kinds(0.5)) < 0.9  # three such questions or the one


def test_a_record_keeps_its_questions_where_nothing_can_be_asked_in_place():
    short = Passages([Record("Ann stayed!", (Question("Who stayed?", ("Ann",)),))])
    (question,) = short.sample(random.Random(0), 0.0, 3, 1.0).questions
    assert question.kind == "recall"


def test_without_a_share_the_draw_is_that_of_earlier_versions():
    drawn = [passages().sample(random.Random(i), 0.5, 3) for i in range(4)]
    assert [(r.document, len(r.questions)) for r in drawn] == [
        ('In 1901 Ann came to Rome. "Why?" asked Bob.', 2),
        ("He left in 1902, as Dr.", 1),
        ("In 1901 Ann came to Rome.", 1),
        ("Cole said. Ann stayed!", 1),
    ]


def test_an_answer_is_of_five_words_at_most():
    sentence = "we saw Ann Bo Cy Di Ed Flo Gus Hal walk by the old mill"
    found = [asked_in_place(sentence, random.Random(seed)) for seed in range(200)]
    assert max(len(q.answers[0].split()) for q in found if q) == 5
