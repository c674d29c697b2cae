"""The command line.  Heavy imports happen inside the commands, so that `d2l --help` is quick.

Exit codes: 0 it ran (claims that do not hold are reported, not an error, unless `--strict`), 1 it
failed, 2 the request cannot be served as asked.
"""

from __future__ import annotations

import os
import sys
import warnings

import typer
from rich.markup import escape

from ..experiments import CannotRun
from . import chat, doctor, documents, reproducing
from .common import console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn documents into LoRA adapters of a language model, and reproduce the paper.",
)
app.add_typer(documents.app)
app.add_typer(chat.app)
app.add_typer(doctor.app)
app.add_typer(reproducing.app)


def main() -> None:
    """Run the command line; every expected error becomes one message and an exit code.

    `D2L_TRACEBACK=1` shows the whole traceback instead.
    """
    warnings.showwarning = _show_warning
    try:
        app(prog_name="d2l")
    except (ValueError, CannotRun) as error:
        _report(error, 2)
    except (OSError, ModuleNotFoundError) as error:
        _report(error, 1)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if category is UserWarning:
        console(stderr=True).print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)


def _report(error: Exception, code: int) -> None:
    if os.environ.get("D2L_TRACEBACK"):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    console(stderr=True).print(f"[red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(code)
