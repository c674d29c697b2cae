"""What a base confirms in one reading against what it says when it is asked."""

import random

import pytest
import torch
from tiny_models import speaking

from d2l.config import ChunkConfig
from d2l.data.fact_training import FactStream, FactTraining
from d2l.lm.base import load_base, render_chat
from d2l.teacher import HfTeacher
from d2l.teaching import MAX_ANSWER_TOK, TOP_K, confirmed, families, taught


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-qa")


def drawn(base, n_questions=4, max_facts=8, n_docs=12):
    """Records of many lengths with their prompts and expected replies."""
    options = {"vocabulary": "closed", "words": "all", "rivals": False}
    stream = FactStream(**options, queries_per_doc=n_questions, max_facts=max_facts)
    training = FactTraining(base.tokenizer, stream, ChunkConfig(256, 8), seed=3)
    records = training.records(0, n_docs)
    examples = [training.example(r, 0, i) for i, r in enumerate(records)]
    texts = [f"{r.document}\n\n{q.text}" for r in records for q in r.questions]
    prompts = [render_chat(base.tokenizer, text) for text in texts]
    return records, examples, prompts, [q.answer for e in examples for q in e.queries]


def check(base, prompts, expected, k=5):
    """Compare every confirmed reply with the base's own and return both."""
    own = HfTeacher(base).reply(prompts, MAX_ANSWER_TOK, k)
    found = confirmed(base, prompts, expected, k)
    assert found.keys() == {i for i, r in enumerate(own) if r.ids == tuple(expected[i])}
    for i, reply in found.items():
        assert (reply.ids, reply.finished) == (own[i].ids, own[i].finished)
        torch.testing.assert_close(
            torch.tensor(reply.logprob), torch.tensor(own[i].logprob), atol=1e-5, rtol=1e-5
        )
        at = torch.tensor(own[i].logprob) > -12  # beyond, rounding decides who comes first
        assert torch.equal(torch.tensor(reply.idx)[at], torch.tensor(own[i].idx)[at])
    return found, own


@pytest.mark.parametrize("n_questions", [1, 2, 4])
def test_a_confirmed_reply_is_the_plain_one(base, n_questions):
    _, _, prompts, expected = drawn(base, n_questions)
    assert len({len(p) for p in prompts}) > 3, "documents are ragged"
    assert max(len(members) for _, members in families(prompts)) == n_questions
    found, _ = check(base, prompts, expected)
    assert len(found) > len(prompts) * 0.8


def test_prompts_that_share_nothing_or_all(base):
    _, _, prompts, expected = drawn(base)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    mixed, known = [prompts[i] for i in order], [expected[i] for i in order]
    assert max(len(members) for _, members in families(mixed)) < 4
    check(base, mixed, known)
    check(base, [prompts[0]] * 3, [expected[0]] * 3)
    check(base, prompts[:1], expected[:1])
    assert confirmed(base, [], [], 5) == {}


def test_only_the_whole_greedy_reply_is_confirmed(base):
    _, _, prompts, expected = drawn(base)
    *said, end = expected[0]
    for other in (said, [*said, end, end], [end], [*said, said[0]], [said[0] + 1, *said[1:], end]):
        assert confirmed(base, prompts[:1], [other], 5) == {}
    assert list(confirmed(base, prompts[:1], expected[:1], 5)) == [0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_of_any_family_and_within_a_sliding_window(family):
    base = speaking(family, max_position_embeddings=512)
    base.model.generation_config.eos_token_id = list(range(0, len(base.tokenizer), 3))
    prompts = [render_chat(base.tokenizer, f"{'the key is here ' * 3}{x}") for x in ("a", "b c")]
    own = HfTeacher(base).reply(prompts, 20, 4)
    expected = [r.ids for r in own]
    found = confirmed(base, prompts, expected, 4)
    assert found.keys() == {i for i, r in enumerate(own) if r.finished}
    assert found
    for i, reply in found.items():
        torch.testing.assert_close(torch.tensor(reply.logprob), torch.tensor(own[i].logprob))
    if family == "gemma2":
        base.model.config.sliding_window = 8
        assert confirmed(base, prompts, expected, 4) == {}


def test_examples_are_taught_as_by_asking_alone(base):
    """Where the data expect something else than the base says, the base is asked."""
    records, examples, prompts, expected = drawn(base, max_facts=16)
    own = HfTeacher(base).reply(prompts, MAX_ANSWER_TOK, TOP_K)
    assert any(r.ids != tuple(e) for r, e in zip(own, expected, strict=True))
    queries = [q for e in taught(examples, records, HfTeacher(base)) for q in e.queries]
    for query, reply, plain in zip(
        queries, own, [q for e in examples for q in e.queries], strict=True
    ):
        assert (query.prompt, query.answer) == (plain.prompt, reply.ids)
        torch.testing.assert_close(
            torch.tensor(query.teacher_logprob), torch.tensor(reply.logprob), atol=1e-5, rtol=1e-5
        )
