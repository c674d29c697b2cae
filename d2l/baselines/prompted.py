"""Methods that put text into the prompt: all of the document, or what they choose of it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ..lm.base import LanguageModel
from ..meter import Meter
from ..routing import Index, sentence_chunks
from .setting import Method, Reply, Setting, reply_to

LLMLINGUA2 = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


def without_context(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Let the base answer from what it knows: the floor."""
    return [reply_to(setting, document, q, Meter()) for q in questions]


def in_context(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Put the whole document into the prompt, past the window too."""
    return [reply_to(setting, document, q, Meter(), context=document) for q in questions]


def truncated_context(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
    """Put into the prompt what fits beside the question, the middle of the document cut out."""
    replies = []
    for question in questions:
        room = setting.room_tok(question)
        context, update = setting.measured(lambda: cut_middle(setting.base, document, room))  # noqa: B023
        replies.append(reply_to(setting, document, question, update, context=context))
    return replies


def compressed(
    rate: float, by: Literal["selective_context", "llmlingua2"] = "selective_context"
) -> Method:
    """Return the method that keeps about ``rate`` of the document's tokens.

    ``selective_context`` (Li et al. 2023) keeps the words that surprise the base most;
    ``llmlingua2`` (Pan et al. 2024) asks its classifier, whose package and model it needs.

    Raises ValueError unless 0 < rate <= 1; ImportError or OSError where LLMLingua-2 is not there.
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate is the share of tokens that is kept, in (0, 1], got {rate}")

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        if by == "llmlingua2":
            _llmlingua2(str(setting.base.device))
        context, update = setting.measured(
            lambda: (
                select_surprising(setting.base, document, rate)
                if by == "selective_context"
                else _llmlingua2(str(setting.base.device))(document, rate)
            )
        )
        return [reply_to(setting, document, q, update, context=context) for q in questions]

    return method


def retrieved(chunk_tok: int = 128) -> Method:
    """Return the method that puts the chunk which BM25 ranks first into the prompt.

    Chunks are whole sentences, up to ``chunk_tok`` tokens together (a longer sentence stands
    alone).  The update of each question is the index and the search.
    """
    if chunk_tok < 1:
        raise ValueError(f"chunk_tok must be at least 1, got {chunk_tok}")

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        replies = []
        for question in questions:
            context, update = setting.measured(
                lambda: best_chunk(setting.base, document, question, chunk_tok)  # noqa: B023
            )
            replies.append(reply_to(setting, document, question, update, context=context))
        return replies

    return method


def cut_middle(base: LanguageModel, document: str, limit_tok: int) -> str:
    """Return the document with its middle cut out, so that at most ``limit_tok`` tokens are left.

    >>> from d2l.lm.base import load_base
    >>> cut_middle(load_base("tiny"), "The grass is green. The sky is blue.", 4)
    'The grass blue.'
    """
    ids = base.tokenizer(document, add_special_tokens=False).input_ids
    if len(ids) <= limit_tok:
        return document
    head = limit_tok - limit_tok // 2
    ends = [ids[:head], ids[len(ids) - limit_tok // 2 :]]
    head_text, tail_text = (base.tokenizer.decode(part) for part in ends)
    return f"{head_text} {tail_text}" if not tail_text[:1].isspace() else head_text + tail_text


def select_surprising(base: LanguageModel, document: str, rate: float) -> str:
    """Keep the words with the greatest surprisal until ``rate`` of the tokens is reached.

    A word's surprisal is the sum of ``-log2 p(token | tokens before it)`` over its tokens, under
    the base; the first token has none before it and counts as ``log2 |vocab|``.  Words keep their
    order, and at least one is kept.  Documents beyond the window are read a window at a time.
    """
    encoded = base.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    bits = _surprisal_bits(base, encoded.input_ids)
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", document)]
    total, n_tok = [0.0] * len(words), [0] * len(words)
    word = 0
    for (start, end), b in zip(encoded.offset_mapping, bits, strict=True):
        while word < len(words) - 1 and start >= words[word][1]:
            word += 1
        if end > words[word][0]:
            total[word] += b
            n_tok[word] += 1
    budget = rate * sum(n_tok)
    kept: list[int] = []
    for i in sorted(range(len(words)), key=lambda i: -total[i]):
        if kept and n_tok[i] > budget:
            continue
        kept.append(i)
        budget -= n_tok[i]
    return " ".join(document[slice(*words[i])] for i in sorted(kept))


@torch.no_grad()
def _surprisal_bits(base: LanguageModel, ids: Sequence[int]) -> list[float]:
    vocab = base.model.config.get_text_config().vocab_size
    bits = [math.log2(vocab)]
    step = base.window - 1
    for start in range(0, len(ids) - 1, step):
        part = torch.tensor([ids[start : start + step + 1]], device=base.device)
        logits = base.model(input_ids=part, use_cache=False).logits[0, :-1].float()
        nats = F.cross_entropy(logits, part[0, 1:], reduction="none")
        bits += (nats / math.log(2)).tolist()
    return bits


def best_chunk(base: LanguageModel, document: str, question: str, chunk_tok: int) -> str:
    """Return the chunk of whole sentences that BM25 ranks first for a question."""
    chunks = sentence_chunks(base, document, chunk_tok)
    return chunks[Index(chunks).best(question)[0]]


@functools.cache
def _llmlingua2(device: str) -> Any:
    """Load LLMLingua-2 and return ``compress(document, rate)``."""
    try:
        from llmlingua import PromptCompressor  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "LLMLingua-2 needs its package: pip install 'd2l-core[compress]', or compress by "
            "selective_context"
        ) from error
    try:
        compressor = PromptCompressor(LLMLINGUA2, use_llmlingua2=True, device_map=device)
    except OSError as error:
        raise OSError(
            f"the model {LLMLINGUA2} of LLMLingua-2 cannot be fetched ({error}); compress by "
            "selective_context instead"
        ) from error

    def compress(document: str, rate: float) -> str:
        out = compressor.compress_prompt([document], rate=rate, force_tokens=["\n", "?"])
        return out["compressed_prompt"]

    return compress
