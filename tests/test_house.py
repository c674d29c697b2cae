"""The rules of the house: who may import whom, sizes, notebooks, pins, and a quiet `import d2l`.

Each rule is a function that takes its input and returns complaints, so that the tests below can
show both that the repository keeps it and that a planted violation is seen.
"""

from __future__ import annotations

import ast
import json
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

RESULTS = {
    "artifacts",
    "measures",
    "measures_qa",
    "measures_data",
    "claims",
    "figures",
    "figures_qa",
    "figures_data",
}

# rooms of d2l from the ground up; a room may use its own floor and those below
EXPERIMENTS_ONLY = RESULTS | {
    "experiments", "notebooks", "bench", "tiny_training", "evaluate", "intervals",
    "data.needle", "data.needle_training", "data.prose", "lm.tiny", "lm.vocabulary",
    "cli.reproducing", "tiny_needle", "tiny_qa", "qa_metrics", "baselines", "self_generate",
    "question_writing", "teacher", "teaching", "meter", "data.record", "data.public",
    "data.encyclopedia", "data.encyclopedia_questions", "data.fact_training", "data.lexicon",
    "data.lexicon_open", "data.lexicon_closed", "data.passages", "data.articles",
}  # fmt: skip
# what talks to people, reads their files and fetches: a core that is read in an afternoon does
# without it, and it has a ceiling of its own
INTERFACES = {"cli", "widgets", "__main__", "documents", "compare", "lm.smollm2", "lm.wheels"}
FLOORS = (
    {"config", "types", "lm", "home", "intervals", "documents", "qa_metrics", "meter"},
    {"hypernet", "perceiver", "lora", "ridge", "chunking", "adapter", "export"},
    {"model", "reading", "losses", "data", "checkpoint", "published", "pretrained", "muon"}
    | {"routing"},
    {"train", "evaluate", "baselines", "bench", "tiny_training", "store", "compare"}
    | {"tiny_needle", "tiny_qa", "self_generate", "question_writing", "teacher", "teaching"}
    | RESULTS,
    {"__init__"},
    {"experiments"},
    {"notebooks", "cli", "widgets", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# third-party package -> the only modules that may import it
CONFINED = {
    "transformers": ("d2l.lm", "d2l.lm.*", "d2l.published"),
    "peft": ("d2l.export",),
    "triton": ("d2l_kernels.*triton*",),
    "flash_attn": ("d2l_kernels.*flash*",),
    **dict.fromkeys(("matplotlib", "seaborn"), ("d2l.figures", "d2l.figures_*")),
    "ipywidgets": ("d2l.widgets",),
    **dict.fromkeys(("bs4", "mammoth", "markdownify", "pypdf"), ("d2l.documents",)),
    "pyarrow": ("d2l.self_generate",),
    "datasets": ("d2l.data.public",),
    "llmlingua": ("d2l.baselines.prompted",),
    "bm25s": ("d2l.routing",),
    "vllm": ("d2l.teacher",),
    "pandas": ("d2l.experiments", "d2l.experiments.*", *(f"d2l.{room}" for room in RESULTS)),
}
KERNELS_USE = {"d2l_kernels", "torch", "jaxtyping", "triton", "flash_attn"}

EXPERIMENT = re.compile(r"d2l\.experiments\.((?:fig|tab)\w+)")
MAX_MODULE, MAX_EXPERIMENT, MAX_CORE, MAX_KERNELS, MAX_INTERFACES = 400, 120, 4100, 2000, 1250
MAX_CELLS, MAX_CELL_LINES = 8, 60
PAGES_USE = ("__init__", "experiments", "compare", "widgets")
MACHINE_PATH = re.compile(rb"(?<![\w.~/-])/(?:root|work|farm|home/\w+|Users/\w+)/[\w.]")


def module_of(path: Path, root: Path) -> str:
    """Name the module in ``path``; a package's own file ends in ``.__init__``."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def modules(root: Path, package: str) -> dict[str, str]:
    """Read every module of a package: dotted name -> source."""
    return {module_of(p, root): p.read_text() for p in sorted((root / package).rglob("*.py"))}


def imports(module: str, source: str) -> Iterator[str]:
    """Yield everything that ``module`` imports, anywhere in it, as absolute dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """Return the room of d2l that a dotted name lies in; ``__init__`` for the package itself."""
    rest = name.split(".")[1:]
    known = rest and (rest[0] in FLOOR_OF or (ROOT / "d2l" / f"{rest[0]}.py").exists())
    return rest[0] if known else "__init__"


def of_experiments(module: str) -> bool:
    """Say whether a module of d2l serves the experiments alone."""
    return room_of(module) in EXPERIMENTS_ONLY or module.removeprefix("d2l.") in EXPERIMENTS_ONLY


def leaks(sources: dict[str, str]) -> list[str]:
    """List what the core imports of the experiments; the command line may call them."""
    return [
        f"{module} imports {name}, which is of the experiments"
        for module, source in sources.items()
        if module.startswith("d2l.") and not of_experiments(module) and room_of(module) != "cli"
        for name in imports(module, source)
        if name.startswith("d2l.")
        and (of_experiments(name) or of_experiments(name.rpartition(".")[0]))
    ]


def import_faults(module: str, source: str) -> list[str]:
    """List the imports of ``module`` that the law forbids."""
    faults = []
    package, here = module.split(".")[0], room_of(module)
    if package == "d2l" and here not in FLOOR_OF:
        faults.append(f"{module}: give the room {here!r} a floor in FLOORS")
    for name in imports(module, source):
        top = name.split(".")[0]
        allowed = CONFINED.get(top, ("*",))
        if not any(fnmatch(module.removesuffix(".__init__"), pattern) for pattern in allowed):
            faults.append(f"{module} imports {name}: {top} belongs to {', '.join(allowed)}")
        if package == "d2l_kernels" and top not in KERNELS_USE | sys.stdlib_module_names:
            faults.append(f"{module} imports {name}: the kernels stand alone")
        if package == top == "d2l":
            there = room_of(name)
            if FLOOR_OF.get(there, 0) > FLOOR_OF.get(here, len(FLOORS)):
                faults.append(f"{module} imports {name}: upwards")
            one, other = (
                re.match(r"d2l\.experiments\.((?:fig|tab)\w+)", n) for n in (module, name)
            )
            if one and other and one[1] != other[1]:
                faults.append(f"{module} imports {name}: sideways between experiments")
    return faults


def settings_lines(source: str) -> int:
    """Count the lines of top-level CONSTANTS: an experiment declares its scales as data."""
    return sum(
        bool(line.strip())
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target).isupper()
        for line in source.splitlines()[node.lineno - 1 : node.end_lineno]
    )


def size_faults(sources: dict[str, str]) -> list[str]:
    """List modules and packages over their ceilings, counted in lines that are not blank.

    The core leaves out the experiments and what only they use; an experiment, its settings.
    """
    lines = {
        module: sum(bool(line.strip()) for line in source.splitlines())
        for module, source in sources.items()
    }
    experiments = {
        m: n - settings_lines(sources[m]) for m, n in lines.items() if EXPERIMENT.match(m)
    }
    faults = [f"{m}: {n} lines, at most {MAX_MODULE}" for m, n in lines.items() if n >= MAX_MODULE]
    faults += [
        f"{m}: {n} lines, an experiment has at most {MAX_EXPERIMENT}"
        for m, n in experiments.items()
        if n > MAX_EXPERIMENT
    ]
    own = {m: n for m, n in lines.items() if m.startswith("d2l.") and not of_experiments(m)}
    interfaces = sum(
        n
        for m, n in own.items()
        if room_of(m) in INTERFACES or m.removeprefix("d2l.") in INTERFACES
    )
    core = sum(own.values()) - interfaces
    kernels = sum(n for m, n in lines.items() if m.startswith("d2l_kernels"))
    if core >= MAX_CORE:
        faults.append(f"the core has {core} lines, at most {MAX_CORE}")
    if interfaces >= MAX_INTERFACES:
        faults.append(f"the interfaces have {interfaces} lines, at most {MAX_INTERFACES}")
    if kernels >= MAX_KERNELS:
        faults.append(f"the kernels have {kernels} lines, at most {MAX_KERNELS}")
    return faults


def notebook_faults(notebook: dict) -> list[str]:
    """List what keeps a notebook from being a thin page."""
    faults = []
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    code = ["".join(c["source"]) for c in cells]
    if len(cells) > MAX_CELLS:
        faults.append(f"{len(cells)} code cells, at most {MAX_CELLS}")
    n_lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    if n_lines > MAX_CELL_LINES:
        faults.append(f"{n_lines} lines of code, at most {MAX_CELL_LINES}")
    if any(c["outputs"] or c["execution_count"] is not None for c in cells):
        faults.append("outputs are kept: run `just fmt`")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        faults.append("the kernelspec is not python3")
    tagged = [
        source
        for cell, source in zip(cells, code, strict=True)
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(tagged) != 1:
        faults.append(f"{len(tagged)} cells tagged `parameters`, want one")
    for node in (n for source in tagged for n in ast.walk(ast.parse(source))):
        if isinstance(node, ast.AnnAssign) and not isinstance(node.annotation, ast.Name):
            faults.append(f"papermill cannot read the annotation {ast.unparse(node.annotation)}")
    source = "\n".join(code)
    if any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(ast.parse(source))):
        faults.append("it defines something: move that into the package")
    for name in imports("notebook", source):
        top = name.split(".")[0]
        if top == "torch" or (top == "d2l" and room_of(name) not in PAGES_USE):
            faults.append(f"it imports {name}: a page uses {', '.join(PAGES_USE)} only")
    return faults


def tracked(root: Path) -> list[Path]:
    """List the files that git tracks or would."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True).stdout
    paths = (root / name.decode() for name in names.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def pins(text: str) -> dict[str, Requirement]:
    """Parse constraints: canonical name -> requirement; every line must be ``name==version``."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    assert all(re.fullmatch(r"==[^*+,]+", str(r.specifier)) for r in found.values())
    return found


def declared(*extras: str) -> list[Requirement]:
    """Read what both packages ask for themselves, with these extras of the core."""
    core, kernels = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        for folder in (".", "kernels")
    )
    wanted = [*kernels["dependencies"], *core["dependencies"]]
    wanted += [r for extra in extras for r in core["optional-dependencies"][extra]]
    here = (r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate())
    return [r for r in here if r.name != "d2l-kernels"]


