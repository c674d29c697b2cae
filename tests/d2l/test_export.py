"""Adapters as PEFT folders, inside weights, and on quantised bases, against peft itself."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MLP_OUT, doc_to_lora, speaking

from d2l.export import VLLM_RANKS, from_peft

TEXT = "The grass is green. The special magic number is 4 8 2 9. Here we go."
QUESTION = "What is the special magic number?"


def make(family="llama", modules=None, **changes):
    base = speaking(family, **changes.pop("sizes", {}))
    modules = modules or (MLP_OUT.get(family, "down_proj"),)
    return doc_to_lora(base, target_modules=modules, **changes)


@pytest.fixture(scope="module")
def model():
    return make(modules=("down_proj", "q_proj", "k_proj"))


@pytest.fixture(scope="module")
def adapter(model):
    whole = model.internalize(TEXT, title="one") + model.internalize("The sky is blue.")
    return whole.weighted("one", 0.5).scaled(1.75)


def logits(model, adapter=None):
    """What the base says with an adapter that travels with the call."""
    from d2l.lm.hooks import applied

    ids = torch.tensor([model.prompt_ids(QUESTION)])
    _, delta = model._route(1, adapter)
    with torch.no_grad(), applied(model.base.model, delta):
        return model.base.model(ids).logits


def in_peft(model, folder):
    twin = make_twin(model)
    wrapped = PeftModel.from_pretrained(twin, folder)
    with torch.no_grad():
        return wrapped(torch.tensor([model.prompt_ids(QUESTION)])).logits


def make_twin(model):
    """The same base without any hook of ours."""
    lm = model.base.model
    twin = type(lm)(lm.config)
    twin.load_state_dict(lm.state_dict())
    return twin.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_our_logits(family, tmp_path):
    model = make(family)
    adapter = model.internalize(TEXT).scaled(1.3)
    done = adapter.to_peft(tmp_path / "peft")
    assert (done.rank, done.error) == (min(r for r in VLLM_RANKS if r >= adapter.rank), 0)
    expected = logits(model, adapter)
    assert (expected - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(in_peft(model, done.folder), expected, rtol=1e-4, atol=1e-4)


def test_some_layers_and_several_modules(tmp_path):
    model = make(modules=("down_proj", "v_proj", "o_proj"), layers=(0, 2))
    adapter = model.internalize(TEXT)
    done = adapter.to_peft(tmp_path / "peft")
    torch.testing.assert_close(
        in_peft(model, done.folder), logits(model, adapter), rtol=1e-4, atol=1e-4
    )
    keys = load_file(done.folder / "adapter_model.safetensors")
    assert not any(".layers.1." in k for k in keys)


def test_a_composition_with_weights_goes_there_and_back(model, adapter, tmp_path):
    done = adapter.to_peft(tmp_path / "peft")
    torch.testing.assert_close(
        in_peft(model, done.folder), logits(model, adapter), rtol=1e-4, atol=1e-4
    )
    again = from_peft(done.folder, model.base)
    for site in adapter.sites:
        where = (site.layer, site.module)
        torch.testing.assert_close(again.delta_W(*where), adapter.delta_W(*where))
    torch.testing.assert_close(logits(model, again), logits(model, adapter), rtol=1e-4, atol=1e-4)
    assert again.sources[0].title == "peft"
    assert model.generate([QUESTION] * 2, [again, adapter], max_new_tokens=3)


@pytest.mark.parametrize("rank", [1, 3, 6, 64])
def test_a_reduced_rank_is_the_best_and_its_error_is_told(model, adapter, tmp_path, rank):
    done = adapter.to_peft(tmp_path / "peft", rank=rank)
    again = from_peft(done.folder, model.base)
    assert again.rank == done.rank == rank
    lost = whole = 0.0
    for site in adapter.sites:
        W = adapter.delta_W(site.layer, site.module).double()
        S = torch.linalg.svdvals(W)
        lost, whole = lost + S[rank:].square().sum(), whole + S.square().sum()
        left = W - again.delta_W(site.layer, site.module).double()
        assert left.square().sum() <= S[rank:].square().sum() * 1.001 + 1e-9
    assert done.error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
    assert json.loads((done.folder / "adapter_config.json").read_text())["r"] == rank


def test_ranks_beyond_vllm_are_warned_about(tmp_path):
    model = make(sizes={"hidden_size": 48, "intermediate_size": 64}, rank=8)
    model.chunk = type(model.chunk)(max_tok=2, min_tok=1)
    (wide,) = model.internalize_batch(["The sky is blue. " * 40])
    assert wide.rank > VLLM_RANKS[-1]
    with pytest.warns(UserWarning, match=f"up to 512, this one is {wide.rank}"):
        done = wide.to_peft(tmp_path / "peft")
    assert done.rank == wide.rank
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        wide.to_peft(tmp_path / "peft", rank=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_peft_itself_is_read(model, tmp_path, rslora):
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["down_proj", "v_proj"], use_rslora=rslora
    )
    theirs = get_peft_model(make_twin(model), config)
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([model.prompt_ids(QUESTION)])
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    read = from_peft(tmp_path / "theirs", model.base)
    torch.testing.assert_close(logits(model, read), expected, rtol=1e-4, atol=1e-4)


def test_peft_folders_that_are_refused(model, adapter, tmp_path):
    folder = adapter.to_peft(tmp_path / "peft").folder
    config = json.loads((folder / "adapter_config.json").read_text())

    def changed(**options):
        (folder / "adapter_config.json").write_text(json.dumps(config | options))

    for options in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"},
                    {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}):  # fmt: skip
        changed(**options)
        with pytest.raises(ValueError, match=f"has {next(iter(options))}=.*only plain LoRA"):
            from_peft(folder, model.base)
    changed(r="many")
    with pytest.raises(ValueError, match="cannot be read as a PEFT adapter"):
        from_peft(folder, model.base)
    changed()
    with pytest.raises(ValueError, match="fits no linear of 'random-llama'"):
        from_peft(folder, speaking(hidden_size=24))
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = folder / "adapter_model.safetensors"
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"lm_head\.weight' fits no linear"):
        from_peft(folder, model.base)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        from_peft(folder, model.base)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickled weights, which could run code"):
        from_peft(folder, model.base)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        from_peft(folder, model.base)


# merging


def test_merging_is_the_adapter_and_unmerging_is_exact(model, adapter):
    before = {k: v.clone() for k, v in model.base.model.state_dict().items()}
    expected = logits(model, adapter)
    merged = adapter.merge_into(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for refused in (
        lambda: model.internalize(TEXT),
        lambda: model.internalize_batch([TEXT]),
        lambda: model.ask(QUESTION, adapter),
        lambda: adapter.merge_into(model),
    ):
        with pytest.raises(ValueError, match=r"is merged .*unmerge"):
            refused()
    assert model.ask(QUESTION, max_new_tokens=3)
    merged.unmerge()
    merged.unmerge()
    after = model.base.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    with pytest.raises(RuntimeError, match="stop"), adapter.merge_into(model.base):
        raise RuntimeError("stop")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    twin = make_twin(model)
    with adapter.merge_into(twin):
        ids = torch.tensor([model.prompt_ids(QUESTION)])
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_unmerges_bit_for_bit(tmp_path):
    base = speaking(dtype=torch.bfloat16)
    model = doc_to_lora(base)
    adapter = model.internalize(TEXT)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    with adapter.merge_into(model):
        changed = base.model.state_dict()
        assert any(not torch.equal(v, changed[k]) for k, v in before.items())
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in before.items())


def test_merging_into_another_base_changes_nothing(adapter):
    other = speaking(num_hidden_layers=2)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"made for 'random-llama': no Site\(layer=2"):
        adapter.merge_into(other)
    assert all(torch.equal(v, other.model.state_dict()[k]) for k, v in before.items())


# layers of different shapes


def test_layers_of_different_shapes(tmp_path):
    """A base whose second layer is narrower inside: leading columns, everywhere."""
    base = speaking()
    mlp = base.model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(16, 12, bias=False))
    mlp.down_proj = torch.nn.Linear(12, 16, bias=False)
    base.model.requires_grad_(False)
    model = doc_to_lora(base, target_modules=("down_proj", "up_proj"))
    adapter = model.internalize(TEXT)
    assert adapter.delta_W(1, "down_proj").shape == (16, 12)
    assert adapter.delta_W(1, "up_proj").shape == (12, 16)
    assert adapter.delta_W(0, "up_proj").shape == (32, 16)
    expected = logits(model, adapter)
    with adapter.merge_into(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    again = from_peft(adapter.to_peft(tmp_path / "peft").folder, base)
    torch.testing.assert_close(logits(model, again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_mixtures_of_experts(family, tmp_path):
    """Attention and shared experts are adapted; routed experts, which see anybody's tokens, not."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes |= {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
    shared = ("down_proj",) if family == "qwen2_moe" else ()
    model = make(family, modules=("o_proj", *shared), sizes=sizes)
    adapter = model.internalize(TEXT)
    expected = logits(model, adapter)
    with adapter.merge_into(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    prompts = [QUESTION, "Where?", QUESTION]
    rows = [adapter, None, adapter.scaled(0.5)]
    alone = [model.ask(p, a, max_new_tokens=4) for p, a in zip(prompts, rows, strict=True)]
    assert model.generate(prompts, rows, max_new_tokens=4) == alone
    with pytest.raises(ValueError, match="has no linear 'gate_up_proj'"):
        make(family, modules=("gate_up_proj",), sizes=sizes)


# quantised bases


def to_nf4(module):
    import bitsandbytes as bnb

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.float32
            )
            packed.load_state_dict(child.state_dict())
            setattr(module, name, packed.to("cpu"))
        else:
            to_nf4(child)


def to_int8(module):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_quantised_base(library):
    pytest.importorskip(library)
    base = speaking(hidden_size=64, intermediate_size=128, head_dim=16)
    plain = make_twin(type("Plain", (), {"base": base}))
    known = base.fingerprint
    (to_nf4 if library == "bitsandbytes" else to_int8)(base.model)
    assert base.fingerprint == known
    assert type(base)(base.model, base.tokenizer, base.name).fingerprint != known
    model = doc_to_lora(base)
    adapter = model.internalize(TEXT)
    ids = torch.tensor([model.prompt_ids(QUESTION)])
    bare, moved = logits(model), logits(model, adapter)
    assert (bare - plain(ids).logits).abs().max() > 0
    assert (moved - bare).abs().max() > 1e-2
    assert model.generate([QUESTION] * 2, [adapter, None], max_new_tokens=3) == [
        model.ask(QUESTION, adapter, max_new_tokens=3),
        model.ask(QUESTION, max_new_tokens=3),
    ]
    with pytest.raises(ValueError, match="is quantised: ask with the adapter unmerged"):
        adapter.merge_into(model)
    assert torch.equal(logits(model), bare)
