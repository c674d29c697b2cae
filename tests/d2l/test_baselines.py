"""Every alternative on the tiny needle base: what it puts where, meters, and refuses."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import doc_to_lora

from d2l import baselines
from d2l.baselines import DistillConfig, Setting, d2l_batched, prompted
from d2l.baselines.distilled import fresh_lora
from d2l.baselines.prompted import cut_middle, select_surprising, sentence_chunks
from d2l.checkpoint import load_model
from d2l.data.needle import NeedleGenerator
from d2l.experiments.shipped import weights_dir
from d2l.lm.base import LanguageModel, load_base, render_chat
from d2l.lm.hooks import applied
from d2l.lora import route_rows
from d2l.model import DocToLoRA


@pytest.fixture(scope="module")
def hypernet():
    base = load_base("tiny")
    return load_model(weights_dir("fig2", "tiny", 0), base)


@pytest.fixture(scope="module")
def setting(hypernet):
    return Setting(hypernet.base, hypernet, max_new_tokens=6)


@pytest.fixture(scope="module")
def sample(setting):
    (found,) = NeedleGenerator(setting.base.tokenizer, split="test").stratified(1, 150, 200, seed=7)
    return found


def answers(method, setting, sample):
    return [r.text for r in method(setting, sample.document, [sample.question])]


@pytest.mark.parametrize(
    "method",
    [
        baselines.in_context,
        baselines.truncated_context,
        baselines.retrieved(40),
        baselines.compressed(1.0),
        baselines.d2l_batched,
        baselines.d2l_iterative,
        baselines.d2l_routed(),
    ],
    ids=lambda method: method.__qualname__.split(".")[0],
)
def test_what_sees_the_needle_answers(method, setting, sample):
    assert answers(method, setting, sample) == [sample.answer]


def test_without_context_there_is_no_answer(setting, sample):
    (reply,) = baselines.without_context(setting, sample.document, [sample.question])
    assert reply.text != sample.answer
    assert (reply.context_tok, reply.context_ratio, reply.adapter_mib) == (0, 0.0, 0.0)
    assert reply.document_tok == sample.n_tok


def test_context_ratios_are_what_stood_in_the_prompt(setting, sample):
    ask = (setting, sample.document, [sample.question])
    assert baselines.in_context(*ask)[0].context_ratio == 1.0
    for rate in (0.1, 0.2, 0.4, 0.6, 0.8, 0.9):
        (reply,) = baselines.compressed(rate)(*ask)
        assert rate - 0.05 < reply.context_ratio <= rate + 0.02
    (reply,) = baselines.retrieved(40)(*ask)
    assert 0 < reply.context_tok <= 41


def test_an_adapter_is_metered_apart(setting, sample):
    plain, bare = (
        method(setting, sample.document, [sample.question])[0]
        for method in (baselines.d2l_batched, baselines.without_context)
    )
    assert plain.adapter_mib > 0
    assert plain.update.seconds > 0
    assert bare.update.seconds == 0
    assert plain.generation.seconds > 0
    counted = Setting(setting.base, setting.hypernet, max_new_tokens=2, count_memory=True)
    d2l, full = (
        method(counted, sample.document, [sample.question])[0]
        for method in (baselines.d2l_batched, baselines.in_context)
    )
    assert math.isnan(d2l.update.seconds)
    assert d2l.update.peak_mib > d2l.adapter_mib
    assert d2l.generation.peak_mib < full.generation.peak_mib
    assert full.update.peak_mib == 0


def test_iterative_is_batched_in_less_memory(setting):
    (long,) = NeedleGenerator(setting.base.tokenizer, split="test").stratified(1, 900, 1000, seed=2)
    counted = Setting(setting.base, setting.hypernet, max_new_tokens=5, count_memory=True)
    batched, iterative = (
        method(counted, long.document, [long.question])[0]
        for method in (baselines.d2l_batched, baselines.d2l_iterative)
    )
    assert batched.text == iterative.text == long.answer
    assert iterative.update.peak_mib < batched.update.peak_mib
    assert setting.hypernet.tok_budget == 4096


def test_internalised_and_in_the_prompt_at_once(setting, sample):
    (reply,) = baselines.d2l_with_truncated_context(setting, sample.document, [sample.question])
    assert reply.context_ratio == 1.0
    assert reply.adapter_mib > 0


def test_swapped_is_the_question_in_the_adapter_and_the_document_in_the_prompt(setting, sample):
    ask = (setting, sample.document, [sample.question])
    (reply,), (bare,) = baselines.d2l_swapped(*ask), baselines.document_alone(*ask)
    model = setting.hypernet
    for found, adapter in ((reply, model.internalize(sample.question)), (bare, None)):
        (said,) = model.generate([sample.document], [adapter], max_new_tokens=6)
        assert found.text.strip() == said.strip()
        assert found.context_ratio == 1.0
    assert reply.adapter_mib > bare.adapter_mib == 0


def test_the_middle_is_cut_where_the_window_ends(setting):
    (long,) = NeedleGenerator(setting.base.tokenizer, split="test").stratified(1, 900, 1000, seed=2)
    (reply,) = baselines.truncated_context(setting, long.document, [long.question])
    room = setting.room_tok(long.question)
    assert room - 3 <= reply.context_tok <= room < setting.base.window
    limited = Setting(setting.base, context_tok=50)
    (reply,) = baselines.truncated_context(limited, long.document, [long.question])
    assert 45 <= reply.context_tok <= 50
    text = " ".join(f"{i}" for i in range(10))
    assert cut_middle(setting.base, text, 4).split() == ["01", "89"]
    assert cut_middle(setting.base, "Here we go.", 4) == "Here we go."


def test_surprising_words_are_kept_in_order(setting):
    document = "The grass is green. The sky is blue. The sun is yellow. wolf The grass is green."
    kept = select_surprising(setting.base, document, 0.3).split()
    assert "wolf" in kept
    positions, words = [], document.split()
    for word in kept:
        positions.append(words.index(word, positions[-1] + 1 if positions else 0))
    assert positions == sorted(positions)
    assert select_surprising(setting.base, document, 1.0).split() == words
    assert len(select_surprising(setting.base, document, 1e-6).split()) == 1


def test_sentences_are_packed_whole(setting):
    chunks = sentence_chunks(setting.base, "Here we go. There and back again.\nThe sky is blue.", 5)
    assert chunks == ["Here we go.", "There and back again.", "The sky is blue."]


def test_bm25_finds_the_sentence_that_shares_words(setting):
    document = "The grass is green. The magic wolf sang. The sun is yellow. There and back again."
    (reply,) = baselines.retrieved(6)(setting, document, ["What did the wolf do?"])
    assert reply.context_tok == setting.n_tok("The magic wolf sang.")


def test_distillation_teaches_what_the_context_said(setting, sample):
    config = DistillConfig(lr=1e-2, epochs=40)
    (reply,) = baselines.distilled(config)(setting, sample.document, [sample.question])
    assert reply.text == sample.answer
    assert reply.context_tok == 0
    asked = []

    def ask(document, n):
        asked.append(n)
        return [sample.question, "What is the special magic number?"]

    own = Setting(setting.base, max_new_tokens=6, ask=ask)
    config = DistillConfig(n_queries=2, lr=1e-2, epochs=40, batch=1)
    first, second = baselines.distilled(config)(own, sample.document, [sample.question] * 2)
    assert first.text == sample.answer
    assert first.update == second.update
    assert asked == [2]


def test_distillation_meters_more_than_reading(setting, sample):
    counted = Setting(setting.base, setting.hypernet, max_new_tokens=2, count_memory=True)
    distilled, read = (
        method(counted, sample.document, [sample.question])[0].update.peak_mib
        for method in (baselines.distilled(DistillConfig(epochs=1)), baselines.d2l_batched)
    )
    assert distilled > 0
    assert read > 0


def test_a_fresh_lora_changes_nothing(setting):
    loras = fresh_lora(setting.base, DistillConfig())
    ids = torch.tensor([[2, 5, 30, 31]])
    with torch.no_grad():
        plain = setting.base.model(input_ids=ids).logits
        with applied(setting.base.model, route_rows(loras, [0])):
            assert torch.equal(setting.base.model(input_ids=ids).logits, plain)
    assert loras.multiplier == 2.0
    assert all(t.abs().max() <= t.shape[-1] ** -0.5 for t in loras.A.values())


def test_llmlingua_is_missed_clearly(setting, sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    prompted._llmlingua2.cache_clear()
    with pytest.raises(ImportError, match="selective_context"):
        baselines.compressed(0.5, "llmlingua2")(setting, sample.document, [sample.question])


def test_llmlingua_is_asked_for_a_rate_and_its_loading_is_not_timed(setting, sample, monkeypatch):
    """A stand-in with the package's interface that keeps the head of the text."""
    seen = []

    class PromptCompressor:
        def __init__(self, model, use_llmlingua2, device_map):
            seen.append((model, use_llmlingua2, device_map))

        def compress_prompt(self, context, rate, force_tokens):
            words = context[0].split()
            return {"compressed_prompt": " ".join(words[: round(rate * len(words))])}

    fake = SimpleNamespace(PromptCompressor=PromptCompressor)
    monkeypatch.setitem(sys.modules, "llmlingua", fake)
    prompted._llmlingua2.cache_clear()
    (reply,) = baselines.compressed(0.5, "llmlingua2")(setting, sample.document, [sample.question])
    prompted._llmlingua2.cache_clear()
    assert seen == [(prompted.LLMLINGUA2, True, "cpu")]
    assert 0.4 < reply.context_ratio < 0.6


