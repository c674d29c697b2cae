import json

import pytest

from d2l import experiments, home, notebooks

ROOT = home.repo_root()
PAGES = sorted((ROOT / "notebooks").glob("*.ipynb"))
STANDARD = {"scale", "seed", "overrides", "out_dir", "retrain"}


def cells(path, kind):
    found = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS.values(), ids=lambda e: e.id)
def test_every_experiment_has_its_page(experiment):
    path = ROOT / experiment.notebook
    defaults = notebooks.parameters(path)
    assert set(defaults) >= STANDARD
    assert defaults["scale"] == experiment.default_scale
    assert defaults["out_dir"] == ""
    code = "\n".join(cells(path, "code"))
    for step in (f"{experiment.id}.run(", "run.config_diff()", "run.figure()", "run.check()"):
        assert step in code
    for name in defaults:
        assert f"{name}={name}" in code, f"{name} is not passed on"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_opens_with_its_claim_and_ends_with_how_to_read_it(path):
    page = json.loads(path.read_text())["cells"]
    assert page[0]["cell_type"] == page[-1]["cell_type"] == "markdown"
    assert page[1]["metadata"]["tags"] == ["parameters"]
    if path.stem in experiments.EXPERIMENTS:
        first, last = cells(path, "markdown")[0], cells(path, "markdown")[-1]
        for word in ("Claim", "Doc-to-LoRA, ", "Differences from the paper"):
            assert word in first
        for scale in experiments.EXPERIMENTS[path.stem].scales:
            assert f"`{scale}`" in first
        assert "How to read it" in last


def test_unknown_parameters_are_refused_with_the_nearest(tmp_path):
    page = ROOT / "notebooks/fig2.ipynb"
    notebooks.check_names(page, {"scale": "tiny"})
    with pytest.raises(ValueError, match=r"fig2\.ipynb 'scales'; did you mean 'scale'"):
        notebooks.execute(page, tmp_path / "x.ipynb", {"scales": "tiny"})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="there is no notebook"):
        notebooks.parameters(tmp_path / "none.ipynb")
    (tmp_path / "bare.ipynb").write_text('{"cells": []}')
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        notebooks.parameters(tmp_path / "bare.ipynb")
