import importlib
import json
import re

import pytest

from d2l import home
from d2l.experiments import EXPERIMENTS

ROOT = home.repo_root()
PAPERS = sorted((ROOT / "papers").iterdir())
SYMBOL = re.compile(r"`(d2l(?:_kernels)?(?:\.\w+)+)`")


def resolve(dotted):
    """Import as much of a dotted name as is a module, and look up the rest."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{dotted} does not exist")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_every_code_symbol_of_the_summary_exists(paper):
    symbols = SYMBOL.findall((paper / "README.md").read_text())
    assert symbols
    for symbol in symbols:
        assert resolve(symbol) is not None


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_linked_files_and_cited_works_exist(paper):
    text = (paper / "README.md").read_text()
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert (paper / target).exists(), target
    entries = re.findall(r"@\w+\{(\w+),", (paper / "references.bib").read_text())
    assert len(entries) == len(set(entries))
    for cited in re.findall(r"[Cc]ited as `(\w+)`", text):
        assert cited in entries


def costs_told(text, command):
    """List (id, scale, told) for the rows of Markdown tables that name a command."""
    found = []
    for row in re.findall(r"^\|.*\|$", text, re.M):
        if match := re.search(command, row):
            figure, scale = match[1], match[2] or EXPERIMENTS[match[1]].default_scale
            cells = row.strip("|").split("|")
            told = [c for c in cells if re.search(r"\b(min|minute|seconds|hour)\b", c)]
            found += [(figure, scale, c.strip()) for c in told[:1]]
    return found


def minutes(told):
    told = re.sub(r"(figure|fig) ?\d+", "", told)
    return sorted(re.findall(r"\b\d+\b|half an hour|half a minute|seconds", told))


@pytest.mark.parametrize("page", ["README.md", "REPRODUCING.md", "notebooks"])
def test_costs_are_told_alike(page):
    if page == "notebooks":
        told = [
            (e.id, scale, row)
            for e in EXPERIMENTS.values()
            for scale, row in re.findall(
                r"^\| `(\w+)` \|.*\| ([^|]*) \|$",
                "".join(json.loads((ROOT / e.notebook).read_text())["cells"][0]["source"]),
                re.M,
            )
            if scale != "paper"
        ]
    else:
        command = r"`just reproduce (\w+)(?: --scale (\w+))?`"
        told = costs_told((ROOT / page).read_text(), command)
    assert len(told) >= 5
    for figure, scale, row in told:
        assert minutes(row) == minutes(EXPERIMENTS[figure].cost[scale]), (figure, scale, row)