def test_bad_settings_are_refused(setting, sample):
    ask = (sample.document, [sample.question])
    with pytest.raises(ValueError, match="rate"):
        baselines.compressed(0.0)
    with pytest.raises(ValueError, match="chunk_tok"):
        baselines.retrieved(0)
    with pytest.raises(ValueError, match="question"):
        Setting(setting.base, prompt="Answer.")
    with pytest.raises(ValueError, match="needs a hypernetwork"):
        baselines.d2l_batched(Setting(setting.base), *ask)
    other = doc_to_lora()
    with pytest.raises(ValueError, match="another base"):
        baselines.d2l_batched(Setting(setting.base, other), *ask)
    with pytest.raises(ValueError, match="no room"):
        baselines.truncated_context(Setting(setting.base, max_new_tokens=600), *ask)
    with pytest.raises(ValueError, match="no linear 'up'"):
        fresh_lora(setting.base, DistillConfig(target_modules=("up",)))
    assert isinstance(setting.base, LanguageModel)


def test_distilling_without_a_question_changes_nothing(setting):
    document, asked = "The special magic number is 4821.", ["What is the special magic number?"]
    nobody = Setting(setting.base, ask=lambda *_: [], max_new_tokens=4)
    with pytest.warns(UserWarning, match=r"nobody asked a question about .*4821.*changes nothing"):
        (reply,) = baselines.distilled(DistillConfig(n_queries=5))(nobody, document, asked)
    (plain,) = baselines.without_context(nobody, document, asked)
    assert reply.text == plain.text


def test_a_text_too_short_for_a_chunk_is_read_as_it_is() -> None:
    model = DocToLoRA.from_pretrained("fig3/tiny")
    text = "Who built it?"
    setting = Setting(model.base, model, max_new_tokens=2)
    whole = d2l_batched(setting, text, ["Who?"])
    n_tok = len(render_chat(model.base.tokenizer, text))
    model.chunk = dataclasses.replace(model.chunk, min_tok=n_tok + 1)
    with pytest.raises(ValueError, match="a chunk needs at least"):
        model.internalize(text)
    assert d2l_batched(setting, text, ["Who?"])[0].text == whole[0].text
    with pytest.raises(ValueError, match="empty"):
        d2l_batched(setting, " ", ["Who?"])