def closure(wanted: list[Requirement]) -> set[str]:
    """Name every installed package that ``wanted`` leads to on this machine."""
    seen: set[tuple[str, str]] = set()
    todo = [(r.name, extra) for r in wanted for extra in ("", *r.extras)]
    while todo:
        name, extra = todo.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        for r in map(Requirement, requires(name) or []):
            if r.marker is None or r.marker.evaluate({"extra": extra}):
                todo += [(r.name, e) for e in ("", *r.extras)]
    return {name for name, _ in seen}


SOURCES = modules(ROOT, "d2l") | modules(ROOT / "kernels", "d2l_kernels")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_law(module):
    assert import_faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("d2l.lora", "from .train import loop", "upwards"),
        ("d2l.lm.base", "from ..model import DocToLoRA", "upwards"),
        ("d2l.lm.__init__", "from .. import losses", "upwards"),
        ("d2l.config", "from d2l import DocToLoRA", "upwards"),
        ("d2l.train", "def f():\n    import d2l.experiments", "upwards"),
        ("d2l.experiments.fig2", "from .fig3 import PAPER", "sideways"),
        ("d2l.experiments.fig2", "from . import fig3", "sideways"),
        ("d2l.model", "from transformers import AutoModel", "belongs to"),
        ("d2l.train", "import pandas as pd", "belongs to"),
        ("d2l.experiments.fig2", "import matplotlib.pyplot as plt", "belongs to"),
        ("d2l.model", "import peft", "belongs to"),
        ("d2l.lora", "import triton.language as tl", "belongs to"),
        ("d2l_kernels.lora", "import flash_attn", "belongs to"),
        ("d2l_kernels.lora", "import d2l", "stand alone"),
        ("d2l_kernels.lora", "import transformers", "stand alone"),
        ("d2l.cupboard", "import json", "give the room"),
    ],
)
def test_import_law_sees(module, source, complaint, monkeypatch, tmp_path):
    if module == "d2l.cupboard":
        (tmp_path / "d2l").mkdir()
        (tmp_path / "d2l/cupboard.py").touch()
        monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert any(complaint in fault for fault in import_faults(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("d2l.hypernet", "from .perceiver import Perceiver"),
        ("d2l.lm.encoder", "from .hooks import decoder_of\nfrom transformers import Cache"),
        ("d2l.experiments.__init__", "from . import fig2"),
        ("d2l.experiments.fig2", "from . import register\nfrom d2l.train import train"),
        ("d2l_kernels.triton_lora", "import triton\nfrom .segments import Segments"),
    ],
)
def test_import_law_allows(module, source):
    assert import_faults(module, source) == []


