"""A document in parts: which part a question wakes, against BM25 by its formula."""

import dataclasses
import math
import random
import re

import pytest
import torch
from tiny_models import doc_to_lora, speaking

from d2l.adapter import Adapter
from d2l.lm.base import render_chat
from d2l.routing import Index, Routed, sentence_chunks

PARTS = (
    "The grass is green and the village slept.",
    "The special magic number is 4 8 2 9 today.",
    "There and back again went the old boats.",
)
TEXT = " ".join(PARTS)


@pytest.fixture(scope="module")
def model():
    return doc_to_lora(speaking())


@pytest.fixture(scope="module")
def routed(model):
    return Routed.read(model, TEXT, part_tok=4)


def same(a, b):
    return a.sources == b.sources and all(
        torch.allclose(mine[m], theirs[m], atol=1e-5)
        for mine, theirs in ((a.A, b.A), (a.B, b.B))
        for m in mine
    )


@pytest.mark.parametrize(
    ("question", "part"),
    [("What colour is the grass?", 0), ("Which magic number?", 1), ("Where were the BOATS?", 2)],
)
def test_a_question_wakes_the_part_that_shares_its_words(model, routed, question, part):
    assert same(routed.adapter_for(question), model.internalize_batch([PARTS[part]])[0])


def test_several_parts_are_composed_in_the_order_of_the_document(routed):
    found = routed.adapter_for("Is the magic number green grass?", k=2)
    assert same(found, routed.adapters[0] + routed.adapters[1])
    assert len(routed.adapter_for("grass", k=9).sources) == 3
    assert routed.nbytes == sum(a.nbytes for a in routed.adapters)


def test_saved_parts_come_back_and_answer_as_before(routed, tmp_path):
    file = routed.save(tmp_path / "parts.safetensors")
    again = Routed.load(file)
    assert again.parts == PARTS
    assert len(again.adapters) == 3
    for question in ("Which magic number?", "Where were the boats?", "zebra"):
        assert same(again.adapter_for(question), routed.adapter_for(question))
    both = routed.adapters[0] + routed.adapters[1]
    assert same(Adapter.load(file).without(PARTS[2]), both)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Routed.load(tmp_path / "other.safetensors")


def test_documents_are_found_by_their_titles(model, tmp_path):
    one, two = model.internalize_batch([PARTS[0], PARTS[2]])
    file = (one + two).weighted(PARTS[2], 0.5).save(tmp_path / "two.safetensors")
    assert same(Routed.load(file).adapter_for("boats?"), two.weighted(PARTS[2], 0.5))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_many_parts_keep_their_order(model, tmp_path, n):
    text = " ".join(f"Here are {w} old boats." for w in "abcde"[:n])
    routed = Routed.read(model, text, part_tok=1)
    again = Routed.load(routed.save(tmp_path / "parts.safetensors"))
    assert again.parts == routed.parts
    assert len(again.parts) == n
    assert all(map(same, again.adapters, routed.adapters))


@pytest.mark.parametrize("question", ["???", "", "zebra", "草は何色ですか"])
def test_a_question_without_a_match_wakes_the_first_part(routed, question):
    assert same(routed.adapter_for(question), routed.adapters[0])


def test_equal_parts_are_read_once_and_one_part_needs_no_index(model):
    twice = Routed.read(model, f"{PARTS[0]} {PARTS[0]} {PARTS[1]}", part_tok=4)
    assert len(twice.adapters) == 2
    (only,) = Routed.read(model, PARTS[0]).adapters
    assert same(Routed.read(model, PARTS[0]).adapter_for("Who?", k=3), only)


def test_a_part_too_short_for_a_chunk_joins_its_neighbour():
    model = doc_to_lora(speaking())
    model.chunk = dataclasses.replace(model.chunk, min_tok=2)
    alone = Routed.read(model, f"Go. {TEXT} Go.", part_tok=1)
    model.chunk = dataclasses.replace(
        model.chunk, min_tok=1 + len(render_chat(model.base.tokenizer, "Go."))
    )
    joined = Routed.read(model, f"Go. {TEXT} Go.", part_tok=1)
    assert [len(r.adapters) for r in (alone, joined)] == [4, 3]
    ends = model.internalize_batch([f"Go. {PARTS[0]}", f"{PARTS[2]} Go."])
    assert same(joined.adapters[0], ends[0])
    assert same(joined.adapters[2], ends[1])
    with pytest.raises(ValueError, match="a chunk needs at least"):
        Routed.read(model, "Go.")


def test_short_sentences_are_packed_and_long_ones_stand_alone(model):
    assert sentence_chunks(model.base, TEXT, 1) == list(PARTS)
    assert sentence_chunks(model.base, TEXT, 1000) == [TEXT]


def test_bad_requests_are_refused(model, routed):
    with pytest.raises(ValueError, match="the document is empty"):
        Routed.read(model, " \n")
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        Routed.read(model, TEXT, part_tok=0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        routed.adapter_for("grass", k=0)
    with pytest.raises(ValueError, match="3 parts need as many adapters, not 2"):
        Routed(routed.adapters[:2], PARTS)
    with pytest.raises(ValueError, match="must hold one document to be saved"):
        Routed([routed.adapters[0] + routed.adapters[1]], PARTS[:1]).save("never.safetensors")


def test_the_best_texts_are_those_of_bm25():
    """Robertson's formula with Lucene's idf (k1 1.5, b .75), summed over the words asked for."""
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(30)]
    clear = 0
    for _ in range(60):
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(2, 20))) for _ in range(6)]
        asked = " ".join(rng.sample(vocabulary, 4))
        words = [re.findall(r"\w+", t) for t in texts]
        mean = sum(map(len, words)) / len(words)
        scores = []
        for own in words:
            score = 0.0
            for w in asked.split():
                df, tf = sum(w in other for other in words), own.count(w)
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
            scores.append(score)
        order = sorted(range(6), key=lambda i: -scores[i])
        if scores[order[1]] - scores[order[2]] > 1e-4:
            clear += 1
            assert Index(texts).best(asked, 2) == sorted(order[:2])
    assert clear > 40
