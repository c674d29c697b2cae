"""Asking: rows with adapters of their own, threads, streams, other bases, every family."""

import copy
import dataclasses
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import FAMILIES, MLP_OUT, doc_to_lora, speaking

from d2l.lm.hooks import decoder_of, linears_of

QUESTIONS = ("Where is the baker?", "What is the special magic number?", "The old dog?")


def text(i):
    words = ("green", "blue", "yellow", "grass", "sky", "sun")
    rng = random.Random(i)
    return f"The {rng.choice(words)} is {rng.choice(words)}. Number {i:04d}. Here we go."


@pytest.fixture(scope="module")
def model():
    found = doc_to_lora(speaking(dtype=torch.float64, num_hidden_layers=2), rank=1)
    found.hypernet.double()
    return found


@pytest.fixture(scope="module")
def docs(model):
    """Adapters of 16 documents, with factors drawn so that each answers in its own way."""
    read = [model.internalize(text(i)) for i in range(16)]
    draw = torch.Generator().manual_seed(0)

    def noise(factors):
        return {m: torch.randn(t.shape, generator=draw, dtype=t.dtype) for m, t in factors.items()}

    return [dataclasses.replace(d, A=noise(d.A), B=noise(d.B)) for d in read]


def test_documents_that_begin_alike_are_read_as_if_alone(model, monkeypatch):
    """Equal chunks, chunks within chunks, chunks that part halfway, and one of its own."""
    pieces = [list(range(3, 11)), list(range(3, 9)), [*range(3, 9), 20, 21], [30, 31, 32]]
    chunks = [pieces[i] for i in (3, 0, 1, 0, 2, 1)]
    n_tok = []
    layer = getattr(*decoder_of(model.base.model))[0]
    hook = layer.register_forward_hook(lambda _, args, out: n_tok.append(out.shape[0]))
    model.encode(pieces[:2])  # tries out whether rows can be shared
    n_tok.clear()
    together, apart = (model.encode(chunks, dedupe=dedupe) for dedupe in (True, False))
    assert n_tok == [2, 6]
    n_tok.clear()
    monkeypatch.setattr(model, "tok_budget", 6)
    in_groups = model.encode(chunks)
    hook.remove()
    assert n_tok == [1, 1, 1]
    for found in (together, in_groups):
        for a, b in zip((found.A, found.B), (apart.A, apart.B), strict=True):
            torch.testing.assert_close(a["down_proj"], b["down_proj"], rtol=1e-9, atol=1e-9)


def test_each_row_has_its_own_adapter(model, docs):
    rows = [docs[2], None, docs[0], docs[2], docs[1] + docs[3], None]
    prompts = [QUESTIONS[i % 3] for i in range(len(rows))]
    alone = [model.ask(p, a, max_new_tokens=6) for p, a in zip(prompts, rows, strict=True)]
    assert model.generate(prompts, rows, max_new_tokens=6) == alone
    assert len(set(alone)) > 3
    same = [model.ask(p, docs[5], max_new_tokens=6) for p in prompts]
    assert model.generate(prompts, docs[5], max_new_tokens=6) == same
    bare = [model.ask(p, max_new_tokens=6) for p in prompts]
    assert model.generate(prompts, max_new_tokens=6) == bare
    assert model.generate(prompts, [None] * 6, max_new_tokens=6) == bare
    assert model.generate([]) == []


def test_generate_options_and_several_answers(model, docs):
    rows, prompts = [docs[3], None, docs[1]], list(QUESTIONS)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    alone = [model.generate([p], [a], **beams) for p, a in zip(prompts, rows, strict=True)]
    assert model.generate(prompts, rows, **beams) == [x for two in alone for x in two]
    torch.manual_seed(0)
    sampled = {model.ask(QUESTIONS[0], docs[0], do_sample=True, max_new_tokens=5) for _ in range(4)}
    assert len(sampled) > 1


def test_prompts_may_be_token_ids(model, docs):
    ids = model.prompt_ids(QUESTIONS[0])
    assert (
        model.generate([ids, QUESTIONS[0]], docs[0], max_new_tokens=5)
        == [model.ask(QUESTIONS[0], docs[0], max_new_tokens=5)] * 2
    )
    for empty in ("", " \n", []):
        with pytest.raises(ValueError, match="prompt is empty"):
            model.generate([QUESTIONS[0], empty])
    with pytest.raises(ValueError, match="2 prompts need 2 adapters, or one for all, not 3"):
        model.generate(list(QUESTIONS[:2]), [None, docs[0], None])


def test_streaming_gives_the_answer_in_pieces(model, docs):
    pieces = list(model.stream(QUESTIONS[1], docs[4], max_new_tokens=8))
    assert len(pieces) > 2
    assert "".join(pieces).strip() == model.ask(QUESTIONS[1], docs[4], max_new_tokens=8).strip()


