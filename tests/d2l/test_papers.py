import importlib
import re

import pytest

from d2l import home

PAPERS = sorted((home.repo_root() / "papers").iterdir())
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
