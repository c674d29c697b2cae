"""Finding hypernetworks: by name, folder, file and hub; what is refused; devices and dtypes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_models import doc_to_lora, speaking

import d2l
from d2l import pretrained
from d2l.checkpoint import load_hypernet, save_model
from d2l.home import shipped
from d2l.pretrained import find, from_pretrained, pick_device

TEXT = "The sky is blue. The special magic number is 5 0 3 1. Here we go."
QUESTION = "What is the special magic number? Reply with only the number."


@pytest.fixture(scope="module")
def tiny():
    return from_pretrained("fig2/tiny")


def test_shipped_names_work_from_end_to_end(tiny):
    assert {"fig2/small", "fig2/tiny"} <= set(shipped())
    assert tiny.base.name == "tiny"
    assert tiny.trained_chunks == 64
    assert load_hypernet(find("fig2/small")).trained_chunks == 256
    adapter = tiny.internalize(TEXT)
    assert tiny.ask(QUESTION, adapter) == "5031"
    assert "".join(tiny.stream(QUESTION, adapter)).strip() == "5031"
    assert tiny.ask(QUESTION, adapter.scaled(0)) == tiny.ask(QUESTION) != "5031"


def test_two_documents_in_one_adapter_answer_together(tiny):
    number = tiny.internalize(TEXT, title="number")
    filler = tiny.internalize("The grass is green. The sun is yellow. " * 3, title="filler")
    both = filler + number
    assert tiny.ask(QUESTION, both) == "5031"
    assert tiny.ask(QUESTION, both.without("filler")) == "5031"
    assert tiny.ask(QUESTION, both.without("number")) != "5031"
    other = tiny.internalize("The special magic number is 8 8 1 6. Here we go.")
    assert tiny.ask(QUESTION, both.replace("number", other)) == "8816"


def test_a_folder_and_a_loaded_base(tiny):
    folder = find("fig2/tiny")
    assert isinstance(folder, Path)
    assert find(folder) == find(str(folder)) == folder
    with pytest.raises(ValueError, match="cannot be read as a released checkpoint"):
        find(folder / "model.safetensors")
    model = from_pretrained(folder, base=tiny.base)
    assert model.base is tiny.base
    assert model.hypernet_id == tiny.hypernet_id
    assert from_pretrained(
        folder, base="tiny", dtype="bfloat16", device="cpu"
    ).base.model.dtype in (
        torch.bfloat16,
        torch.float32,
    )
    with pytest.warns(UserWarning, match="answers may be wrong"):
        from_pretrained(folder, base=other_weights(tiny))


def other_weights(tiny):
    from d2l.lm.tiny import build_model

    return type(tiny.base)(build_model(5).eval(), tiny.base.tokenizer, "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fig9/huge", "no checkpoint 'fig9/huge', here or on the hub; shipped: .*fig2/tiny"),
        ("nothing", "'nothing' is no checkpoint: give one of .*fig2/small"),
        ("./nowhere/at/all", "is no checkpoint"),
        (Path("a/b"), "is no checkpoint"),
        ("", "is no checkpoint"),
    ],
)
def test_names_that_lead_nowhere(name, message, monkeypatch):
    def refuse(repository, **_):
        response = type("R", (), {"headers": {}, "status_code": 404, "request": None})()
        raise RepositoryNotFoundError(f"no {repository}", response=response)

    monkeypatch.setattr(pretrained, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message):
        from_pretrained(name)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with config\.json and model\.safetensors"):
        from_pretrained(tmp_path)


def test_foreign_pickle_content_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="refused, because reading it could run code"):
            from_pretrained(place)
    assert not (tmp_path / "owned").exists()


def test_a_hub_repository_is_fetched_without_its_other_files(tmp_path, monkeypatch):
    model = doc_to_lora(speaking())
    save_model(tmp_path / "snapshot/runs/best", model)
    asked = []

    def fake(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(pretrained, "snapshot_download", fake)
    found = from_pretrained("org/repository/runs/best", base=model.base)
    assert found.hypernet_id == model.hypernet_id
    names = ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert asked == [("org/repository", [f"runs/best/{n}" for n in names])]
    with pytest.raises(ValueError, match="is no checkpoint"):
        from_pretrained("org/repository", base=model.base)
    assert asked[-1] == ("org/repository", names)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"cannot fetch 'org/repository'.*no route.*network"):
        from_pretrained("org/repository")


def test_devices_and_dtypes(monkeypatch):
    assert pick_device().type in ("cuda", "mps", "cpu")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'toaster'"):
        pick_device("toaster")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    with pytest.raises(ValueError, match="'cuda:0' is not available here"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    for bad in ("int8", "float99", torch.int64):
        with pytest.raises(ValueError, match="dtype must be float32"):
            from_pretrained("fig2/tiny", device="cpu", dtype=bad)


@pytest.mark.parametrize("installed", [False, True])
def test_a_checkpoint_that_read_through_four_bits(tiny, tmp_path, monkeypatch, installed):
    folder = tmp_path / "saved"
    save_model(folder, tiny, {"quantized_encoder": True})
    if installed:
        pytest.importorskip("bitsandbytes")
        model = from_pretrained(folder)
        assert type(model.reader.model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
        assert model.base is not model.reader
        assert model.ask(QUESTION, model.internalize(TEXT)) == "5031"
    else:
        monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
        with pytest.warns(UserWarning, match="4-bit .*here it reads in torch.float32"):
            model = from_pretrained(folder)
        assert model.reader is model.base


def test_the_number_of_trained_chunks_survives(tmp_path):
    model = doc_to_lora(speaking())
    model.trained_chunks = 7
    save_model(tmp_path / "a", model)
    assert json.loads((tmp_path / "a/config.json").read_text())["trained_chunks"] == 7
    assert from_pretrained(tmp_path / "a", base=model.base).trained_chunks == 7


def test_the_package_is_lazy_and_complete():
    for name in d2l.__all__:
        assert getattr(d2l, name).__name__ == name
        assert name in dir(d2l)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = d2l.nonsense
    code = (
        "import time, torch, sys; t = time.perf_counter(); import d2l; "
        "s = time.perf_counter() - t; assert 'transformers' not in sys.modules; assert s < 2, s"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_said_while_a_model_is_loaded(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained("fig2/tiny")
    assert capfd.readouterr() == ("", "")
