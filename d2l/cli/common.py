"""What the commands share: console, JSON, options, and how a document becomes an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import documents
from ..home import cache_dir, repo_root, shipped

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..model import DocToLoRA
    from ..reading import Reading

DEFAULT_MODEL = "fig2/small"


def _models(incomplete: str) -> list[str]:
    return [name for name in shipped() if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="D2L_MODEL",
        help="Hypernetwork: a shipped name, a checkpoint's folder or file, or a hub name.",
        autocompletion=_models,
    ),
]
Base = Annotated[str, typer.Option(help="Base model; empty: the one it was made for.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Strength = Annotated[float, typer.Option(help="Multiplies what the adapter adds to the weights.")]
BySentence = Annotated[
    bool,
    typer.Option("--by-sentence", help="Internalise only the sentence with the question's words."),
]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="[DOCUMENT]...",
        help="Files to read (or - for standard input), and adapters: .safetensors, PEFT folders.",
        show_default=False,
    ),
]


def console(stderr: bool = False) -> Console:
    """Make a console that colours only what it is told to."""
    return Console(stderr=stderr, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON, one key a line."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def short(path: Path) -> str:
    """Return a path as it reads best: inside the checkout from its root."""
    return str(path.relative_to(repo_root())) if path.is_relative_to(repo_root()) else str(path)


def load(name: str, base: str, device: str, sources: list[str]) -> DocToLoRA:
    """Load a hypernetwork and its base, with a sign of life meanwhile.

    Raises what `d2l.documents.read` does for a source that is not there, before anything is loaded.
    """
    for path in (Path(source).expanduser() for source in sources if source != "-"):
        if not path.is_dir():
            documents.read(path)
    with console(stderr=True).status(f"Loading {name}; a base is fetched at its first use"):
        from ..model import DocToLoRA

        return DocToLoRA.from_pretrained(name, base or None, device=device)


def adapter_of(model: DocToLoRA, sources: list[str], strength: float = 1.0) -> Adapter | None:
    """Turn files into one adapter; documents that were read before come from the store."""
    total: Adapter | None = None
    for source in sources:
        one = adapter_from(model, source)
        total = one if total is None else total + one
    return total if total is None or strength == 1.0 else total.scaled(strength)


def refuse_adapters(sources: list[str]) -> None:
    """Raise ValueError for a source that holds no text to cut into sentences."""
    for path in map(Path, sources):
        if path.suffix == ".safetensors" or path.expanduser().is_dir():
            raise ValueError(f"--by-sentence reads texts, but {path} is an adapter")


def sentences_of(model: DocToLoRA, source: str) -> list[str]:
    """Read a file (- for standard input) and cut it into sentences, as `d2l.routing` does."""
    from ..routing import parts_of

    text = sys.stdin.read() if source == "-" else documents.read_text(source)
    return parts_of(model, text)


def sentence_for(question: str, model: DocToLoRA, sentences: list[str]) -> Adapter:
    """Internalise the sentence that suits a question best, by their words; keep nothing."""
    from ..routing import Index

    (best,) = Index(sentences).best(question)
    return model.internalize(sentences[best])


def adapter_from(model: DocToLoRA, source: str) -> Adapter:
    """Read one file, standard input, or an adapter."""
    from ..adapter import Adapter
    from ..export import from_peft
    from ..store import AdapterStore

    path = Path(source).expanduser()
    if source == "-":
        return model.internalize(sys.stdin.read(), title="standard input")
    if path.suffix == ".safetensors":
        return Adapter.load(path, model.base.device)
    if path.is_dir():
        return from_peft(path, model.base)
    return AdapterStore(store_dir()).get_or_internalize(model, path, watch=progress)


def store_dir() -> Path:
    """Return the folder that keeps adapters: `adapters` in the cache."""
    return cache_dir() / "adapters"


def progress(reading: Reading) -> Iterator[int]:
    """Show how far a document has been read while iterating over its reading."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Reading {task.description}"),
        BarColumn(),
        TextColumn("{task.completed} chunks, {task.fields[tok]} tokens"),
        TimeElapsedColumn(),
    )
    say = console(stderr=True)
    with Progress(*columns, console=say, transient=True, disable=not say.is_terminal) as bar:
        task = bar.add_task(reading.title or "", total=reading.total_chunks, tok=0)
        for n_tok in reading:
            bar.update(task, completed=reading.n_chunks, tok=n_tok)
            yield n_tok
