import json
import os
import re
import subprocess
import sys

import pytest

from d2l import home
from d2l.cli import doctor

ROOT = home.repo_root()
COMMANDS = (
    "internalize", "ask", "export", "import", "info", "chat", "doctor",
    "reproduce", "train", "figures", "claims", "bench", "notebooks",
)  # fmt: skip


def d2l(*arguments, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "d2l", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
    )


def test_help_lists_every_command(call):
    code, said = call("--help")
    assert code == 0
    assert re.findall(r"^│ (\w+)  ", said, re.M) == list(COMMANDS)
    for command in COMMANDS:
        code, said = call(command, "--help")
        assert code == 0
        assert "Usage: d2l" in said


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom d2l import cli\ntry:\n    cli.app(['--help'])\nexcept SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'transformers', 'papermill', 'IPython'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout


def test_help_takes_half_a_second():
    times = []
    for _ in range(5):
        start = os.times()
        assert d2l("--help").returncode == 0
        end = os.times()
        used = end.children_user + end.children_system
        times.append(used - start.children_user - start.children_system)
    assert min(times) < 0.5, f"CPU seconds of d2l --help: {times}"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("d2l rep", "reproduce"), ("d2l train f", "fig2"), ("d2l train fig2 --scale sm", "small")],
)
def test_shell_completion(typed, offered):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = d2l(_D2L_COMPLETE="complete_bash", **words)
    assert offered in done.stdout.split(), done.stderr


def test_unknown_command_names_the_nearest(call):
    code, said = call("doktor")
    assert code == 2
    assert "Did you mean 'doctor'" in said


def test_doctor_says_what_works(call, monkeypatch, tmp_path):
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    code, said = call("doctor")
    assert code == 0
    for line in (
        r"ok +torch +\d",
        r"ok +cpu +\d+ threads",
        r"ok +segmented_lora: torch",
        r"(ok|-) +flash-attn",
        r"ok +fig2/tiny +shipped, 3\.1 MiB",
        r"- +smollm2-135m +fetched from PyPI at its first use",
        r"ok +\S+/cache +\d+ GiB free",
    ):
        assert re.search(f"^{line}", said, re.M), line
    (tmp_path / "cache/smollm2-135m").mkdir(parents=True)
    (tmp_path / "cache/smollm2-135m/config.json").touch()
    code, said = call("doctor", "--json")
    models = {f["name"]: f["state"] for f in json.loads(said)}
    assert models["smollm2-135m"] == "ok"
    assert not (tmp_path / "cache/adapters").exists()


def test_doctor_gives_the_reason_of_a_backend_that_declines(call, monkeypatch):
    import d2l_kernels

    declined = {"segmented_lora": {"torch": None, "triton": "needs CUDA compute capability 8.0"}}
    monkeypatch.setattr(d2l_kernels, "explain", lambda: declined)
    code, said = call("doctor")
    assert code == 0
    assert re.search(r"^- +segmented_lora: triton +needs CUDA compute", said, re.M)


def test_doctor_fails_where_something_is_broken(call, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 3 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    code, said = call("doctor")
    assert code == 1
    assert "3 MiB free, a model needs 600" in said
    monkeypatch.setenv("D2L_HOME", str(tmp_path))
    code, said = call("doctor")
    assert code == 1
    assert re.search(r"^broken +shipped +D2L_HOME=\S+ holds no papers/ folder", said, re.M)


def test_mistakes_show_no_traceback_unless_asked():
    done = d2l("reproduce", "fig22")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: unknown figure or table 'fig22'" in done.stderr
    assert "Traceback" in d2l("reproduce", "fig22", D2L_TRACEBACK="1").stderr
