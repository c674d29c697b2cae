"""Methods that read the document into an adapter in one pass, or bring one along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..lora import ChunkLora, LoraBatch
from ..model import DocToLoRA
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


@torch.no_grad()
def _internalize(model: DocToLoRA, document: str, *, at_once: bool) -> LoraBatch:
    chunks = model.chunks(document)
    if at_once:
        budget, model.tok_budget = model.tok_budget, sum(map(len, chunks))
        try:
            factors = model.encode(chunks)
        finally:
            model.tok_budget = budget
    else:
        parts = [model.encode([chunk]) for chunk in chunks]
        factors = ChunkLora.pick(parts, [(i, 0) for i in range(len(parts))])
    loras = model.hypernet.compose(factors, [len(chunks)])
    return loras.map(lambda t: t.to(model.base.model.dtype))


def _hypernet(setting: Setting) -> DocToLoRA:
    if setting.hypernet is None:
        raise ValueError("this method needs a hypernetwork: give one to the setting")
    if setting.hypernet.base is not setting.base:
        raise ValueError("the setting's hypernetwork was made for another base than the setting's")
    return setting.hypernet
