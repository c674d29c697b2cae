import json

import pytest
from huggingface_hub import constants
from needle_table import needle_table

from d2l import experiments
from d2l.experiments import base

FIG2 = experiments.EXPERIMENTS["fig2"]


def test_registry_is_consistent():
    for name, experiment in experiments.EXPERIMENTS.items():
        assert name == experiment.id
        assert experiment.default_scale in experiment.scales
        assert set(experiment.scales) <= set(experiments.SCALES)


def test_overrides_are_a_mapping_or_json():
    assert base.parse_overrides({"a": 1}) == {"a": 1}
    assert base.parse_overrides('{"a": 1}') == {"a": 1}
    assert base.parse_overrides("") == {}
    for text in ("a=1", "[1]"):
        with pytest.raises(ValueError, match="overrides must be"):
            base.parse_overrides(text)


def test_only_the_standard_run_goes_to_the_committed_folder():
    where = [
        base.default_out_dir(FIG2, *rest).as_posix()
        for rest in (("tiny", 0, {}), ("tiny", 1, {}), ("tiny", 0, {"a": 1}), ("smoke", 0, {}))
    ]
    assert where[0].endswith("papers/doc-to-lora/results/fig2/tiny")
    assert where[1].endswith("build/results/fig2/tiny-seed1")
    assert "build/results/fig2/tiny-" in where[2]
    assert where[3].endswith("build/results/fig2/smoke")


def test_a_request_is_checked_and_leaves_nothing_behind(tmp_path):
    asked = base.request("fig2", "tiny", 3, '{"a": 1}', tmp_path / "deep" / "er")
    assert asked.overrides == {"a": 1}
    assert asked.out_dir == (tmp_path / "deep" / "er").resolve()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="did you mean 'small'"):
        base.request("fig2", "smal")
    with pytest.raises(ValueError, match="did you mean 'fig3'"):
        base.request("figg3", "tiny")
    with pytest.raises(ValueError, match="unknown scale of tab5 'small'; known: smoke, tiny"):
        base.request("tab5", "small")
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        base.request("fig2", "tiny", -1)


def test_paper_scale_names_what_is_missing_and_what_to_run(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(experiments.CannotRun) as refusal:
        base.need_gpu_and_model("fig2", "some/model")
    text = str(refusal.value)
    assert "a CUDA GPU" in text
    assert "the model some/model (not cached, and HF_HUB_OFFLINE is set)" in text
    assert "`just reproduce fig2 --scale small`" in text


def test_paper_scale_needs_no_hub_for_a_local_model(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    base.need_gpu_and_model("fig2", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(experiments.CannotRun, match="the hub cannot be reached"):
        base.need_gpu_and_model("fig2", "some/model")


def test_run_reports_differences_and_refuses_other_columns(tmp_path):
    import stub_fig2

    run = stub_fig2.run("tiny", 0, "auto", "{}", tmp_path, False)
    assert run.config_diff().to_dict("records") == [
        {"key": "steps", "paper": "100", "source": "Appendix A", "here": "10"}
    ]
    assert list(run.accuracy().columns) == [
        "base_with_context",
        "base_without_context",
        "d2l",
        "wrong_document",
    ]
    assert run.variant_accuracy().shape == (9, 4)
    with pytest.raises(ValueError, match="table must have the columns"):
        base.Run(**{**vars(run), "table": needle_table().drop(columns="n")})


def test_bench_measures_both_or_one_and_leaves_the_other(monkeypatch, tmp_path):
    from d2l.experiments import bench

    lengths = []
    monkeypatch.setattr(bench, "load_shipped", lambda *_: {0: None})
    monkeypatch.setattr(
        bench, "internalize_cost", lambda _, n, repeats: lengths.append(n) or {"haystack_tok": n}
    )
    monkeypatch.setattr(bench, "query_cost", lambda _, n, repeats: [{"measure": n}])
    monkeypatch.setattr(bench, "paper_dir", lambda: tmp_path)
    folder, tables = bench.run("tiny", 1)
    assert [len(t) for t in tables] == [2, 1]
    assert (folder / "internalize.csv").read_text() == "haystack_tok\n2048\n8192\n"
    (folder / "internalize.csv").write_text("kept")
    _, (only,) = bench.run("tiny", 1, "queries")
    assert (folder / "internalize.csv").read_text() == "kept"
    assert list(only["measure"]) == [400]
    assert set(json.loads((folder / "device.json").read_text())) == {"internalize", "queries"}
    assert lengths == [2048, 8192]
    with pytest.raises(ValueError, match="scale must be one of tiny, small, got 'huge'"):
        bench.run("huge", 1)
