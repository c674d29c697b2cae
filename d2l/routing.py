"""A document read in parts, of which a question wakes the ones that share its words.

Of a real paragraph one adapter answers less than that of the sentence which is asked about (LOG.md,
which also says where it is no better).  Here each part has an adapter of its own, and BM25 picks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .adapter import Adapter
from .lm.base import LanguageModel, render_chat
from .model import DocToLoRA

PART_TOK = 16
"""Tokens that sentences are packed to, template left out: most sentences are parts of their own."""
_QUIET: dict[str, Any] = {"show_progress": False, "stopwords": None}


class Routed:
    """The adapters of a document's parts, and an index of the words of each.

    The text is kept for the index alone and never stands in a prompt:
    ``model.ask(question, routed.adapter_for(question))``.
    """

    def __init__(self, adapters: Sequence[Adapter], parts: Sequence[str]) -> None:
        """Keep an adapter for each part; ValueError unless there are as many, one at least."""
        if not parts or len(adapters) != len(parts):
            raise ValueError(f"{len(parts)} parts need as many adapters, not {len(adapters)}")
        self.adapters, self.parts = tuple(adapters), tuple(parts)
        self._index = Index(parts)

    @classmethod
    def read(cls, model: DocToLoRA, document: str, *, part_tok: int = PART_TOK) -> Routed:
        """Internalise a text in parts, as `parts_of` cuts it; all are held in memory.

        Raises what `parts_of` and `DocToLoRA.internalize_batch` raise.
        """
        parts = parts_of(model, document, part_tok)
        return cls(model.internalize_batch(parts), parts)

    def adapter_for(self, question: str, k: int = 1) -> Adapter:
        """Return the adapter of the part that suits a question best, of the ``k`` best together.

        More than one asks for a hypernetwork that was trained to compose (`trained_chunks`).
        Raises ValueError for ``k`` below 1.
        """
        return _sum([self.adapters[i] for i in self._index.best(question, k)])

    def save(self, path: str | Path) -> Path:
        """Write one adapter file whose documents are the parts, the text of each its title.

        Raises ValueError where a part holds several documents, and what `Adapter.save` raises.
        """
        if any(len(a.sources) != 1 for a in self.adapters):
            raise ValueError("a part's adapter must hold one document to be saved")
        pairs = zip(self.adapters, self.parts, strict=True)
        named = [replace(a, sources=(replace(a.sources[0], title=t),)) for a, t in pairs]
        return _sum(named).save(path)

    @staticmethod
    def load(path: str | Path, device: Any = "cpu") -> Routed:
        """Read what `save` wrote, or any adapter file: documents are then found by their titles.

        Raises what `Adapter.load` raises.
        """
        adapter = Adapter.load(path, device)
        return Routed(adapter.split(), [source.title for source in adapter.sources])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts' factors."""
        return sum(a.nbytes for a in self.adapters)


def _sum(adapters: Sequence[Adapter]) -> Adapter:
    """Add adapters up in pairs: each is copied as often as their number has binary digits."""
    half = len(adapters) // 2
    return _sum(adapters[:half]) + _sum(adapters[half:]) if half else adapters[0]


def parts_of(model: DocToLoRA, document: str, part_tok: int = PART_TOK) -> list[str]:
    """Cut a text into parts of whole sentences, up to ``part_tok`` tokens each, equal ones once.

    A sentence that is longer is a part of its own; a part too short for a chunk joins the next one,
    the last the one before.  Raises ValueError for an empty text and ``part_tok`` below 1.
    """
    if not document.strip():
        raise ValueError("the document is empty")
    parts: list[str] = []
    for part in sentence_chunks(model.base, document, part_tok):
        if parts and _too_short(model, parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    if len(parts) > 1 and _too_short(model, parts[-1]):
        parts[-2:] = [" ".join(parts[-2:])]
    return list(dict.fromkeys(parts))


def _too_short(model: DocToLoRA, part: str) -> bool:
    return len(render_chat(model.base.tokenizer, part)) < model.chunk.min_tok


class Index:
    """BM25 over texts, by their words of two letters or more, function words among them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.n, self._bm25 = len(texts), None
        if len(texts) > 1:
            # bm25s starts JAX where that is installed, which would take 3/4 of a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            import bm25s

            words: Any = bm25s.tokenize(list(texts), **_QUIET)
            if words.vocab:
                self._bm25 = bm25s.BM25()
                self._bm25.index(words, show_progress=False)

    def best(self, question: str, k: int = 1) -> list[int]:
        """Return the positions of the ``k`` best texts, in their order; of equals the first.

        Raises ValueError for ``k`` below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        k = min(k, self.n)
        if self._bm25 is None:
            return list(range(k))
        import bm25s

        words: Any = bm25s.tokenize([question], return_ids=False, **_QUIET)
        scores = self._bm25.get_scores(words[0]) if words[0] else np.zeros(self.n)
        return sorted(np.argsort(-scores, kind="stable")[:k].tolist())


def sentence_chunks(base: LanguageModel, document: str, chunk_tok: int) -> list[str]:
    """Pack whole sentences into chunks of up to ``chunk_tok`` tokens; a longer one stands alone.

    A sentence ends with ``.``, ``!`` or ``?`` before white space (initials and ``Dr.`` too), or a
    line.

    Raises ValueError for ``chunk_tok`` below 1.

    >>> from d2l.lm.base import load_base
    >>> sentence_chunks(load_base("tiny"), "Here we go. There and back again. Here we go.", 10)
    ['Here we go. There and back again.', 'Here we go.']
    """
    if chunk_tok < 1:
        raise ValueError(f"a part needs at least 1 token, not {chunk_tok}")
    chunks: list[str] = []
    held = 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", document.strip()):
        n = len(base.tokenizer(sentence, add_special_tokens=False).input_ids)
        if chunks and held + n <= chunk_tok:
            chunks[-1] += f" {sentence}"
            held += n
        else:
            chunks.append(sentence)
            held = n
    return chunks
