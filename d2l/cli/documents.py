"""Commands for documents of one's own: internalize, ask, export, import, info."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from ..home import cache_dir
from . import common
from .common import (
    DEFAULT_MODEL,
    AsJson,
    Base,
    BySentence,
    Device,
    ModelName,
    Sources,
    Strength,
    console,
)

if TYPE_CHECKING:
    from ..adapter import Adapter

PANEL = "Documents"
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def internalize(
    documents: Sources,
    model: ModelName = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option(help="Adapter file; default: the cache.")] = None,
    base: Base = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Read documents into one adapter and keep it; each document is read only once."""
    if out is not None and out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {str(out)!r}")
    loaded = common.load(model, base, device, documents)
    began = time.perf_counter()
    adapter = common.adapter_of(loaded, documents)
    seconds = time.perf_counter() - began
    if adapter is None:
        raise ValueError("give at least one document")
    if out is not None:
        adapter.save(out)
    about = _about(adapter) | {"seconds": round(seconds, 3), "file": out or common.store_dir()}
    if as_json:
        common.print_json(about)
        return
    _show(about)
    again = out or " ".join(documents)
    console().print(f'Ask it: d2l ask {escape(str(again))} "..."', soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def ask(
    documents: Sources = [],  # noqa: B006
    question: Annotated[str, typer.Argument(help="What you want to know.")] = cast(str, ...),
    model: ModelName = DEFAULT_MODEL,
    strength: Strength = 1.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also ask the base, and with the text in its prompt.")
    ] = False,
    by_sentence: BySentence = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    base: Base = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a question about documents; without a document, let the base answer."""
    if not question.strip() or Path(question).is_file():
        raise ValueError(f"a question is wanted last, got {question!r}")
    if compare and len(documents) != 1:
        raise ValueError(f"--compare takes one document, got {len(documents)}")
    if by_sentence and not documents:
        raise ValueError("--by-sentence takes a document at least")
    if by_sentence:
        common.refuse_adapters(documents)
    loaded = common.load(model, base, device, documents)
    if by_sentence:
        sentences = [s for d in documents for s in common.sentences_of(loaded, d)]
        adapter = common.sentence_for(question, loaded, sentences).scaled(strength)
    else:
        adapter = common.adapter_of(loaded, documents, strength)
    if compare and adapter is not None:
        from ..compare import compare as compared
        from ..documents import read_text

        text = read_text(documents[0])
        options = {"max_new_tokens": max_new_tokens}
        answers = list(compared(loaded, question, adapter, text, **options))
        if as_json:
            common.print_json([dataclasses.asdict(a) for a in answers])
            return
        table = Table("", "answer", "first token", "memory")
        for a in answers:
            table.add_row(a.name, escape(a.text), f"{a.first_token_s:.2f} s", f"{a.mib:.1f} MiB")
        console().print(table)
    elif as_json:
        answer = loaded.ask(question, adapter, max_new_tokens=max_new_tokens)
        about = {"question": question, "answer": answer}
        common.print_json(about | (_about(adapter) if adapter else {"documents": []}))
    else:
        for piece in loaded.stream(question, adapter, max_new_tokens=max_new_tokens):
            print(piece, end="", flush=True)
        print()


@app.command(rich_help_panel=PANEL)
def export(
    documents: Sources,
    folder: Annotated[Path, typer.Argument(help="Folder for the PEFT adapter.")],
    model: ModelName = DEFAULT_MODEL,
    rank: Annotated[int | None, typer.Option(min=1, help="Reduce to this rank, by SVD.")] = None,
    strength: Strength = 1.0,
    base: Base = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write documents as a PEFT adapter, which peft, vLLM and others load."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    if not documents:
        raise ValueError("give a document or an adapter to export, then the folder")
    adapter = common.adapter_of(common.load(model, base, device, documents), documents, strength)
    assert adapter is not None
    done = adapter.to_peft(folder, rank)
    if as_json:
        common.print_json(dataclasses.asdict(done))
        return
    lost = f", {done.error:.2%} of the update lost" if done.error else ", nothing lost"
    console().print(f"{escape(str(folder))}: rank {done.rank}{lost}", soft_wrap=True)


@app.command(name="import", rich_help_panel=PANEL)
def import_(
    source: Annotated[str, typer.Argument(help="A pytorch_model.bin, its folder, or a hub name.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: in the cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a published checkpoint into a folder of ours; nothing in its pickle is run."""
    with console(stderr=True).status(f"Reading {source}"):
        from ..pretrained import find

        found = find(source)
        if isinstance(found, Path):
            raise ValueError(f"{found} is in our format already; use it with --model {found}")
        name = source.strip("/").removesuffix("/pytorch_model.bin").rsplit("/", 1)[-1]
        folder = out or cache_dir() / "models" / name.removesuffix(".bin")
        found.save(folder)
    if as_json:
        common.print_json({"folder": folder, "base": found.base_name})
        return
    console().print(f"Written to {escape(str(folder))}, made for base {found.base_name}")
    console().print(f'Use it: d2l ask --model {escape(str(folder))} FILE "..."', soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def info(
    what: Annotated[
        str, typer.Argument(help="An adapter file or a checkpoint; empty: the kept adapters.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Describe an adapter, a checkpoint, or every adapter that is kept."""
    from ..adapter import Adapter

    if not what:
        files = sorted(common.store_dir().glob("*/*.safetensors"))
        found: Any = [{"file": f, **_about(Adapter.load(f))} for f in files]
    elif what.endswith(".safetensors") and Path(what).name != "model.safetensors":
        found = _about(Adapter.load(what))
    else:
        found = _about_checkpoint(what)
    if as_json:
        common.print_json(found)
    elif isinstance(found, list):
        table = Table("document", "tokens", "chunks", "MiB", "base", "file")
        for row in found:
            (d,) = row["documents"]
            cells = (d["title"], d["tokens"], d["chunks"], row["mib"], row["base"], row["file"])
            table.add_row(*(escape(str(cell)) for cell in cells))
        console().print(table if found else f"No adapters in {common.store_dir()} yet.")
    else:
        _show(found)


def _about(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter in plain values."""
    return {
        "documents": [
            {
                "title": s.title,
                "sha256": s.sha256,
                "tokens": sum(s.chunk_tok),
                "chunks": len(s.chunk_tok),
                "weight": s.weight,
            }
            for s in adapter.sources
        ],
        "strength": adapter.strength,
        "rank": adapter.rank,
        "mib": round(adapter.nbytes / 2**20, 2),
        "base": adapter.base_name,
        "hypernetwork": adapter.hypernet_id[:12],
    }


def _about_checkpoint(name: str) -> dict[str, Any]:
    from ..checkpoint import load_hypernet
    from ..pretrained import find

    found = find(name)
    saved = load_hypernet(found) if isinstance(found, Path) else found
    lora, targets = saved.config.lora, saved.hypernet.targets
    n_params = sum(p.numel() for p in saved.hypernet.parameters())
    return {
        "checkpoint": found if isinstance(found, Path) else name,
        "base": saved.base_name,
        "base_fingerprint": saved.base_fingerprint,
        "parameters_million": round(n_params / 1e6, 2),
        "encoder": saved.config.encoder.kind,
        "writes": f"{', '.join(targets.modules)} of {len(targets.layers)} layers",
        "rank_per_chunk": lora.rank,
        "chunk_tokens": saved.chunk.max_tok,
    }


def _show(about: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for d in about.get("documents", ()):
        weight = "" if d["weight"] == 1 else f", weight {d['weight']:g}"
        counts = f"{d['tokens']} tokens in {d['chunks']} chunks{weight}"
        table.add_row("document", f"[bold]{escape(d['title'])}[/]: {counts}")
    for key, value in about.items():
        if key != "documents" and value is not None:
            table.add_row(key.replace("_", " "), escape(str(value)))
    console().print(table)
