"""Run notebooks through papermill: compare parameter names first, and report errors plainly.

papermill only warns about a parameter that the notebook does not have; here it is refused.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .experiments import unknown


class NotebookError(RuntimeError):
    """A cell raised; `error_name` is the exception's class and the text its message."""

    def __init__(self, error_name: str, message: str) -> None:
        super().__init__(message)
        self.error_name = error_name


def parameters(notebook: Path) -> dict[str, Any]:
    """Return the names and defaults assigned in the cell tagged `parameters`.

    Raises FileNotFoundError for a missing notebook, ValueError for one without such a cell.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return _assignments("".join(cell["source"]))
    raise ValueError(f"{notebook} has no cell tagged 'parameters'")


def check_names(notebook: Path, given: Mapping[str, Any]) -> None:
    """Raise ValueError if `given` names a parameter that the notebook does not have."""
    known = parameters(notebook)
    for name in given:
        if name not in known:
            raise ValueError(unknown(f"parameter of {notebook.name}", name, known))


def execute(notebook: Path, executed: Path, given: Mapping[str, Any], quiet: bool = False) -> None:
    """Run `notebook` with parameters `given`; the executed copy lies at `executed`.

    The output of cells streams to the terminal unless `quiet`.  Raises ValueError for an unknown
    parameter before anything runs, and NotebookError when a cell raises or the kernel dies.
    """
    check_names(notebook, given)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=dict(given),
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],
            stdout_file=None if quiet else sys.stdout,
            stderr_file=None if quiet else sys.stderr,
        )
    except PapermillExecutionError as error:
        raise NotebookError(error.ename, error.evalue) from error
    except DeadKernelError as error:
        message = "the notebook's kernel died; most often the machine ran out of memory"
        raise NotebookError("DeadKernelError", message) from error


def _assignments(source: str) -> dict[str, Any]:
    found = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                found[target.id] = ast.literal_eval(value)
    return found