def test_a_stream_that_is_closed_stops(model, docs):
    before = threading.active_count()
    steps = []
    watch = model.base.model.register_forward_hook(lambda *_: steps.append(1))
    stream = model.stream(QUESTIONS[0], docs[0], max_new_tokens=5000)
    next(stream)
    stream.close()
    watch.remove()
    assert threading.active_count() == before
    assert len(steps) < 4000


def test_a_stream_raises_what_went_wrong(model, docs):
    other = doc_to_lora(speaking(hidden_size=24))
    with pytest.raises(ValueError, match="which has no Site"):
        list(other.stream(QUESTIONS[0], docs[0]))
    with pytest.raises(ValueError, match="prompt is empty"):
        list(model.stream(" ", docs[0]))


def test_ten_thousand_mixed_requests_from_eight_threads(model, docs):
    """Not one answer differs from the answer given alone, whoever asks beside it."""
    one = {"max_new_tokens": 1}
    adapters = [*docs, None]
    expected = {
        (d, q): model.ask(QUESTIONS[q], adapters[d], **one) for d in range(17) for q in range(3)
    }
    assert len({expected[d, 1] for d in range(16)}) > 8
    todo, wrong, lock = [10_000], [], threading.Lock()
    start = threading.Barrier(8)

    def work(seed):
        rng = random.Random(seed)
        start.wait()
        while True:
            n = rng.choice((1, 2, 16, 32, 64))
            with lock:
                if todo[0] <= 0:
                    return
                todo[0] -= n
            asked = [(rng.randrange(17), rng.randrange(3)) for _ in range(n)]
            prompts = [QUESTIONS[q] for _, q in asked]
            found = model.generate(prompts, [adapters[d] for d, _ in asked], **one)
            wrong.extend(
                (pair, answer)
                for pair, answer in zip(asked, found, strict=True)
                if answer != expected[pair]
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not wrong
    assert todo[0] <= 0


def test_nothing_of_a_document_stays_in_the_model(model, docs):
    before = model.ask(QUESTIONS[1], max_new_tokens=6)
    state = {k: v.clone() for k, v in model.base.model.state_dict().items()}
    assert model.ask(QUESTIONS[1], docs[0], max_new_tokens=6) != before
    assert model.ask(QUESTIONS[1], max_new_tokens=6) == before
    assert all(torch.equal(v, state[k]) for k, v in model.base.model.state_dict().items())


def test_an_adapter_for_another_base(model, docs):
    wider = doc_to_lora(speaking(hidden_size=24))
    with pytest.raises(
        ValueError, match=r"made for base 'random-llama'.*which has no Site\(layer=0"
    ):
        wider.ask(QUESTIONS[0], docs[0])
    shallow = doc_to_lora(speaking(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no Site\(layer=1"):
        shallow.ask(QUESTIONS[0], docs[0])
    twin = doc_to_lora(speaking(seed=9, num_hidden_layers=2), rank=1)
    with pytest.warns(UserWarning, match="answers may be wrong"):
        twin.ask(QUESTIONS[0], docs[0], max_new_tokens=1)


def test_the_hypernetwork_is_identified_by_its_weights(model):
    again = copy.deepcopy(model.hypernet)
    assert model.hypernet_id == model.hypernet_id
    first = model.hypernet_id
    with torch.no_grad():
        model.hypernet.head[0, 0, 0, 0] += 1
    assert model.hypernet_id != first
    model.hypernet.load_state_dict(again.state_dict())
    assert model.hypernet_id == first


def merged_copy(lm, adapter):
    """The base with delta W inside its weights, by hand."""
    lm = copy.deepcopy(lm)
    decoder, name = decoder_of(lm)
    with torch.no_grad():
        for site in adapter.sites:
            linear = linears_of(getattr(decoder, name)[site.layer])[site.module]
            linear.weight += adapter.delta_W(site.layer, site.module)
    return lm


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "mixtral"])
def test_any_decoder(family):
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    moe = family in ("qwen3_moe", "mixtral")
    base = speaking(family, **(experts | {"moe_intermediate_size": 16} if moe else {}))
    target = "o_proj" if moe else MLP_OUT.get(family, "down_proj")
    model = doc_to_lora(base, target_modules=(target,))
    adapter = model.internalize(text(1)) + model.internalize(text(2))
    ids = torch.tensor([model.prompt_ids(QUESTIONS[1])])
    expected = merged_copy(base.model, adapter)(ids).logits
    assert (expected - base.model(ids).logits).abs().max() > 1e-3
    with adapter.merge_into(model):
        torch.testing.assert_close(base.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged = model.ask(QUESTIONS[1], max_new_tokens=4)
    assert model.ask(QUESTIONS[1], adapter, max_new_tokens=4) == merged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            len(model.generate([QUESTIONS[1]] * 3, [adapter, None, adapter], max_new_tokens=2)) == 3
        )
