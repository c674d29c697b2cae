"""Replies and beliefs of a teacher against running the model token by token."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from d2l.data.needle import NeedleGenerator
from d2l.lm.base import load_base, render_chat
from d2l.teacher import HfTeacher, Taught, VllmTeacher, check_finite


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.fixture(scope="module")
def prompts(base):
    samples = NeedleGenerator(base.tokenizer, split="test").stratified(5, 60, 200, seed=1)
    return [render_chat(base.tokenizer, f"{s.document}\n\n{s.question}") for s in samples]


@torch.no_grad()
def alone(base, prompt, n, k):
    """Decode greedily in double precision without cache or padding."""
    ids, rows = list(prompt), []
    for _ in range(n):
        logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = logits.double().log_softmax(-1).topk(k)
        rows.append(best)
        ids.append(best.indices[0].item())
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return tuple(ids[len(prompt) :]), rows


def test_replies_equal_decoding_alone(base, prompts):
    taught = HfTeacher(base, batch=3).reply(prompts, 8, 5)
    assert len({len(p) for p in prompts}) > 1
    for prompt, reply in zip(prompts, taught, strict=True):
        ids, rows = alone(base, prompt, 8, 5)
        assert reply.ids == ids
        assert reply.finished == (ids[-1] == base.tokenizer.eos_token_id)
        assert len(reply.logprob) == len(reply.idx) == len(ids)
        for got, idx, best in zip(reply.logprob, reply.idx, rows, strict=True):
            assert got == pytest.approx(best.values.tolist(), abs=1e-3)
            assert idx[0] == best.indices[0].item()


def test_without_k_only_the_reply(base, prompts):
    (reply,) = HfTeacher(base).reply(prompts[:1], 2, 0)
    assert (reply.logprob, reply.idx, reply.finished) == ((), (), False)
    assert HfTeacher(base).reply([], 2, 4) == []


def test_k_beyond_the_vocabulary_takes_all_of_it(base, prompts):
    (reply,) = HfTeacher(base).reply(prompts[:1], 1, 10_000)
    assert len(reply.logprob[0]) == base.model.config.vocab_size
    assert sum(math.exp(x) for x in reply.logprob[0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(bad):
    with pytest.raises(FloatingPointError, match="the question 'Who'"):
        check_finite(Taught((3,), ((0.0, bad),), ((3, 4),), True), "the question 'Who'")
    check_finite(Taught((3,), ((0.0, float("-inf")),), ((3, 4),), True), "minus infinity is fine")


def test_vllm_is_asked_for_by_name_or_missed_clearly(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="HfTeacher"):
        VllmTeacher("org/model")


def test_vllm_replies_are_read(monkeypatch):
    """A stand-in with vLLM's interface: the sampled token may come beside the k best."""
    asked = {}

    class LLM:
        def __init__(self, model, **options):
            asked["engine"] = {"model": model, **options}

        def get_tokenizer(self):
            return "tokenizer"

        def generate(self, prompts, params, use_tqdm):
            asked["prompts"], asked["params"] = prompts, params
            best = {7: -0.5, 9: -0.1, 4: -3.0}
            step = {i: SimpleNamespace(logprob=x) for i, x in best.items()}
            out = SimpleNamespace(token_ids=[9, 2], logprobs=[step, step], finish_reason="stop")
            return [SimpleNamespace(outputs=[out]) for _ in prompts]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    teacher = VllmTeacher("org/model", dtype="bfloat16")
    (reply,) = teacher.reply([[5, 6]], 3, 2)
    assert reply == Taught((9, 2), ((-0.1, -0.5),) * 2, ((9, 7),) * 2, True)
    assert asked["engine"] == {"model": "org/model", "max_logprobs": 20, "dtype": "bfloat16"}
    assert asked["prompts"] == [{"prompt_token_ids": [5, 6]}]
    assert asked["params"] == {"temperature": 0.0, "max_tokens": 3, "logprobs": 2}
