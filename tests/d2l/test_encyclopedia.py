"""Generated encyclopedia: splits that share nothing, answers that the document bears out."""

import functools
import random
import re

import pytest

from d2l.data.encyclopedia import GROUPS, KINDS, LEXICONS, MAX_FACTS, EncyclopediaGenerator
from d2l.data.lexicon import Forms, parse_attributes, seen_words
from d2l.data.lexicon_closed import closed_words
from d2l.data.record import Question, Record

VOCABULARIES = ("open", "closed")
ORDINARY = re.compile(
    r"\b(?:the|of|Port|New|Upper|Bay|Society|Guild|Company|Academy|League|Bank|Festival|Fair|Race|"
    r"Games|Feast|Crown|Bell|Tablet|Chalice|Sword|Mask)\b"
)


@functools.cache
def records(split, n=60, kinds=KINDS, seed=0, **options):
    generator = EncyclopediaGenerator(split, **options)
    rng = random.Random(seed)
    sizes = [1 + i * (MAX_FACTS - 1) // (n - 1) for i in range(n)]
    return [generator.sample(rng, size, 2, kinds) for size in sizes]


def invented(record, vocabulary):
    """Names in a record: invented words where the vocabulary is open, else combinations."""
    lexicon = LEXICONS[vocabulary]
    kinds = {a.name: a.kind for listed in lexicon.attributes.values() for a in listed}
    names = {fact.entity for fact in record.facts}
    names |= {f.value for f in record.facts if kinds.get(f.attribute) in lexicon.attributes}
    if vocabulary == "closed":
        return names
    return {word for name in names for word in ORDINARY.sub("", name).split()}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_splits_share_neither_names_nor_forms(vocabulary):
    seen = {}
    for split in ("train", "test"):
        drawn = records(split, vocabulary=vocabulary)
        seen[split] = (
            set().union(*(invented(r, vocabulary) for r in drawn)),
            {f.form for r in drawn for f in r.facts},
            {q.paraphrase for r in drawn for q in r.questions},
        )
    for train, test in zip(seen["train"], seen["test"], strict=True):
        assert len(train) > 30
        assert len(test) > 30
        assert not train & test


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_form_of_one_split_is_written_in_the_other(vocabulary):
    lexicon = LEXICONS[vocabulary]
    attributes = [a for listed in lexicon.attributes.values() for a in listed]
    rules = [r for listed in lexicon.rules.values() for r in listed]
    for groups in (
        [lexicon.sentence_frames, *(x.sentences for x in (*attributes, *rules))],
        [lexicon.question_frames, *(a.questions for a in attributes)],
        [*(r.situations for r in rules), *lexicon.numeric.values()],
    ):
        train, test = (
            {form.text for forms in groups for form in getattr(forms, split)}
            for split in ("train", "test")
        )
        assert train
        assert test
        assert not train & test


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_stand_in_the_document_and_answer_the_questions(vocabulary, split):
    kinds = set()
    for record in records(split, vocabulary=vocabulary):
        for fact in record.facts:
            assert fact.text in record.document
            assert all(v in fact.text.lower() for v in fact.value.lower().split(" over "))
        assert len({q.text for q in record.questions}) == len(record.questions)
        for question in record.questions:
            kinds.add(question.kind)
            check(record, question)
    assert kinds == set(KINDS)


def check(record, question):
    """Work the answer out again from the facts alone."""
    facts = [record.facts[i] for i in question.facts]
    answer = question.answers[0]
    if question.kind == "recall":
        assert answer == facts[0].value
        assert facts[0].entity in question.text
    elif question.kind == "two_hop":
        first, second = facts
        assert second.entity == first.value
        assert answer == second.value
        assert first.entity in question.text
        assert second.entity not in question.text
    elif question.kind == "situational":
        better, worse = facts[0].value.split(" over ")
        assert answer in question.text
        where = {word: question.text.index(f" {word}") for word in (better, worse)}
        people = sorted(LEXICONS_PEOPLE & set(re.findall(r"\w+", question.text)))
        first = min(people, key=question.text.index)
        assert (where[better] < where[worse]) == (answer == first)
    elif question.kind == "unanswerable":
        assert facts == []
        named = [f for f in record.facts if f.entity in question.text]
        asked = question.paraphrase.split("/")[0]
        assert all(f.attribute != asked for f in named)
    else:
        values = [int(f.value) for f in facts]
        if len(values) == 1:
            (k,) = {int(n) for n in re.findall(r"\d+", question.text)}
            sign = 1 if "add" in question.paraphrase else -1
            assert int(answer) == values[0] + sign * k
        elif "difference" in question.paraphrase:
            assert int(answer) == abs(values[0] - values[1])
        else:
            wanted = max(values) if "larger" in question.paraphrase else min(values)
            assert answer == facts[values.index(wanted)].entity


LEXICONS_PEOPLE = {
    person
    for lexicon in LEXICONS.values()
    for people in lexicon.people.values()
    for person in people
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_list_has_words_of_both_sorts(vocabulary):
    for listed in LEXICONS[vocabulary].values.values():
        assert seen_words(listed, "heldout")
        assert len(seen_words(listed, "seen")) >= 6
        assert {*seen_words(listed, "heldout"), *seen_words(listed, "seen")} == set(listed)


def test_closed_vocabulary_is_small_and_closed():
    known = set(closed_words())
    assert len(known) <= 400
    for split in ("train", "test"):
        for record in records(split, n=40, vocabulary="closed", words="all"):
            texts = [record.document, *(f"{q.text} {q.answers[0]}" for q in record.questions)]
            assert set(re.findall(r"[A-Za-z]+", " ".join(texts))) <= known


def test_facts_are_counted_and_distractors_share_them():
    for n_facts in (1, 2, 7, MAX_FACTS):
        for share in (0.0, 0.5):
            generator = EncyclopediaGenerator(distractors=share)
            drawn = [generator.sample(random.Random(i), n_facts, 1) for i in range(5)]
            assert all(len(r.facts) == n_facts for r in drawn)
    lone = EncyclopediaGenerator(distractors=0.0).sample(random.Random(0), 8, 1)
    assert {fact.entity for fact in lone.facts} == {lone.title}
    mixed = EncyclopediaGenerator(distractors=0.5).sample(random.Random(0), 8, 1)
    assert sum(fact.entity == mixed.title for fact in mixed.facts) in (3, 4)


def test_recall_goes_through_all_facts_before_it_repeats_one():
    for seed in range(4):
        record = EncyclopediaGenerator().sample(random.Random(seed), 12, 24)
        asked = [q.facts[0] for q in record.questions]
        assert sorted(asked[:12]) == sorted(asked[12:]) == list(range(12))


def test_values_of_one_kind_differ_within_a_document():
    lexicon = LEXICONS["open"]
    kinds = {a.name: a.kind for listed in lexicon.attributes.values() for a in listed}
    for record in records("train", n=24, kinds=("recall",)):
        drawn = [(kinds[f.attribute], f.value) for f in record.facts if kinds[f.attribute] != "day"]
        assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("group", GROUPS)
def test_values_can_be_restricted(group):
    lexicon = LEXICONS["open"]
    kinds = {a.name: a.kind for listed in lexicon.attributes.values() for a in listed}
    for record in records("train", n=12, kinds=("recall",), values=(group,)):
        assert {lexicon.group(kinds[f.attribute]) for f in record.facts} == {group}


def test_held_out_words_are_never_in_training():
    values = {
        words: {
            f.value
            for r in records("train", n=24, kinds=("recall",), values=("words",), words=words)
            for f in r.facts
        }
        for words in ("seen", "heldout")
    }
    assert not values["seen"] & values["heldout"]
    assert min(map(len, values.values())) > 15


def test_forms_of_the_other_split_can_be_asked_for():
    own, borrowed = (
        {f.form for r in records("test", n=24, forms=forms) for f in r.facts}
        for forms in (None, "train")
    )
    assert not own & borrowed


def test_a_record_depends_on_its_own_generator_alone():
    drawn = []
    for seed in (1, 1, 2):
        random.random()
        drawn.append(EncyclopediaGenerator().sample(random.Random(seed), 9, 5, KINDS))
    one, same, other = drawn
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "dev"}, "dev"),
        ({"vocabulary": "huge"}, "huge"),
        ({"values": ("words", "colors")}, "colors"),
        ({"values": ()}, "values"),
        ({"words": "some"}, "some"),
        ({"forms": "both"}, "both"),
        ({"distractors": 1.0}, "1.0"),
        ({"distractors": -0.1}, "-0.1"),
    ],
)
def test_unknown_options_are_refused(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        EncyclopediaGenerator(**options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1), "got 0"),
        ((MAX_FACTS + 1, 1), "got 41"),
        ((3, 0), "and 0"),
        ((1, 1, ("recall", "guess")), "guess"),
        ((1, 1, ()), "kinds"),
        ((1, 100), "only 7 different questions"),
        ((1, 1, ("two_hop",)), "only 0 different questions"),
    ],
)
def test_impossible_samples_are_refused(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        EncyclopediaGenerator().sample(random.Random(0), *arguments)


def test_tables_that_are_wrong_are_refused():
    with pytest.raises(ValueError, match="2 lines"):
        parse_attributes("a.b: c; d\none || two")
    with pytest.raises(ValueError, match="repeated"):
        Forms.parse("one | two || one", "f")


def test_records_need_text_and_answers():
    with pytest.raises(ValueError, match="needs answers"):
        Question("Who?", ())
    with pytest.raises(ValueError, match="needs answers"):
        Question("Who?", ("Ada", " "))
    with pytest.raises(ValueError, match="needs text"):
        Question(" ", ("Ada",))
    with pytest.raises(ValueError, match="squad"):
        Record(" \n", (), source="squad")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_some_facts_has_every_kind(vocabulary, kind):
    generator = EncyclopediaGenerator("test", vocabulary=vocabulary, distractors=0.4)
    for seed in range(12):
        record = generator.sample(random.Random(seed), 8, 1, (kind,))
        assert record.questions[0].kind == kind


def test_without_rivals_no_two_entities_are_of_one_type():
    lexicon = LEXICONS["closed"]
    types = {a.name: of for of, listed in lexicon.attributes.items() for a in listed}
    generator = EncyclopediaGenerator("test", vocabulary="closed", rivals=False, distractors=0.7)
    for seed in range(40):
        record = generator.sample(random.Random(seed), 1 + seed % 16, 1)
        assert len(record.facts) == 1 + seed % 16
        of = {fact.entity: types[fact.attribute] for fact in record.facts}
        assert len(set(of.values())) == len(of)
    with pytest.raises(ValueError, match="without rivals a document has at most 21 facts"):
        generator.sample(random.Random(0), 22, 1)


def test_closed_names_of_one_document_share_no_word():
    for record in records("train", vocabulary="closed", kinds=("recall",))[:30]:
        words = [word for name in invented(record, "closed") for word in name.split()]
        assert len(set(words)) == len(words)
