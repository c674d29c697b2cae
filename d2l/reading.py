"""Read one document, chunk by chunk, into an adapter that can be used while reading goes on.

What a document may be, how it becomes chunks, and how its adapter grows stand here.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, Source
from .chunking import cut, fewest_chunks
from .documents import read
from .lm.chat import blocks_of, chat_affixes, stream_chat
from .lora import ChunkLora, Factors
from .ridge import sum_apart

if TYPE_CHECKING:
    from .model import DocToLoRA

Document = str | Path | Sequence[int] | Tensor | Iterator[str]

EMPTY = "the document is empty: give some text to internalise"
STREAMED_CHARS = 1_000_000


class Reading:
    """A document on its way into an adapter; `DocToLoRA.read` makes one.

    Iterating reads on and yields the number of tokens read; `adapter` is what has been read so far.
    ``n_chunks`` counts the chunks read, ``total_chunks`` what there is (None for a stream); where
    sentences are read apart (`d2l.config.ChunkConfig`) they are what is counted.
    """

    def __init__(
        self, model: DocToLoRA, document: Document, title: str | None, chunks_at_once: int | None
    ) -> None:
        self.model, self.title = model, title
        self.at_once = chunks_at_once or max(1, model.tok_budget // model.chunk.max_tok)
        self.total_chunks: int | None = None
        self._sha256 = ""
        self._chunks = self._open(document)
        self._tok: list[int] = []
        self._parts: list[ChunkLora] = []
        self._dense: Factors = {}
        self._grams: Factors = {}
        targets = model.hypernet.targets
        self._full_rank = max(min(targets.d_in[m], targets.d_out[m]) for m in targets.modules)
        self._warn(0, self.total_chunks or 0)

    @property
    def n_chunks(self) -> int:
        """Chunks read."""
        return len(self._tok)

    def __iter__(self) -> Iterator[int]:
        while chunks := list(itertools.islice(self._chunks, self.at_once)):
            sizes = [len(s) for chunk in chunks for s in self.model.sentences(chunk)]
            with torch.no_grad():
                self._parts.append(self.model.encode(chunks))
                held = sum(p.n_chunks for p in self._parts)
                if held * self.model.config.lora.rank > self._full_rank:
                    self._dense, self._grams = self._sum()
                    self._parts = []
            self._tok += sizes
            if self.total_chunks is None:
                self._warn(self.n_chunks - len(sizes), self.n_chunks)
            yield sum(self._tok)

    def finish(self) -> Adapter:
        """Read to the end and return the adapter."""
        for _ in self:
            pass
        return self.adapter

    @property
    def adapter(self) -> Adapter:
        """The adapter of all chunks read so far, made anew at every access.

        Raises ValueError before the first chunk has been read.
        """
        if not self._tok:
            raise ValueError("nothing has been read yet: iterate over the reading first")
        with torch.no_grad():
            n_rows = self.n_chunks * self.model.config.lora.rank
            if self._dense:
                total, grams = self._sum()
                for m, penalty in self.model.hypernet.penalties.items():
                    total[m] = sum_apart(total[m], grams[m], penalty, n_rows)
                factors = _full_rank_factors(total, self._full_rank)
                factors = factors.map(lambda t: t.to(self.model.base.model.dtype))
            else:
                if len(self._parts) > 1:  # held once, not here and there
                    at = [(g, k) for g, p in enumerate(self._parts) for k in range(p.n_chunks)]
                    self._parts = [ChunkLora.pick(self._parts, at)]
                (factors,) = self._parts
            rows = self._full_rank if self._dense else n_rows
            title, folded = self.title or "untitled", bool(self._dense)
            source = Source(self._sha256, title, tuple(self._tok), rows, folded=folded)
            return self.model.adapter_of(factors, source)

    def _sum(self) -> tuple[Factors, Factors]:
        """Sum all chunks into one matrix per linear: nothing is lost, and memory stops growing.

        To set rows apart (`ridge.sum_apart`) the sum of ``A^T A`` is needed, too.
        """
        total, grams = dict(self._dense), dict(self._grams)
        for part in self._parts:
            for m, t in part.A.items():
                A, B = t.float(), part.B[m].float()
                total[m] = total.get(m, 0) + torch.einsum("clro,clri->loi", B, A)
                if self.model.config.ridge:
                    grams[m] = grams.get(m, 0) + torch.einsum("clro,clri->loi", A, A)
        return total, grams

    def _warn(self, before: int, now: int) -> None:
        trained = self.model.trained_chunks
        if trained is not None and before <= trained < now:
            config = self.model.chunk
            what = "sentences" if config.sentences else f"chunks of {config.max_tok} tokens"
            warnings.warn(
                f"the document has more than the {trained} {what} "
                "that this hypernetwork was trained to compose: answers may be wrong",
                UserWarning,
                stacklevel=3,
            )

    def _open(self, document: Any) -> Iterator[list[int]]:
        if isinstance(document, Path):
            self.title = self.title or document.name
            document = text_of(document)
        if isinstance(document, Tensor):
            document = document.tolist()
        if isinstance(document, str) and len(document) <= STREAMED_CHARS:
            chunks = self.model.chunks(document)
            self.title = self.title or title_of(document)
        elif isinstance(document, str | Iterator):
            return self._stream(iter([document]) if isinstance(document, str) else document)
        elif isinstance(document, list | tuple) and all(type(i) is int for i in document):
            chunks = self._chunks_of_ids(document)
        else:
            raise ValueError(
                "a document is a text, a pathlib.Path, a list of token ids or an iterator of "
                f"texts, not a {type(document).__name__}; internalize_batch takes several documents"
            )
        self._sha256 = sha256_of(document)
        self.total_chunks = sum(len(self.model.sentences(chunk)) for chunk in chunks)
        return iter(chunks)

    def _chunks_of_ids(self, ids: Sequence[int]) -> list[list[int]]:
        size = self.model.reader.vocab_size
        bad = [i for i in ids if not 0 <= i < size]
        if bad or not ids:
            raise ValueError(f"token id {bad[0]} is not in 0..{size - 1}" if bad else EMPTY)
        prefix, suffix = chat_affixes(self.model.reader.tokenizer)
        return self.model.cut_whole([*prefix, *ids, *suffix])

    def _stream(self, texts: Iterator[str]) -> Iterator[list[int]]:
        digest = hashlib.sha256()

        def blocks() -> Iterator[str]:
            for block in blocks_of(texts):
                self.title = self.title or title_of(block)
                digest.update(block.encode())
                self._sha256 = digest.hexdigest()
                yield block
            if not self._sha256:
                raise ValueError(EMPTY)

        tokenizer, config = self.model.reader.tokenizer, self.model.chunk
        ids = stream_chat(tokenizer, blocks())
        affixes, ends = chat_affixes(tokenizer), self.model.ends
        for i, chunk in enumerate(cut(ids, config.max_tok, *affixes, ends)):
            if i == 0:
                fewest_chunks(len(chunk), config)
            yield chunk


def sha256_of(document: str | Sequence[int] | Iterator[str]) -> str:
    """Hash a document as its `Source` does: the stripped text in UTF-8, or the token ids.

    >>> sha256_of(" Here we go.\\n") == sha256_of(iter(["Here ", "we go."]))
    True
    """
    digest = hashlib.sha256()
    if isinstance(document, str | Iterator):
        for block in blocks_of([document] if isinstance(document, str) else document):
            digest.update(block.encode())
    else:
        digest.update(f"ids {list(document)}".encode())
    return digest.hexdigest()


def title_of(text: str) -> str:
    """Name a text by its first line, cut to 60 characters."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 60 else line[:59] + "…"


def text_of(path: Path) -> str | Iterator[str]:
    """Return a file's text, in pieces where the file is large; raises as `d2l.documents.read`."""
    pieces = read(path)
    return pieces if path.stat().st_size > STREAMED_CHARS else "".join(pieces)


def _full_rank_factors(total: Factors, rank: int) -> ChunkLora:
    """Write ``W`` (layer, d_out, d_in) as ``B^T A`` with an identity for the narrower factor."""
    A, B = {}, {}
    for m, W in total.items():
        eye = torch.eye(min(W.shape[1:]), device=W.device).expand(len(W), -1, -1)
        a, b = (W, eye) if W.shape[1] <= W.shape[2] else (eye, W.mT)
        A[m], B[m] = (F.pad(t, (0, 0, 0, rank - t.shape[1]))[None] for t in (a, b))
    return ChunkLora(A, B)