def test_the_core_does_without_the_experiments():
    assert leaks(SOURCES) == []
    assert leaks({"d2l.model": "from .data.needle import NeedleGenerator"})
    assert leaks({"d2l.train": "from .evaluate import MIB"})
    assert not leaks({"d2l.bench": "from .evaluate import MIB"})


def test_imported_packages_are_declared():
    extras = ("dev", "flash", "lab", "documents", "hub", "compress", "serve")
    known = {canonicalize_name(r.name) for r in declared(*extras)}
    known |= {"d2l", "d2l-kernels", "triton", "bs4"}
    missing = {
        (module, top)
        for module, source in SOURCES.items()
        for top in {name.split(".")[0] for name in imports(module, source)}
        if top not in sys.stdlib_module_names and canonicalize_name(top) not in known
    }
    assert not missing, "add these to pyproject.toml"


def test_sizes():
    assert size_faults(SOURCES) == []


def test_sizes_see():
    long = {f"d2l.m{i}": "#\n\n" * 399 for i in range(10)} | {"d2l.train": "#\n" * 400}
    long |= {"d2l.cli.chat": "#\n" * 399, "d2l.cli.doctor": "#\n" * 399, "d2l.widgets": "#\n" * 399}
    long |= {"d2l.documents": "#\n" * 60}
    long |= {"d2l.experiments.fig2": "A = [\n]\n" + "#\n" * 121, "d2l_kernels.lora": "#\n" * 2000}
    assert [fault.split()[0] for fault in size_faults(long)] == [
        "d2l.train:",
        "d2l_kernels.lora:",
        "d2l.experiments.fig2:",
        "the",
        "the",
        "the",
    ]


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow transformers' `kernels`"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_pages(path):
    assert notebook_faults(json.loads(path.read_text())) == []


