"""Our checkpoint folder: round trip, damage, other bases, full disks."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapters, doc_to_lora, language_model

from d2l import checkpoint
from d2l.checkpoint import load_hypernet, load_model, save_hypernet, save_model
from d2l.config import ChunkConfig, EncoderConfig, HypernetConfig


@pytest.fixture
def model():
    return doc_to_lora(chunk_gate=True)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_model(tmp_path / "saved", model, {"steps": 7})
    return tmp_path / "saved"


def test_round_trip(model, folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = load_model(folder, model.base)
    assert (again.config, again.chunk) == (model.config, model.chunk)
    one, two = adapters(model, [1, 2]), adapters(again, [1, 2])
    assert all(torch.equal(one.A[m], two.A[m]) and torch.equal(one.B[m], two.B[m]) for m in one.A)
    assert not again.hypernet.training
    saved = load_hypernet(folder)
    assert saved.metadata == {"steps": 7}
    assert (saved.base_name, saved.base_fingerprint) == (model.base.name, model.base.fingerprint)


def test_shared_blocks_are_stored_once(tmp_path):
    torch.manual_seed(0)
    shared = {"n_blocks": 4, "shared_weights": True}
    perceiver = type(doc_to_lora().config.perceiver)(d_latent=8, n_latents=3, **shared)
    model = doc_to_lora(perceiver=perceiver)
    save_model(tmp_path / "saved", model)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(k.startswith("perceiver.encoder.blocks.2.") for k in stored)
    again = load_model(tmp_path / "saved", model.base).hypernet
    blocks = again.perceiver.encoder.blocks
    assert blocks[1] is blocks[3]
    expected = model.hypernet.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    expected = json.loads((folder / "config.json").read_text())["weights_sha256"]
    with pytest.raises(ValueError, match=rf"model\.safetensors is truncated.*{expected}.*but is"):
        load_hypernet(folder)


def test_one_flipped_bit(folder, model):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was changed: sha256"):
        load_model(folder, model.base)


def rewrite(folder: Path, tensors: dict | None = None, **changes) -> None:
    """Change the folder as somebody would who also repairs the sha256."""
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
        changes["weights_sha256"] = checkpoint._sha256(folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_do_not_fit_the_configuration(folder):
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("head")
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=r"does not fit config\.json.*head"):
        load_hypernet(folder)
    rewrite(folder, tensors | {"head": head[:, :, :, :-1].contiguous()})
    with pytest.raises(ValueError, match="'head' has shape"):
        load_hypernet(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be 'd2l-hypernet-1', got 'other'"),
        ({"hypernet": {"use_biass": True}}, "did you mean 'use_bias'"),
        ({"chunk": {"max_tok": "many"}}, "max_tok must be int"),
        ({"base": {}}, "lacks 'name'"),
    ],
)
def test_a_configuration_that_cannot_be_used(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json cannot be used.*{message}"):
        load_hypernet(folder)


def test_files_that_are_missing_or_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        load_hypernet(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_hypernet(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_hypernet(folder / "nowhere")


def test_another_base_warns_and_strict_refuses(folder, model):
    other = language_model(seed=5)
    both = rf"{model.base.fingerprint}.*{other.fingerprint}"
    with pytest.warns(UserWarning, match=both):
        load_model(folder, other)
    with pytest.raises(ValueError, match=both):
        load_model(folder, other, strict=True)


def test_a_base_without_fingerprint_is_compared_by_name(model, tmp_path):
    save_hypernet(
        tmp_path / "a", model.hypernet, ChunkConfig(), base_name="org/base", base_fingerprint=None
    )
    with pytest.warns(UserWarning, match=r"'org/base' \(no fingerprint recorded\)"):
        load_model(tmp_path / "a", model.base)
    save_hypernet(
        tmp_path / "b",
        model.hypernet,
        ChunkConfig(),
        base_name=model.base.name,
        base_fingerprint=None,
    )
    load_model(tmp_path / "b", model.base, strict=True)


def test_a_base_of_other_sizes_is_refused(folder):
    with pytest.raises(ValueError, match="was made for base 'random-llama'"):
        load_model(folder, language_model(intermediate_size=48))


def test_an_encoder_of_its_own(tmp_path):
    base, reader = language_model(), language_model("qwen3", hidden_size=24)
    config = HypernetConfig(
        encoder=EncoderConfig(model="reader"),
        perceiver=doc_to_lora().config.perceiver,
        lora=doc_to_lora().config.lora,
    )
    model = checkpoint.DocToLoRA(base, config, encoder_base=reader)
    save_model(tmp_path / "saved", model)
    assert load_model(tmp_path / "saved", base, encoder_base=reader).reader is reader
    with pytest.raises(ValueError, match="unknown base model 'reader'"):
        load_model(tmp_path / "saved", base)
    with pytest.raises(ValueError, match="reads features of width 24"):
        load_model(tmp_path / "saved", base, encoder_base=base)


def test_saving_again_keeps_other_files(folder, model):
    (folder / "README.md").write_text("card")
    torch.nn.init.zeros_(model.hypernet.head)
    save_model(folder, model)
    assert (folder / "README.md").read_text() == "card"
    assert not load_hypernet(folder).hypernet.head.any()


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_full_disk_leaves_what_was_there(folder, model, monkeypatch, failing):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "weights":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    torch.nn.init.zeros_(model.hypernet.head)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_model(target, model)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_metadata_that_json_refuses_writes_nothing(model, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(tmp_path / "bad", model, {"what": object()})
    assert not list(tmp_path.iterdir())
