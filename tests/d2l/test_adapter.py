"""The algebra of adapters, their provenance, and their file."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import doc_to_lora, speaking

from d2l.adapter import Adapter

TEXTS = (
    "The grass is green. The sky is blue.",
    "The special magic number is 4 8 2 9. Here we go. There and back again.",
    "The old baker walked. The sun is yellow.",
)


@pytest.fixture(scope="module")
def model():
    return doc_to_lora(speaking(), target_modules=("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def abc(model):
    return [model.internalize(text, title=f"doc {i}") for i, text in enumerate(TEXTS)]


def everywhere(adapter):
    return torch.cat([adapter.delta_W(s.layer, s.module).flatten() for s in adapter.sites])


def by_hand(model, adapter, weights=None, strength=1.0):
    """Delta W of an adapter from its rows, one outer product at a time, in float64."""
    out = []
    for site in adapter.sites:
        row = adapter.layers.index(site.layer)
        A, B = adapter.A[site.module][row].double(), adapter.B[site.module][row].double()
        per_row = [w for s, w in zip(adapter.sources, weights, strict=True) for _ in range(s.rows)]
        per_row += [1.0] * adapter.bias_rows
        total = sum(w * torch.outer(b, a) for w, b, a in zip(per_row, B, A, strict=True))
        out.append((model.config.lora.multiplier * strength * total).flatten())
    return torch.cat(out)


def test_delta_W_is_the_weighted_sum_of_documents_and_one_bias(model, abc):
    whole = abc[0] + abc[1] + abc[2]
    expected = by_hand(model, whole, [1, 1, 1])
    torch.testing.assert_close(everywhere(whole).double(), expected, rtol=1e-5, atol=1e-5)
    changed = whole.weighted("doc 1", -0.5).weighted("doc 2", 0).scaled(1.75)
    expected = by_hand(model, whole, [1, -0.5, 0], 1.75)
    torch.testing.assert_close(everywhere(changed).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sum_is_one_document_of_all_chunks(model, abc):
    """The bias once: documents composed are the chunks of one document, as it was trained."""
    chunks = [chunk for text in TEXTS[:2] for chunk in model.chunks(text)]
    with torch.no_grad():
        one = model.hypernet.compose(model.encode(chunks), [len(chunks)])
    both = abc[0] + abc[1]
    for m in both.A:
        torch.testing.assert_close(both.A[m], one.A[m], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.B[m], one.B[m], rtol=1e-4, atol=1e-5)


def test_strength_is_linear_and_zero_is_the_base(model, abc):
    whole = everywhere(abc[0])
    torch.testing.assert_close(everywhere(abc[0].scaled(0.16)), 0.16 * whole)
    torch.testing.assert_close(everywhere(abc[0].scaled(2).scaled(-1.5)), -3 * whole)
    assert not everywhere(abc[0].scaled(0)).any()
    question = "What is the special magic number?"
    assert model.ask(question, abc[0].scaled(0)) == model.ask(question)
    both = abc[0].scaled(2) + abc[1].scaled(2)
    torch.testing.assert_close(everywhere(both), everywhere((abc[0] + abc[1]).scaled(2)))
    uneven = abc[0].scaled(2) + abc[1]
    assert (uneven.strength, [s.weight for s in uneven.sources]) == (2, [1, 0.5])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"finite number, got {bad}"):
            abc[0].scaled(bad)
        with pytest.raises(ValueError, match="finite"):
            abc[0].weighted("doc 0", bad)


def test_removing_and_replacing_leave_no_trace(model, abc):
    whole = abc[0] + abc[1] + abc[2]
    for name in ("doc 1", abc[1].sources[0].sha256, abc[1].sources[0].sha256[:8]):
        rest = whole.without(name)
        assert torch.equal(everywhere(rest), everywhere(abc[0] + abc[2]))
        assert [s.title for s in rest.sources] == ["doc 0", "doc 2"]
    new = model.internalize("The grass is green. Here we go.", title="new")
    changed = whole.scaled(2).weighted("doc 2", 3).replace("doc 0", new)
    expected = (new + abc[1] + abc[2].weighted("doc 2", 3)).scaled(2)
    assert [s.title for s in changed.sources] == ["new", "doc 1", "doc 2"]
    assert torch.equal(everywhere(changed), everywhere(expected))
    assert torch.equal(everywhere(abc[0].replace("doc 0", new)), everywhere(new))
    same_text = model.internalize(TEXTS[0], title="again")
    with pytest.raises(ValueError, match=r"'again' .* is in both adapters"):
        whole + same_text
    with pytest.raises(ValueError, match=r"no document is 'doc 9'; the adapter holds 'doc 0'"):
        whole.without("doc 9")
    with pytest.raises(ValueError, match="only document; ask without an adapter"):
        abc[0].without("doc 0")
    twins = abc[0] + model.internalize(TEXTS[1], title="doc 0")
    with pytest.raises(ValueError, match="several documents are 'doc 0'"):
        twins.without("doc 0")


def test_chunks_map_to_rank_rows(model, abc):
    whole = abc[0] + abc[1]
    lengths = [[len(c) for c in model.chunks(t)] for t in TEXTS[:2]]
    assert [n for _, n, _ in whole.chunks] == lengths[0] + lengths[1]
    r = model.config.lora.rank
    rows = [rows for _, _, rows in whole.chunks]
    assert [(s.start, s.stop) for s in rows] == [(i * r, (i + 1) * r) for i in range(len(rows))]
    assert whole.rank == (len(rows) + 1) * r
    assert whole.chunks[len(lengths[0])][0] is whole.sources[1]
    silent = whole.muted(range(len(lengths[0])))
    torch.testing.assert_close(
        everywhere(silent), everywhere(whole.weighted("doc 0", 0)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(everywhere(whole), everywhere(abc[0] + abc[1])), "muting changed its source"


def test_adapters_of_other_hypernetworks_do_not_add(model, abc):
    other = doc_to_lora(model.base, seed=5, target_modules=("down_proj", "q_proj"))
    with pytest.raises(ValueError, match="different hypernetworks"):
        abc[0] + other.internalize(TEXTS[1])
    with pytest.raises(ValueError, match="does not change 'up_proj' of layer 0"):
        abc[0].delta_W(0, "up_proj")


# the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading(model, abc, tmp_path, dtype):
    whole = (abc[0] + abc[1]).weighted("doc 1", 0.25).scaled(1.5)
    cast = [{m: t.to(dtype) for m, t in f.items()} for f in (whole.A, whole.B)]
    whole = Adapter(
        *cast, **{k: v for k, v in vars(whole).items() if k not in ("A", "B", "_ready")}
    )
    again = Adapter.load(whole.save(tmp_path / "deep/er/a.safetensors"))
    assert torch.equal(everywhere(again), everywhere(whole))
    for name in ("sources", "sites", "multiplier", "strength", "base_name", "base_fingerprint"):
        assert getattr(again, name) == getattr(whole, name)
    assert again.A["q_proj"].dtype == dtype
    assert again.sources[0].title == "doc 0"
    assert torch.equal(everywhere(again.without("doc 1")), everywhere(whole.without("doc 1")))


def test_files_that_are_not_ours_are_refused(abc, tmp_path):
    path = abc[0].save(tmp_path / "a.safetensors")
    good = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Adapter.load(tmp_path / "nowhere")
    for damaged in (good[:-9], good[:100], b"", b"PK\x03\x04 zip", good[:-1] + b"\x77"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.safetensors is no adapter of ours, or is dam"):
            Adapter.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="its format is None, not 'd2l-adapter-1'"):
        Adapter.load(path)
    save_file({"x": torch.zeros(2)}, path, {"d2l": json.dumps({"format": "d2l-adapter-1"})})
    with pytest.raises(ValueError, match="no adapter of ours"):
        Adapter.load(path)


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save(Evil(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no adapter of ours"):
        Adapter.load(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_a_full_disk_keeps_the_old_file(abc, tmp_path, monkeypatch, fails):
    path = abc[0].save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d2l.adapter.save_file" if fails == "save_file" else "os.replace", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: No space left"):
        abc[1].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_process_killed_while_writing_leaves_the_old_file(abc, tmp_path):
    path = abc[0].save(tmp_path / "a.safetensors")
    code = f"""
    import os, signal, sys
    from d2l import home
    with home.replacing({str(path)!r}) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(everywhere(Adapter.load(path)), everywhere(abc[0]))


def test_concurrent_writers_leave_one_whole_file(abc, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "a.safetensors"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: abc[i % 3].save(path), range(48)))
    found = everywhere(Adapter.load(path))
    assert any(torch.equal(found, everywhere(a)) for a in abc)
    assert os.listdir(tmp_path) == ["a.safetensors"]