def page(*code: str, **changes) -> dict:
    """Make a notebook; the first cell holds its parameters."""
    sources = ['scale: str = "smoke"', *code]
    cells = [
        {"cell_type": "code", "source": s, "outputs": [], "execution_count": None, "metadata": {}}
        for s in sources
    ]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    return {"cells": cells, "metadata": {"kernelspec": {"name": "python3"}}} | changes


def test_a_page_passes():
    code = "from d2l import experiments\nrun = experiments.fig2.run(scale)"
    assert notebook_faults(page(code)) == []


@pytest.mark.parametrize(
    ("notebook", "complaint"),
    [
        (page(*["1"] * 8), "9 code cells"),
        (page("x = 1\n" * 60), "61 lines of code"),
        (page("def f():\n    pass"), "defines"),
        (page("import torch.nn"), "imports torch.nn"),
        (page("from d2l.train import train"), "imports d2l.train"),
        (page(metadata={}), "kernelspec"),
        ({"cells": [], "metadata": {}}, "0 cells tagged"),
        ({"cells": page()["cells"] * 2, "metadata": {}}, "2 cells tagged"),
    ],
)
def test_notebook_rules_see(notebook, complaint):
    assert any(complaint in fault for fault in notebook_faults(notebook))


def test_notebook_rules_see_outputs_and_annotations():
    kept = page()
    kept["cells"][0] |= {"outputs": [{}], "source": "seed: int | None = None"}
    assert [fault.split()[0] for fault in notebook_faults(kept)] == ["outputs", "papermill"]


def test_no_machine_paths():
    found = {p: MACHINE_PATH.search(p.read_bytes()) for p in tracked(ROOT)}
    assert not {str(path): match for path, match in found.items() if match}


def test_machine_paths_are_seen():
    for folder in ("work/x", "root/.cache", "home/ada/d2l", "Users/ada/d2l"):
        assert MACHINE_PATH.search(f"open('/{folder}/file')".encode())
    for harmless in ("../shared/root/x", "a/root/b", "papers/x/home/ada/", "/home/", "~/root/x"):
        assert not MACHINE_PATH.search(harmless.encode())


def test_constraints_pin_what_the_packages_ask():
    pinned = pins((ROOT / "constraints.txt").read_text())
    for requirement in declared("dev", "lab", "documents"):
        pin = pinned[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} does not admit {pin}"


def test_constraints_pin_everything_installed():
    wanted = declared("dev", "lab", "documents")
    try:
        reached = closure(wanted)
    except PackageNotFoundError as error:
        pytest.skip(f"an extra is not installed: {error}")
    of_torch = {name for name in reached if re.match(r"nvidia-|cuda-", name)}
    pinned = set(pins((ROOT / "constraints.txt").read_text()))
    assert reached - of_torch <= pinned, "add these to constraints.txt"
    here = (sys.version_info[:2], sys.platform, platform.machine())
    if not of_torch and here == ((3, 11), "linux", "x86_64"):
        assert pinned <= reached | {"setuptools"}, "nothing needs these: drop them"


def test_environment_file_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(re.fullmatch(r"(\w+)(.*)", d).groups() for d in environment["dependencies"][:-1])
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = pins((ROOT / "constraints.txt").read_text())
    python = core["tool"]["pyright"]["pythonVersion"]
    assert core["project"]["requires-python"] == f">={python}"
    assert set(conda) == {"python", "pip", "just"}
    assert conda["python"] == f"={python}"
    just = str(pinned["rust-just"].specifier).removeprefix("==")
    assert SpecifierSet(conda["just"]).contains(just)

    lines = environment["dependencies"][-1]["pip"]
    assert lines == ["-c constraints.txt", "-e ./kernels", "-e .[dev,lab,documents]"]
    justfile = (ROOT / "Justfile").read_text()
    assert "-c constraints.txt -e ./kernels -e '.[dev,lab,documents]'" in justfile


def test_import_is_quiet():
    code = """
import socket, sys, torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise SystemExit("the network was touched")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import d2l, d2l_kernels
loud = {"triton", "flash_attn", "matplotlib", "pandas", "papermill"} & (set(sys.modules) - before)
assert not loud, f"import d2l brought {loud}"
assert not torch.cuda.is_initialized(), "import d2l touched the GPU"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
