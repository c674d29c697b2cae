"""The folder of adapters: hits, damage, full disks, many processes; and a corpus over several."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import doc_to_lora, speaking

from d2l.adapter import Adapter
from d2l.checkpoint import save_model
from d2l.cli.corpus import internalize_corpus
from d2l.config import ChunkConfig
from d2l.lm.base import load_base
from d2l.lm.tiny import build_model, build_tokenizer
from d2l.model import DocToLoRA
from d2l.reading import sha256_of
from d2l.store import AdapterStore

TEXT = "The grass is green. The special magic number is 4 8 2 9. Here we go."


@pytest.fixture(scope="module")
def model():
    return doc_to_lora(speaking())


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


def same(a, b):
    return all(torch.equal(a.A[m], b.A[m]) and torch.equal(a.B[m], b.B[m]) for m in a.A)


def count_readings(model, monkeypatch):
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: seen.append(1) or encode(*a, **k))
    return seen


def test_a_document_is_read_once(model, store, tmp_path, monkeypatch):
    seen = count_readings(model, monkeypatch)
    first = store.get_or_internalize(model, TEXT, title="mine")
    assert seen
    del seen[:]
    path = tmp_path / "a.txt"
    path.write_text(f" {TEXT}\n")
    for document in (TEXT, f"\n{TEXT}", path):
        found = store.get_or_internalize(model, document)
        assert same(found, first)
        assert found.sources[0].title == "mine"
    assert not seen
    assert same(store.get(model, sha256_of(TEXT)), first)
    ids = model.base.tokenizer(TEXT, add_special_tokens=False).input_ids
    store.get_or_internalize(model, ids)
    assert seen
    del seen[:]
    store.get_or_internalize(model, torch.tensor(ids))
    assert not seen
    streamed = store.get_or_internalize(model, iter([TEXT]))
    assert seen
    assert same(store.get(model, sha256_of(TEXT)), streamed)


def test_models_do_not_share_adapters(model, store):
    store.get_or_internalize(model, TEXT)
    sha256 = sha256_of(TEXT)
    others = (
        doc_to_lora(model.base, seed=9),
        DocToLoRA(model.base, model.config, ChunkConfig(max_tok=9, min_tok=2)),
        doc_to_lora(speaking(seed=3)),
    )
    for other in others:
        assert store.get(other, sha256) is None
    with pytest.raises(ValueError, match="single documents that this model has read"):
        store.put(others[0], store.get(model, sha256))
    both = model.internalize(TEXT) + model.internalize("The sky is blue.")
    with pytest.raises(ValueError, match="single documents"):
        store.put(model, both)


def test_a_damaged_file_is_read_again_and_replaced(model, store):
    first = store.get_or_internalize(model, TEXT)
    path = store.path(model, sha256_of(TEXT))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        store.get(model, sha256_of(TEXT))
    with pytest.warns(UserWarning, match="damaged.*read again"):
        again = store.get_or_internalize(model, TEXT)
    assert same(again, first)
    assert same(store.get(model, sha256_of(TEXT)), first)


def test_a_full_disk_loses_no_work(model, store, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d2l.adapter.save_file", full)
    with pytest.warns(UserWarning, match="not stored: cannot write .*No space left"):
        adapter = store.get_or_internalize(model, TEXT)
    assert model.ask("Where?", adapter, max_new_tokens=2)
    assert store.get(model, sha256_of(TEXT)) is None
    with pytest.raises(OSError, match="No space left"):
        store.put(model, adapter)


def test_threads_that_want_the_same_document_read_it_once(model, store, monkeypatch):
    seen = count_readings(model, monkeypatch)
    model.internalize(TEXT)
    once = len(seen)
    del seen[:]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: store.get_or_internalize(model, TEXT), range(12)))
    assert len(seen) == once
    assert all(same(f, found[0]) for f in found)


def hammer(folder, adapters, seconds):
    path, end = Path(folder) / "shared.safetensors", time.monotonic() + seconds
    n = 0
    while time.monotonic() < end:
        Adapter.load(adapters[n % len(adapters)]).save(path)
        Adapter.load(path)
        n += 1
    sys.exit(0 if n > 3 else 3)


def test_processes_that_write_one_file_never_see_half_of_it(model, tmp_path):
    paths = [
        model.internalize(f"The sky is blue. Number {i}.").save(tmp_path / f"{i}.safetensors")
        for i in range(3)
    ]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(tmp_path, paths, 1.5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    victim = context.Process(target=hammer, args=(tmp_path, paths, 60))
    victim.start()
    for worker in workers:
        worker.join()
    victim.kill()
    victim.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    Adapter.load(tmp_path / "shared.safetensors")


def test_a_corpus_reports_what_it_could_not_read(model, store, tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"The sky is blue. Number {i}. Here we go.")
    (tmp_path / "bad.txt").write_bytes(b"\x00\x01")
    (tmp_path / "empty.txt").write_text(" ")
    files = [*tmp_path.glob("*.txt"), tmp_path / "missing.txt"]
    failed = dict(internalize_corpus(model, files, store))
    assert {p.name for p in failed} == {"bad.txt", "empty.txt", "missing.txt"}
    assert "empty" in failed[tmp_path / "empty.txt"]
    seen = count_readings(model, monkeypatch)
    assert len(internalize_corpus(model, files, store)) == 3
    assert not seen


@pytest.mark.slow
def test_two_processes_share_a_corpus_and_skip_what_is_there(tmp_path):
    """`accelerate launch` with two processes, of which one finds a document done already."""
    torch.manual_seed(0)
    lm, tokenizer = build_model(0), build_tokenizer()
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = doc_to_lora(load_base(str(tmp_path / "base")))
    save_model(tmp_path / "hypernet", model)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"The sky is blue. Number {i}. Here we go.")
    files = sorted(tmp_path.glob("*.txt"))
    store = AdapterStore(tmp_path / "store")
    store.get_or_internalize(model, files[2])
    (done_before,) = (tmp_path / "store").glob("*/*.safetensors")
    written = done_before.stat().st_mtime_ns
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "-m", "d2l.cli.corpus"),
        *map(str, (tmp_path / "hypernet", tmp_path / "store", *files)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "store").glob("*/*.safetensors"))) == 5
    assert done_before.stat().st_mtime_ns == written
    for file in files:
        text = file.read_text()
        assert same(store.get(model, sha256_of(text)), model.internalize(text))
