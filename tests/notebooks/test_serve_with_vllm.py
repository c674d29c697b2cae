"""The script for vLLM, with stand-ins for d2l, vllm and curl that record what they are asked."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "notebooks/serve_with_vllm.sh"
STUBS = {
    "d2l": 'for last; do :; done; mkdir -p "$last"; echo "{\\"r\\": $RANK_MADE}" > '
    '"$last/adapter_config.json"; echo "d2l $*" >> "$LOG"',
    "vllm": 'echo "vllm $VLLM_ALLOW_RUNTIME_LORA_UPDATING $*" >> "$LOG"; '
    '[ -z "$DIES" ] || exit 1; touch "$UP"',
    "curl": 'for last; do :; done; case "$last" in */health) [ -e "$UP" ];; *) '
    'while [ "$1" != --data ]; do shift; done; echo "$last $2" >> "$LOG";; esac',
}


@pytest.fixture
def run(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def go(*arguments, rank=16, **environment):
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": f"{tmp_path}/log",
            "UP": f"{tmp_path}/up", "RANK_MADE": str(rank), "POLL_S": "0.1", "DIES": "",
            "FOLDER": str(tmp_path / "my lora"), **environment,
        }  # fmt: skip
        done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)
        log = tmp_path / "log"
        return done, log.read_text().splitlines() if log.exists() else []

    return go


def test_export_serve_load_and_ask(run, tmp_path):
    done, log = run("org/base", 'What "is" it?', "a file.txt", "b.md")
    assert done.returncode == 0, done.stderr
    folder = str(tmp_path / "my lora")
    assert log[0] == f"d2l export a file.txt b.md {folder}"
    assert log[1] == "vllm True serve org/base --port 8000 --enable-lora --max-lora-rank 16"
    load, ask = (line.split(" ", 1) for line in log[2:])
    assert load[0] == "http://localhost:8000/v1/load_lora_adapter"
    assert json.loads(load[1]) == {"lora_name": "my lora", "lora_path": folder}
    assert ask[0] == "http://localhost:8000/v1/chat/completions"
    request = json.loads(ask[1])
    assert request["model"] == "my lora"
    assert request["messages"][-1] == {"role": "user", "content": 'What "is" it?'}


def test_a_server_that_runs_is_used(run, tmp_path):
    (tmp_path / "up").touch()
    done, log = run("org/base", "What?", "a.txt", PORT="9", RANK="64", MODEL="fig2/tiny")
    assert done.returncode == 0, done.stderr
    assert log[0].startswith("d2l export --model fig2/tiny --rank 64 a.txt")
    assert not any(line.startswith("vllm") for line in log)
    assert log[1].startswith("http://localhost:9/v1/load_lora_adapter")


def test_what_cannot_work_is_said(run):
    done, log = run("org/base", "What?")
    assert (done.returncode, log) == (2, [])
    assert "serve_with_vllm.sh BASE QUESTION FILE" in done.stderr
    done, log = run("org/base", "What?", "a.txt", rank=577)
    assert done.returncode == 2
    assert "rank 577 is more than vLLM loads" in done.stderr
    done, _ = run("org/base", "What?", "a.txt", DIES="yes")
    assert done.returncode == 1
    assert "vLLM did not start" in done.stderr
