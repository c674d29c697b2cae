"""`d2l chat`: talk with documents in the terminal."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

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

    ``by_sentence`` it keeps the sentences of each file instead of an adapter, and internalises the
    one that suits a question.
    """

    def __init__(
        self, model: DocToLoRA, strength: float = 1.0, *, by_sentence: bool = False
    ) -> None:
        self.model, self.strength = model, strength
        self.adapter: Adapter | None = None
        self.sentences: dict[str, list[str]] | None = {} if by_sentence else None

    def adapter_for(self, question: str) -> Adapter | None:
        """Return the adapter that a question is asked with."""
        one = self.adapter
        if self.sentences:
            known = [s for listed in self.sentences.values() for s in listed]
            one = common.sentence_for(question, self.model, known)
        return one and one.scaled(self.strength)

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
        """Add a document, by sentence in place of an earlier reading; raises what reading raises.

        ValueError for a document that is held, and by sentence for an adapter.
        """
        if self.sentences is not None:
            common.refuse_adapters([source])
            self.sentences[source] = common.sentences_of(self.model, source)
            return
        one = common.adapter_from(self.model, source)
        self.adapter = one if self.adapter is None else self.adapter + one

    def forget(self, title: str | None = None) -> None:
        """Forget one document by its title (by sentence: as it was added), or all.

        Raises ValueError for one that is not there.
        """
        if self.sentences:
            if title is not None and title not in self.sentences:
                raise ValueError(f"no document is {title!r}; held: {', '.join(self.sentences)}")
            for name in list(self.sentences) if title is None else [title]:
                del self.sentences[name]
            return
        if self.adapter is None:
            raise ValueError("there is no document to forget")
        only = len(self.adapter.sources) == 1
        if title is not None:
            self.adapter.find(title)
        self.adapter = None if title is None or only else self.adapter.without(title)

    def holds(self) -> str:
        """Say which documents are held."""
        if self.sentences:
            names, n = list(self.sentences), sum(map(len, self.sentences.values()))
            size = f"{n} sentences, of which each question asks one"
        elif self.adapter:
            names = [s.title for s in self.adapter.sources]
            size = f"{sum(sum(s.chunk_tok) for s in self.adapter.sources)} tokens"
        else:
            return "No document: the base answers."
        titles = ", ".join(f"[bold]{escape(name)}[/]" for name in names)
        return f"Holding {titles} ({size})."
