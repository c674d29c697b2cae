import errno
import json
import os

import pandas as pd
import pytest

from d2l import artifacts, home
from d2l.intervals import wilson


def test_wilson_matches_known_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="between 0 and n=3"):
        wilson(4, 3)


def test_writers_make_folders_and_replace(tmp_path):
    path = tmp_path / "a" / "b.json"
    artifacts.write_json(path, {"x": 1})
    artifacts.write_json(path, {"x": "ä"})
    assert json.loads(path.read_text()) == {"x": "ä"}
    assert os.listdir(path.parent) == ["b.json"]
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": "ä"}


def test_csv_round_trip_keeps_counts_whole(tmp_path):
    table = pd.DataFrame([["d2l", 64, 1, 100, 1 / 3, 0, 1, 0.5, 0.1, 0.2, 0]])
    table.columns = list(artifacts.COLUMNS)
    path = artifacts.write_csv(tmp_path / "data.csv", table)
    assert path.read_text().splitlines()[1] == "d2l,64,1,100,0.333333,0,1,0.5,0.1,0.2,0"
    back = artifacts.read_csv(path)
    assert back["n"].dtype == "int64"
    for header, missing in (("series,n", "haystack_tok"), ("series,part,n", "n_facts")):
        path.write_text(f"{header}\n")
        with pytest.raises(ValueError, match=f"missing .*{missing}"):
            artifacts.read_csv(path)
    path.write_text("series,n\nd2l,1\n")
    with pytest.raises(ValueError, match=r"data\.csv must have the columns .* missing"):
        artifacts.read_csv(path)


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = artifacts.write_text(tmp_path / "kept.txt", "old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "replace") if fails == "rename" else (os, "fsync")), full)
    with pytest.raises(OSError, match=r"cannot write .*kept\.txt: No space left.*free space") as e:
        artifacts.write_text(path, "new")
    assert e.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_is_an_os_error(tmp_path):
    with (
        pytest.raises(OSError, match="No space left"),
        home.replacing(tmp_path / "x.bin"),
        open("/dev/full", "wb") as device,
    ):
        device.write(b"x" * 10_000)
    assert os.listdir(tmp_path) == []


def test_failure_inside_replacing_keeps_the_old_file(tmp_path):
    path = artifacts.write_text(tmp_path / "kept.txt", "old")

    def interrupted():
        with home.replacing(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_manifest_round_trip_notices_edited_files(tmp_path):
    artifacts.write_text(tmp_path / "data.csv", "a\n")
    manifest = artifacts.Manifest(
        experiment="fig2",
        scale="tiny",
        seed=0,
        config={"a": 1},
        config_id="0123456789",
        seconds=1.5,
        context={"window": 512},
        versions=artifacts.versions(),
        device=artifacts.describe_device(),
        commit=None,
        files=artifacts.file_hashes(tmp_path),
        verdicts=[],
    )
    manifest.write(tmp_path)
    assert artifacts.Manifest.read(tmp_path) == manifest
    assert {"python", "torch", "transformers"} <= set(manifest.versions)
    assert manifest.device["threads"] >= 1
    assert manifest.changed_files(tmp_path) == []
    (tmp_path / "data.csv").write_text("b\n")
    assert manifest.changed_files(tmp_path) == ["data.csv"]
    (tmp_path / "manifest.json").write_text('{"experiment": "fig2"}')
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of this version"):
        artifacts.Manifest.read(tmp_path)


def test_commit_is_none_without_git(tmp_path):
    assert artifacts.git_commit(tmp_path) is None


def test_home_and_cache_follow_the_environment(tmp_path, monkeypatch):
    assert (home.repo_root() / "papers").is_dir()
    monkeypatch.setenv("D2L_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"D2L_HOME=.* holds no papers/ folder"):
        home.repo_root()
    (tmp_path / "papers").mkdir()
    assert artifacts.results_dir("fig2", "tiny") == (
        tmp_path.resolve() / "papers/doc-to-lora/results/fig2/tiny"
    )
    assert artifacts.committed_results() == []
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    assert home.cache_dir() == tmp_path / "cache"
