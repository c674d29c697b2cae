"""What the README shows is run, and what it claims of us is held by a test that exists."""

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2l import cli, home

ROOT = home.repo_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.slow
def test_the_python_examples_give_what_they_show():
    example = "\n".join(blocks("python"))
    parsed = doctest.DocTestParser().get_doctest(example, {}, "README", "README.md", 0)
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    runner.run(parsed, out=said.append)
    assert runner.summarize(verbose=False).attempted == 13
    assert not said, "".join(said)


@pytest.mark.slow
def test_the_terminal_example_gives_what_it_shows(tmp_path):
    (session,) = blocks("console")
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.M)
    assert len(commands) == 2
    wrapper = tmp_path / "d2l"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m d2l "$@"\n')
    wrapper.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    for command, expected in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "PYTHONPATH": python_path},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_commands_that_are_named_exist():
    import typer.main

    known = set(typer.main.get_command(cli.app).commands)
    named = set(re.findall(r"^\| `d2l (\w+)", README, re.M))
    assert named == known - {"reproduce", "train", "figures", "claims", "bench", "notebooks"}
    recipes = set(re.findall(r"^([\w-]+)(?: \*args)?:", (ROOT / "Justfile").read_text(), re.M))
    assert set(re.findall(r"`just ([\w-]+)", README)) <= recipes


def test_each_cell_of_ours_names_a_test_that_exists():
    table = README.partition("## Beside others")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[1])
        assert named, f"no test holds {row[0].strip()!r}"
        for file, test in named:
            (path,) = (ROOT / "tests/d2l").glob(file)
            functions = {
                n.name
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.FunctionDef)
            }
            assert test in functions, f"{file} has no {test}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / Path(target)).exists(), target
