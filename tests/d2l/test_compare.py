import math

import pytest
import torch

from d2l import DocToLoRA, compare

QUESTION = "What is the special magic number? Reply with only the number."
FILLER = "The grass is green. The sky is blue. The sun is yellow.\n"
PAGE = FILLER * 25 + "The special magic number is 4821.\n" + FILLER * 25


@pytest.fixture(scope="module")
def model():
    return DocToLoRA.from_pretrained("fig2/tiny")


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize(PAGE)


def test_three_ways_of_asking(model, adapter):
    answers = {a.name: a for a in compare.compare(model, QUESTION, adapter, PAGE)}
    assert list(answers) == ["D2L", "base", "in context"]
    assert answers["D2L"].text == model.ask(QUESTION, adapter) == "4821"
    assert answers["base"].text == model.ask(QUESTION)
    for a in answers.values():
        assert 0 < a.first_token_s <= a.total_s
    kept = {name: a.mib for name, a in answers.items()}
    assert kept["D2L"] - kept["base"] == pytest.approx(adapter.nbytes / 2**20, rel=0.1)
    assert kept["in context"] > 4 * kept["base"]


def test_a_document_beyond_the_window_is_cut_to_it(model):
    short = compare.in_context(model, QUESTION, "The grass is green.")
    assert short == f"The grass is green.\n\n{QUESTION}"
    cut = compare.in_context(model, QUESTION, PAGE * 3, max_new_tokens=32)
    used = len(model.prompt_ids(cut)) + 32
    assert model.base.window - 8 <= used <= model.base.window


def test_one_new_token_is_timed_too(model, adapter):
    one = compare.timed(model, "D2L", QUESTION, adapter, max_new_tokens=1)
    assert one.first_token_s == pytest.approx(one.total_s, rel=0.5)


def test_the_chunk_with_the_needle_moves_the_answer(model, adapter):
    n = len(adapter.chunks)
    assert n >= 3
    moved = compare.influence(model, QUESTION, "4821", adapter, [[i] for i in range(n)])
    assert sorted(moved)[-1] > 5 > 1 > sorted(moved)[-2]
    together = compare.influence(model, QUESTION, "4821", adapter, [range(n), []])
    assert together[0] == pytest.approx(max(moved), rel=0.1)
    assert together[1] == pytest.approx(0.0, abs=1e-5)


def test_likelihood_equals_a_forward_pass_of_each_alone(model, adapter):
    other = model.internalize("The special magic number is 7305.")
    adapters = [adapter, None, other, adapter]
    found = model.log_likelihood(QUESTION, "4821", adapters)
    prompt = model.prompt_ids(QUESTION)
    target = model.base.tokenizer("4821", add_special_tokens=False).input_ids
    from d2l.lm.hooks import applied
    from d2l.lora import route_rows

    for a, value in zip(adapters, found, strict=True):
        delta = None if a is None else route_rows(a.batch("cpu", torch.float32), [0])
        with torch.no_grad(), applied(model.base.model, delta):
            logits = model.base.model(torch.tensor([prompt + target])).logits[0].double()
        log_p = logits.log_softmax(-1)
        expected = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
        assert value == pytest.approx(expected, abs=1e-4)
    assert found[0] > math.log(10) + max(found[1], found[2])


def test_an_answer_without_tokens_has_no_likelihood(model, adapter):
    with pytest.raises(ValueError, match="the answer is empty"):
        model.log_likelihood(QUESTION, "", [adapter])
