"""`d2l chat`: talk with documents in the terminal."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from . import common
from .common import DEFAULT_MODEL, Base, Device, ModelName, Sources, Strength, console

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..model import DocToLoRA

HELP = """\
[bold]/add FILE[/]         read one more document (or adapter)
[bold]/forget [TITLE][/]   forget a document, or all of them
[bold]/strength [X][/]     show or set what multiplies the adapter: 0 is the base, 1 as it was read
[bold]/help[/]             this list
[bold]/quit[/]             leave (Ctrl-D does too)
Anything else is a question. Each is answered by itself: earlier ones are not remembered."""
app = typer.Typer()


@app.command(rich_help_panel="Documents")
def chat(
    documents: Sources = [],  # noqa: B006
    model: ModelName = DEFAULT_MODEL,
    strength: Strength = 1.0,
    base: Base = "",
    device: Device = "auto",
) -> None:
    """Talk with documents: add and forget them, change the adapter's strength, ask."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    chat = Chat(common.load(model, base, device, documents), strength)
    say = console()
    for document in documents:
        chat.add(document)
    say.print(f"{chat.holds()} [bold]/help[/] lists the commands.", soft_wrap=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say.print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                say.print(chat.command(line), soft_wrap=True)
            elif line:
                for piece in chat.model.stream(line, chat.scaled):
                    print(piece, end="", flush=True)
                print()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            say.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        except KeyboardInterrupt:
            say.print("[dim](stopped)[/]")


class Chat:
    """The documents of a conversation and their strength; commands return what to print."""

    def __init__(self, model: DocToLoRA, strength: float = 1.0) -> None:
        self.model, self.strength = model, strength
        self.adapter: Adapter | None = None

    @property
    def scaled(self) -> Adapter | None:
        """The adapter that questions are asked with."""
        return self.adapter and self.adapter.scaled(self.strength)

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash; ValueError for an unknown one."""
        try:
            name, *rest = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"cannot read {line!r}: {error}") from error
        if name == "/add" and rest:
            for source in rest:
                self.add(source)
        elif name == "/forget" and len(rest) < 2:
            self.forget(*rest)
        elif name == "/strength" and len(rest) < 2:
            self.strength = float(rest[0]) if rest else self.strength
            return f"Strength {self.strength:g}."
        elif name == "/help":
            return HELP
        else:
            raise ValueError(f"{line!r} is no command; /help lists them")
        return self.holds()

    def add(self, source: str) -> None:
        """Add a document; raises what reading it raises."""
        one = common.adapter_of(self.model, [source])
        self.adapter = one if self.adapter is None or one is None else self.adapter + one

    def forget(self, title: str | None = None) -> None:
        """Forget one document by its title, or all; ValueError for one that is not there."""
        if self.adapter is None:
            raise ValueError("there is no document to forget")
        only = len(self.adapter.sources) == 1
        if title is not None:
            self.adapter.find(title)
        self.adapter = None if title is None or only else self.adapter.without(title)

    def holds(self) -> str:
        """Say which documents are held."""
        if self.adapter is None:
            return "No document: the base answers."
        tokens = sum(sum(s.chunk_tok) for s in self.adapter.sources)
        titles = ", ".join(f"[bold]{escape(s.title)}[/]" for s in self.adapter.sources)
        return f"Holding {titles} ({tokens} tokens)."
