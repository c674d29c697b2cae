"""The Triton kernels in Triton's interpreter: see `interpreted_kernels`, which runs by itself.

Whether kernels are interpreted is decided when they are imported, hence a process for each op.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from d2l_kernels.dispatch import OPS

SUPPORT = Path(__file__).parents[1] / "support"
INTERPRETED = [op for op, (_, backends) in OPS.items() if "triton" in backends]


def interpreted(*args: str) -> subprocess.CompletedProcess:
    # OpenBLAS starts its threads anew for every small product that the interpreter makes
    env = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, env=env, cwd=SUPPORT.parents[1], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", INTERPRETED)
def test_kernels_are_right_in_the_interpreter(op):
    pytest.importorskip("triton", reason="triton is not installed")
    done = interpreted(str(SUPPORT / "interpreted_kernels.py"), "-k", op)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 6
