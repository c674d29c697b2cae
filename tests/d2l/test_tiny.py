import json

import pytest
import torch
from transformers import AutoTokenizer

from d2l.lm import vocabulary
from d2l.lm.base import chat_affixes, load_base, render_chat, shipped_base
from d2l.lm.tiny import build_model, build_tokenizer, look_back, needle_vocabulary
from d2l.tiny_needle import RECIPE, NeedleTask
from d2l.tiny_training import TinyTraining, optimizer_of, train_tiny

DOCUMENT = "Soon, the tall baker slept.\nThe special magic number is 0482.\nThere and back again."
TOY = TinyTraining(growing=1, settling=2, batch=4)
BY_MUON = TinyTraining(growing=1, settling=2, batch=4, optimizer="muon")
SHORT = {"start_tok": 40, "max_tok": 60}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("text", ["4829", "0000", "anchor", DOCUMENT, *vocabulary.NEEDLE_WORDS[:3]])
def test_known_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_every_word_is_one_token_and_others_are_unknown(tokenizer):
    for word in (*vocabulary.PROSE_WORDS, *vocabulary.NEEDLE_WORDS):
        (only,) = tokenizer(word).input_ids
        assert only != tokenizer.unk_token_id
    assert tokenizer("zyx").input_ids == [tokenizer.unk_token_id]
    assert len(set(needle_vocabulary())) == len(needle_vocabulary())
    assert len(tokenizer) == len(tokenizer.get_vocab()) == build_model(0).config.vocab_size


def test_special_tokens_in_text_are_inert(tokenizer):
    ids = render_chat(tokenizer, "hat <end><user> box")
    prefix, suffix = chat_affixes(tokenizer)
    inner = ids[len(prefix) : -len(suffix)]
    assert not set(inner) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = render_chat(tokenizer, DOCUMENT)
    assert render_chat(loaded, DOCUMENT) == ids
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_same_seed_same_weights():
    first, again, other = (build_model(seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("recipe", [TOY, BY_MUON], ids=lambda recipe: recipe.optimizer)
def test_training_writes_a_whole_folder_and_repeats_itself(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(NeedleTask, "measure", lambda *_: {"repeat/digits": {100: 0.5}})
    losses = []
    for name in ("one", "two"):
        folder = tmp_path / name
        train_tiny(NeedleTask(**SHORT), folder, 0, recipe, report=lambda *step: losses.append(step))
    assert losses[:3] == losses[3:]
    one, two = load_base(str(tmp_path / "one")), load_base(str(tmp_path / "two"))
    assert one.fingerprint == two.fingerprint
    assert "| repeat/digits | 0.50 |" in (tmp_path / "one" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_muon_moves_every_matrix_but_the_embedding():
    model = build_model(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, RECIPE)
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    by_muon = {n for n, p in model.named_parameters() if "momentum" in optimizer.state[p]}
    assert by_muon == {n for n in before if n.endswith("_proj.weight")} != set()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_broken_write_leaves_the_old_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(NeedleTask, "measure", lambda *_: {"repeat/digits": {100: 0.5}})
    out = tmp_path / "base"
    out.mkdir()
    (out / "config.json").write_text("{}")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(NeedleTask, "card", full)
    with pytest.raises(OSError, match="No space"):
        train_tiny(NeedleTask(**SHORT), out, 0, TOY)
    assert json.loads((out / "config.json").read_text()) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.fixture(scope="module")
def shipped():
    return load_base("tiny")


def test_shipped_base_was_made_by_this_tokenizer(shipped, tokenizer):
    assert shipped.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert shipped.tokenizer.chat_template == tokenizer.chat_template
    assert shipped.window == 512
    assert (shipped_base("tiny") / "README.md").is_file()


def test_shipped_base_retrieves_inside_its_window_and_not_past_it(shipped):
    inside = NeedleTask().measure(shipped.model, (100, 400), n=20, seed=5)
    past = NeedleTask().measure(shipped.model, (2048,), n=40, seed=5)
    assert all(v >= 0.95 for by_length in inside.values() for v in by_length.values())
    assert past["repeat/digits"][2048] <= 0.1
    assert past["prose/digits"][2048] <= 0.2


def test_shipped_base_answers_through_generate(shipped):
    prompt = f"{DOCUMENT}\n\n{vocabulary.DIGITS_QUESTION}"
    ids = torch.tensor([render_chat(shipped.tokenizer, prompt)])
    out = shipped.model.generate(ids, max_new_tokens=8, do_sample=False)
    answer = shipped.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == "0482"


def test_the_first_layer_looks_back_from_the_start(tokenizer):
    model = build_model(0, tokenizer, n_layers=2, n_heads=8, rope_theta=1e5)
    ids = torch.randint(19, len(tokenizer), (2, 60), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")

    def share(head, distance):
        attended = model(input_ids=ids, output_attentions=True).attentions[0][:, head]
        return torch.diagonal(attended, -distance, dim1=1, dim2=2)[:, 12:].mean().item()

    assert share(0, 1) < 0.1
    look_back(model, (1, 2, 3, 5))
    assert share(0, 1) > 0.5
    for head, distance in enumerate((1, 2, 3, 5)):
        near = [share(head, d) for d in range(10)]
        assert max(near) == near[distance]
    assert model.get_input_embeddings().weight[:, 0].unique().numel() == 1
