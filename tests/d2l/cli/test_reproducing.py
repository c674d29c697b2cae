import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import stub_fig2

from d2l import experiments, home, notebooks
from d2l.artifacts import Manifest
from d2l.cli import reproducing

ROOT = home.repo_root()
SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own whose fig2 is a stub; notebooks run in a fresh kernel."""
    papers = tmp_path / "papers" / "doc-to-lora"
    papers.mkdir(parents=True)
    shutil.copy(ROOT / "papers/doc-to-lora/claims.toml", papers)
    (tmp_path / "notebooks").mkdir()
    page = (ROOT / "notebooks/fig2.ipynb").read_text()
    assert "from d2l.experiments import fig2" in page
    page = page.replace("from d2l.experiments import fig2", "import stub_fig2 as fig2")
    (tmp_path / "notebooks/fig2.ipynb").write_text(page)
    stub = dataclasses.replace(experiments.EXPERIMENTS["fig2"], module="stub_fig2")
    monkeypatch.setitem(experiments.EXPERIMENTS, "fig2", stub)
    monkeypatch.setenv("D2L_HOME", str(tmp_path))
    paths = [str(p) for p in (SUPPORT, ROOT, ROOT / "kernels")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path.resolve()


@pytest.fixture
def no_kernel(monkeypatch):
    """Do what the page does in this process, which is much faster than a kernel."""

    def execute(_page, executed, given, quiet=False):
        asked = {"seed": 0, "backend": "auto", "overrides": "{}", "out_dir": "", "retrain": False}
        try:
            run = stub_fig2.run(**asked | given)
        except experiments.CannotRun as error:
            raise notebooks.NotebookError("CannotRun", str(error)) from error
        run.figure()
        run.check()
        executed.parent.mkdir(parents=True)
        executed.write_text("{}")

    monkeypatch.setattr(notebooks, "execute", execute)


def test_overridden_run_stays_out_of_the_committed_results(checkout, call, no_kernel):
    code, said = call("reproduce", "fig2", "--scale", "tiny", "--set", "fall_tok=1024", "--strict")
    assert code == 1
    assert "fig2.d2l-four-windows" in said
    assert "does not hold" in said
    folder = next((checkout / "build/results/fig2").iterdir())
    assert folder.name.startswith("tiny-")
    files = {p.name for p in folder.iterdir()}
    assert files == {"data.csv", "variants.csv", "figure.svg", "figure.png", "manifest.json"}
    manifest = Manifest.read(folder)
    assert manifest.changed_files(folder) == []
    assert manifest.config == {"steps": 10, "fall_tok": 1024}
    assert (checkout / f"build/notebooks/fig2-{folder.name}.ipynb").is_file()
    assert not (checkout / "papers/doc-to-lora/results").exists()


@pytest.mark.filterwarnings("default")
def test_standard_run_is_committed_listed_and_judged_again(checkout, call):
    code, said = call("reproduce", "fig2", "--scale", "tiny")
    assert code == 0, said
    folder = checkout / "papers/doc-to-lora/results/fig2/tiny"
    assert "papers/doc-to-lora/results/fig2/tiny" in said
    cells = json.loads((checkout / "build/notebooks/fig2-tiny.ipynb").read_text())["cells"]
    kinds = [set(o.get("data", {})) for c in cells for o in c.get("outputs", [])]
    assert sum("image/png" in kind for kind in kinds) == 1
    code, said = call("figures")
    assert code == 0
    assert "11 hold" in said
    code, said = call("claims")
    assert code == 0
    assert "fig2.base-collapses" in said
    assert "changed" not in said
    with (folder / "data.csv").open("a") as file:
        file.write("\n")
    code, said = call("claims")
    assert "changed since the run: data.csv" in said
    code, said = call("claims", "--json")
    assert {v["verdict"] for v in json.loads(said)} == {"holds"}


@pytest.mark.filterwarnings("default")
def test_an_error_in_the_notebook_is_one_message(checkout, call):
    code, said = call("reproduce", "fig2", "--scale", "tiny", "--set", "steps=0")
    assert code == 1
    assert "steps must be 1 or more, got 0" in said
    assert "ValueError; traceback in build/notebooks/fig2-tiny-" in said
    assert "Traceback" not in said
    assert not list((checkout / "build").glob("results/*/*"))


def test_paper_scale_is_refused_politely(checkout, call, no_kernel):
    code, said = call("reproduce", "fig2", "--scale", "paper")
    assert code == 2
    assert "error: fig2 at scale paper needs a CUDA GPU" in said
    assert not (checkout / "papers/doc-to-lora/results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fig22",), "unknown figure or table 'fig22'; did you mean 'fig2'?"),
        (("fig2", "--scale", "tyni"), "unknown scale of fig2 'tyni'; did you mean 'tiny'?"),
        (("fig2", "--set", "step=3"), "unknown config key 'step'; did you mean 'steps'?"),
        (("fig2", "--set", "steps=many"), "steps must be int, got 'many'"),
        (("fig2", "--set", "steps"), "--set takes KEY=VALUE"),
        (("fig2", "--set", "=3"), "--set takes KEY=VALUE"),
        (("fig2", "--set", "a=1", "--set", "a=2"), "--set names 'a' twice"),
        (("fig2", "--set", "out_dir=x"), "has its own option, --out-dir"),
        (("fig2", "--seed", "-1"), "--seed"),
        (("fig2", "--nosuch"), "No such option"),
    ],
)
def test_mistakes_are_named_before_anything_runs(checkout, call, arguments, message):
    code, said = call("reproduce", *arguments)
    assert code == 2
    assert message in said
    assert not (checkout / "build").exists()


def test_unwritable_results_folder_is_named_before_anything_runs(checkout, call):
    (checkout / "file").write_text("")
    code, said = call("reproduce", "fig2", "--out-dir", checkout / "file" / "below")
    assert code == 1
    assert "cannot write to" in said
    assert "is no folder" in said


def test_train_passes_the_request_on(checkout, call):
    code, said = call("train", "fig2", "--scale", "tiny", "--seed", "2", "--set", "steps=3")
    assert code == 0
    assert "trained tiny 2 {'steps': 3}" in said
    code, said = call("train", "fig2", "--set", "stops=3")
    assert code == 2
    assert "did you mean 'steps'" in said


def test_notebooks_runs_each_at_smoke(checkout, call, no_kernel):
    code, said = call("notebooks")
    assert code == 0, said
    assert "ran fig2.ipynb" in said
    assert (checkout / "build/results/fig2/smoke/manifest.json").is_file()


def test_settings_are_json_or_text():
    settings = ["a=1", "b=[1, 2]", "c=true", "d=text", "e=x=y", 'f="1"']
    found = reproducing.parse_settings(settings)
    assert found == {"a": 1, "b": [1, 2], "c": True, "d": "text", "e": "x=y", "f": "1"}
