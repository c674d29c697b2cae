"""Methods that read the document into an adapter in one pass, or bring one along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..lm.base import render_chat
from ..lora import ChunkLora, LoraBatch
from ..meter import MIB, Meter
from ..model import DocToLoRA
from ..reading import EMPTY
from ..routing import PART_TOK, Routed
from .prompted import cut_middle
from .setting import Method, Reply, Setting, reply_to


def d2l_batched(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Internalise the document, all its chunks at once (paper section 3.3)."""
    model = _hypernet(setting)
    loras, update = setting.measured(lambda: _internalize(model, document, at_once=True))
    return [reply_to(setting, document, q, update, loras=loras) for q in questions]


def d2l_iterative(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Internalise the document one chunk after another: slower, and memory does not grow.

    The published code iterates over layers instead; here layers are always read one by one.
    """
    model = _hypernet(setting)
    loras, update = setting.measured(lambda: _internalize(model, document, at_once=False))
    return [reply_to(setting, document, q, update, loras=loras) for q in questions]


def d2l_with_truncated_context(
    setting: Setting, document: str, questions: Sequence[str]
) -> list[Reply]:
    """Internalise the document and put what fits of it into the prompt as well."""
    model = _hypernet(setting)
    loras, update = setting.measured(lambda: _internalize(model, document, at_once=True))
    replies = []
    for question in questions:
        context = cut_middle(setting.base, document, setting.room_tok(question))
        replies.append(reply_to(setting, document, question, update, context=context, loras=loras))
    return replies


def d2l_routed(part_tok: int = PART_TOK, of: Mapping[str, str] | None = None) -> Method:
    """Return the method that internalises sentences apart and asks the part BM25 ranks first.

    As `d2l.routing` does.  ``of`` gives the document that is read in place of each.  The update is
    reading all parts and their index; ``adapter_mib`` counts them all.  The search, a millisecond,
    is not timed.
    """

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        model, base = _hypernet(setting), setting.base
        read = document if of is None else of[document]
        parts, update = setting.measured(lambda: Routed.read(model, read, part_tok=part_tok))
        replies = []
        for question in questions:
            loras = parts.adapter_for(question).batch(base.device, base.model.dtype)
            reply = reply_to(setting, document, question, update, loras=loras)
            replies.append(dataclasses.replace(reply, adapter_mib=parts.nbytes / MIB))
        return replies

    return method


def d2l_swapped(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Internalise the question instead, and put the document alone into the prompt (table 3)."""
    model = _hypernet(setting)
    replies = []
    for question in questions:
        asked = setting.user_text(question)
        loras, update = setting.measured(lambda: _internalize(model, asked, at_once=True))  # noqa: B023
        replies.append(_read_silently(setting, document, update, loras))
    return replies


def document_alone(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Put the document into the prompt and ask nothing: the floor of `d2l_swapped`."""
    return [_read_silently(setting, document, Meter(), None) for _ in questions]


def peft_adapter(folder: str | Path) -> Method:
    """Return the method that answers with a PEFT LoRA that somebody made, whatever the document.

    The update is reading the folder.  Raises what `d2l.export.from_peft` raises, when called.
    """

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        from ..export import from_peft

        base = setting.base
        loras, update = setting.measured(
            lambda: from_peft(folder, base).batch(base.device, base.model.dtype)
        )
        return [reply_to(setting, document, q, update, loras=loras) for q in questions]

    return method


def _read_silently(
    setting: Setting, document: str, update: Meter, loras: LoraBatch | None
) -> Reply:
    silent = dataclasses.replace(setting, prompt="{question}")
    reply = reply_to(silent, document, document, update, loras=loras)
    return dataclasses.replace(reply, context_tok=reply.document_tok)


@torch.no_grad()
def _internalize(model: DocToLoRA, document: str, *, at_once: bool) -> LoraBatch:
    """Read a text; one that is too short for a chunk, as a question may be, is read as it is."""
    if not document.strip():
        raise ValueError(EMPTY)
    ids = render_chat(model.reader.tokenizer, document.strip())
    chunks = [ids] if len(ids) < model.chunk.min_tok else model.cut_whole(ids)
    if at_once:
        budget, model.tok_budget = model.tok_budget, sum(map(len, chunks))
        try:
            factors = model.encode(chunks)
        finally:
            model.tok_budget = budget
    else:
        parts = [model.encode([chunk]) for chunk in chunks]
        where = [(i, k) for i, part in enumerate(parts) for k in range(part.n_chunks)]
        factors = ChunkLora.pick(parts, where)
    loras = model.hypernet.compose(factors, [factors.n_chunks])
    return loras.map(lambda t: t.to(model.base.model.dtype))


def _hypernet(setting: Setting) -> DocToLoRA:
    if setting.hypernet is None:
        raise ValueError("this method needs a hypernetwork: give one to the setting")
    if setting.hypernet.base is not setting.base:
        raise ValueError("the setting's hypernetwork was made for another base than the setting's")
    return setting.hypernet
