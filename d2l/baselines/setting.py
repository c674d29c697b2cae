"""What all methods share: the models, the prompt, and answering with meters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..lm.base import LanguageModel, render_chat
from ..lm.hooks import applied, instrument
from ..lora import LoraBatch, route_rows
from ..meter import MIB, Meter, measured
from ..model import DocToLoRA

Result = TypeVar("Result")


@dataclass(frozen=True)
class Setting:
    """Models and protocol of a comparison.

    ``prompt`` holds ``{question}``; in context the document stands before it, a blank line between.
    ``context_tok`` bounds the document in a prompt where a method truncates it; None leaves what
    the window has room for.  ``ask(document, n)`` gives the questions that distillation trains on;
    None lets the base write them.  ``count_memory`` see `d2l.meter.measured`.
    """

    base: LanguageModel
    hypernet: DocToLoRA | None = None
    prompt: str = "{question}"
    max_new_tokens: int = 32
    context_tok: int | None = None
    ask: Callable[[str, int], Sequence[str]] | None = None
    count_memory: bool = False

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ValueError(f"the prompt must hold {{question}}, got {self.prompt!r}")
        instrument(self.base.model)

    def measured(self, work: Callable[[], Result]) -> tuple[Result, Meter]:
        """Do ``work`` under the meters."""
        return measured(work, self.base.device, count_memory=self.count_memory)

    def user_text(self, question: str, context: str = "") -> str:
        """Return the user's turn: the context if there is one, then the prompt."""
        asked = self.prompt.replace("{question}", question)
        return f"{context}\n\n{asked}" if context else asked

    def n_tok(self, text: str) -> int:
        """Count the tokens of a text alone."""
        return len(self.base.tokenizer(text, add_special_tokens=False).input_ids)

    def room_tok(self, question: str) -> int:
        """Return how many tokens of a document fit beside a question; ValueError for none."""
        frame = len(render_chat(self.base.tokenizer, self.user_text(question, "x")))
        room = self.base.window - frame - self.max_new_tokens
        if self.context_tok is not None:
            room = min(room, self.context_tok)
        if room < 1:
            raise ValueError(
                f"the question takes {frame} of {self.base.window} tokens and its answer up to "
                f"{self.max_new_tokens}: no room for a document"
            )
        return room


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    ``context_tok`` of ``document_tok`` tokens stood in the prompt.  The adapter lies in memory
    before generation starts: ``generation.peak_mib`` leaves it out, ``adapter_mib`` says its size.
    """

    text: str
    update: Meter
    generation: Meter
    adapter_mib: float = 0.0
    context_tok: int = 0
    document_tok: int = 0

    @property
    def context_ratio(self) -> float:
        """Share of the document that stood in the prompt."""
        return self.context_tok / max(1, self.document_tok)


Method = Callable[[Setting, str, Sequence[str]], list[Reply]]


@torch.no_grad()
def generate_ids(
    base: LanguageModel, prompt: Sequence[int], loras: LoraBatch | None, max_new_tokens: int
) -> list[int]:
    """Generate greedily from templated ids, alone in its batch; return the new ids."""
    tokenizer = base.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([list(prompt)], device=base.device)
    with applied(base.model, None if loras is None else route_rows(loras, [0])):
        out = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return out[0, len(prompt) :].tolist()


def reply_to(
    setting: Setting,
    document: str,
    question: str,
    update: Meter,
    *,
    context: str = "",
    loras: LoraBatch | None = None,
) -> Reply:
    """Answer one question with ``context`` in the prompt and ``loras`` applied, metered."""
    base = setting.base
    prompt = render_chat(base.tokenizer, setting.user_text(question, context))
    new, generation = setting.measured(
        lambda: generate_ids(base, prompt, loras, setting.max_new_tokens)
    )
    return Reply(
        base.tokenizer.decode(new, skip_special_tokens=True),
        update,
        generation,
        adapter_mib=0.0 if loras is None else loras.nbytes / MIB,
        context_tok=setting.n_tok(context) if context else 0,
        document_tok=setting.n_tok(document),
    )
