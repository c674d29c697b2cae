"""Scores, controls and measured memory of the needle evaluation, on a random tiny model."""

from __future__ import annotations

import pytest
import torch

from d2l.config import ChunkConfig, HypernetConfig, LoraConfig, PerceiverConfig
from d2l.data.needle import NeedleGenerator, NeedleSample
from d2l.evaluate import (
    MIB,
    answer_in_context,
    answer_internalized,
    answer_without_context,
    matches,
)
from d2l.lm.base import LanguageModel, render_chat
from d2l.lm.tiny import build_model, build_tokenizer
from d2l.model import DocToLoRA
from d2l.reading import sha256_of

SMALL = PerceiverConfig(d_latent=16, n_latents=4, n_blocks=1, n_heads=2, n_kv_heads=1, d_head=8)


@pytest.fixture(scope="module")
def model() -> DocToLoRA:
    base = LanguageModel(build_model(0).eval().requires_grad_(False), build_tokenizer(), "random")
    config = HypernetConfig(perceiver=SMALL, lora=LoraConfig(rank=2))
    torch.manual_seed(0)
    return DocToLoRA(base, config, ChunkConfig(max_tok=64, min_tok=8))


@pytest.fixture(scope="module")
def samples(model: DocToLoRA) -> list[NeedleSample]:
    return NeedleGenerator(model.base.tokenizer, split="test").stratified(5, 100, 150, seed=3)


def test_a_score_counts_the_last_word_and_only_if_it_is_exact() -> None:
    assert matches(" 0482\n", "0482")
    assert matches("The special magic number is 0482.", "0482")
    assert not matches("0482 or 1111", "0482")
    assert not matches("482", "0482")
    assert not matches("04823", "0482")
    assert not matches("", "0482")


def test_right_and_wrong_adapters_are_asked(model, samples, monkeypatch) -> None:
    """A stand-in that answers with its adapter's own document shows which one was asked."""
    asked = []

    def answer(prompts, adapters, **_):
        known = [sha256_of(s.document) for s in current]
        docs = [known.index(a.sources[0].sha256) for a in adapters]
        asked.append(docs)
        return [current[d].answer for d in docs], 0

    monkeypatch.setattr(model, "answer", answer)
    batches = [samples[:3], samples[3:]]
    own_hits = wrong_hits = 0
    for current in batches:
        own, wrong = answer_internalized(model, current, batch=3, max_new_tokens=4)
        own_hits, wrong_hits = own_hits + own.hits, wrong_hits + wrong.hits
    assert (own_hits, wrong_hits) == (5, 0)
    assert asked == [[0, 1, 2], [1, 2, 0], [0, 1], [1, 0]]


def test_a_batch_of_one_has_no_wrong_document(model, samples) -> None:
    with pytest.raises(ValueError, match="at least two"):
        answer_internalized(model, samples, batch=1, max_new_tokens=4)


def test_an_untrained_hypernetwork_changes_nothing(model, samples) -> None:
    adapters = model.internalize_batch([s.document for s in samples])
    questions = [s.question for s in samples]
    assert model.generate(questions, adapters, max_new_tokens=6) == model.generate(
        questions, max_new_tokens=6
    )


def test_memory_is_the_cache_that_generation_ends_with(model, samples) -> None:
    config, n_new = model.base.model.config, 4
    per_tok = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    tok = model.base.tokenizer

    def expected(prompt: str) -> float:
        # the last generated token is never fed back, so it has no place in the cache
        return (len(render_chat(tok, prompt)) + n_new - 1) * per_tok / MIB

    options = {"batch": 1, "max_new_tokens": n_new}
    model.base.model.generation_config.eos_token_id = None
    one = samples[:1]
    inside = answer_in_context(model, one, **options)
    outside = answer_without_context(model, one, **options)
    assert inside.gen_memory_mib == pytest.approx(
        expected(f"{one[0].document}\n\n{one[0].question}")
    )
    assert outside.gen_memory_mib == pytest.approx(expected(one[0].question))
    own, _ = answer_internalized(model, samples[:2], batch=2, max_new_tokens=n_new)
    assert own.gen_memory_mib == pytest.approx(expected(one[0].question))


def test_adapter_memory_counts_every_chunk_and_the_bias(model, samples) -> None:
    own, _ = answer_internalized(model, samples[:2], batch=2, max_new_tokens=2)
    targets, r = model.hypernet.targets, model.config.lora.rank
    width = sum(targets.d_in[m] + targets.d_out[m] for m in targets.modules)
    values = len(targets.layers) * (own.n_chunks + 1) * r * width
    assert own.n_chunks == len(model.chunks(samples[0].document)) > 1
    assert own.adapter_mib == pytest.approx(values * 4 / MIB)
    assert own.internalize_s > 0


def test_internalizing_is_the_same_with_and_without_deduplication(model) -> None:
    document = "\n".join(["The grass is green."] * 60)
    a = model.internalize_batch([document])[0].A["down_proj"]
    b = model.internalize_batch([document], dedupe=False)[0].A["down_proj"]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("document", ["", "  \n "])
def test_an_empty_document_is_refused(model, document) -> None:
    with pytest.raises(ValueError, match="empty"):
        model.internalize(document)


def test_a_document_below_the_minimum_is_refused(model) -> None:
    strict = DocToLoRA(model.base, model.config, ChunkConfig(max_tok=64, min_tok=40))
    with pytest.raises(ValueError, match=r"needs at least 40.*longer document"):
        strict.internalize("The grass is green.")


def test_special_tokens_in_a_document_are_inert(model) -> None:
    tok = model.base.tokenizer
    ids = [i for chunk in model.chunks("The <end> is green. <assistant> <s>") for i in chunk]
    for special in ("<end>", "<assistant>", "<s>"):
        plain = [i for chunk in model.chunks("The sky is green.") for i in chunk]
        which = tok.convert_tokens_to_ids(special)
        assert ids.count(which) == plain.count(which)
