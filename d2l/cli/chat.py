"""`d2l chat`: talk with documents in the terminal."""

from __future__ import annotations

import contextlib
import functools
import operator
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from . import common
from .common import DEFAULT_MODEL, Base, BySentence, Device, ModelName, Sources, Strength, console

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
    by_sentence: BySentence = False,
    base: Base = "",
    device: Device = "auto",
) -> None:
    """Talk with documents: add and forget them, change the adapter's strength, ask."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    if by_sentence:
        common.refuse_adapters(documents)
    chat = Chat(common.load(model, base, device, documents), strength, by_sentence=by_sentence)
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
                for piece in chat.model.stream(line, chat.adapter_for(line)):
                    print(piece, end="", flush=True)
                print()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            say.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        except KeyboardInterrupt:
            say.print("[dim](stopped)[/]")


class Chat:
    """The documents of a conversation and their strength; commands return what to print.

    ``held`` maps titles to adapters.  ``by_sentence`` it maps them to sentences instead, of which
    the one that suits a question is internalised.
    """

    def __init__(
        self, model: DocToLoRA, strength: float = 1.0, *, by_sentence: bool = False
    ) -> None:
        self.model, self.strength, self.by_sentence = model, strength, by_sentence
        self.held: dict[str, Any] = {}

    def adapter_for(self, question: str) -> Adapter | None:
        """Return the adapter that a question is asked with."""
        if not self.held:
            return None
        if self.by_sentence:
            sentences = [s for listed in self.held.values() for s in listed]
            return common.sentence_for(question, self.model, sentences).scaled(self.strength)
        return _sum(self.held).scaled(self.strength)

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
        """Add a document; raises what reading it raises, ValueError for one that is held."""
        if self.by_sentence:
            common.refuse_adapters([source])
            name = "standard input" if source == "-" else Path(source).name
            new: dict[str, Any] = {name: common.sentences_of(self.model, source)}
        else:
            new = {a.sources[0].title: a for a in common.adapter_from(self.model, source).split()}
        for title in new.keys() & self.held.keys():
            raise ValueError(f"{title!r} is held already; /forget it first")
        if not self.by_sentence:
            _sum(self.held | new)  # refuses a text that is held under another title
        self.held |= new

    def forget(self, title: str | None = None) -> None:
        """Forget one document by its title, or all; ValueError for one that is not there."""
        if not self.held:
            raise ValueError("there is no document to forget")
        if title is not None and title not in self.held:
            raise ValueError(f"no document is {title!r}; held: {', '.join(self.held)}")
        for name in list(self.held) if title is None else [title]:
            del self.held[name]

    def holds(self) -> str:
        """Say which documents are held."""
        if not self.held:
            return "No document: the base answers."
        titles = ", ".join(f"[bold]{escape(title)}[/]" for title in self.held)
        if self.by_sentence:
            n = sum(map(len, self.held.values()))
            return f"Holding {titles} ({n} sentences, of which each question asks one)."
        n = sum(sum(s.chunk_tok) for a in self.held.values() for s in a.sources)
        return f"Holding {titles} ({n} tokens)."


def _sum(held: dict[str, Adapter]) -> Adapter:
    return functools.reduce(operator.add, held.values())
