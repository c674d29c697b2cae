"""Read one document, chunk by chunk, into an adapter that can be used while reading goes on.

What a document may be, how it becomes chunks, and how its adapter grows stand here.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapter import Adapter, Source
from .chunking import cut, fewest_chunks, split
from .documents import read
from .lm.chat import blocks_of, chat_affixes, stream_chat
from .lora import ChunkLora, Factors

if TYPE_CHECKING:
    from .model import DocToLoRA

Document = str | Path | Sequence[int] | Tensor | Iterator[str]

STREAMED_CHARS = 1_000_000


class Reading:
    """A document on its way into an adapter.

    Iterating reads on and yields the number of tokens read; `adapter` is what has been read so far.
    ``n_chunks`` and ``n_tok`` count what has been read, ``total_chunks`` what there is (None for a
    stream, whose end nobody knows).  `DocToLoRA.read` makes one.
    """

    def __init__(
        self, model: DocToLoRA, document: Document, title: str | None, chunks_at_once: int | None
    ) -> None:
        if chunks_at_once is not None and chunks_at_once < 1:
            raise ValueError(f"chunks_at_once must be at least 1, got {chunks_at_once}")
        model.refuse_if_merged()
        self.model, self.title = model, title
        self.at_once = chunks_at_once or max(1, model.tok_budget // model.chunk.max_tok)
        self.total_chunks: int | None = None
        self._sha256 = ""
        self._chunks = self._open(document)
        self._tok_of_chunk: list[int] = []
        self._parts: list[ChunkLora] = []
        self._dense: Factors | None = None
        self._made: Adapter | None = None
        targets = model.hypernet.targets
        self._full_rank = max(min(targets.d_in[m], targets.d_out[m]) for m in targets.modules)
        self._warn(self.total_chunks or 0)

    @property
    def n_chunks(self) -> int:
        """Chunks read."""
        return len(self._tok_of_chunk)

    @property
    def n_tok(self) -> int:
        """Tokens read, templates included."""
        return sum(self._tok_of_chunk)

    def __iter__(self) -> Iterator[int]:
        """Read on, ``chunks_at_once`` chunks at a time."""
        while chunks := list(itertools.islice(self._chunks, self.at_once)):
            with torch.no_grad():
                self._parts.append(self.model.encode(chunks))
                if self._rows > self._full_rank:
                    self._fold()
            self._tok_of_chunk += map(len, chunks)
            self._made = None
            if self.total_chunks is None:
                self._warn(self.n_chunks, since=self.n_chunks - len(chunks))
            yield self.n_tok

    def finish(self) -> Adapter:
        """Read to the end and return the adapter."""
        for _ in self:
            pass
        return self.adapter

    @property
    def adapter(self) -> Adapter:
        """The adapter of all chunks read so far; its document's sha256 is final at the end.

        Raises ValueError before the first chunk has been read.
        """
        if not self.n_chunks:
            raise ValueError("nothing has been read yet: iterate over the reading first")
        if self._made is None:
            with torch.no_grad():
                self._made = self._compose()
        return self._made

    @property
    def _rows(self) -> int:
        r = self.model.config.lora.rank
        return sum(p.n_chunks for p in self._parts) * r

    def _compose(self) -> Adapter:
        model = self.model
        where = [(g, k) for g, part in enumerate(self._parts) for k in range(part.n_chunks)]
        if self._dense is None:
            factors = ChunkLora.pick(self._parts, where)
        else:
            factors = _full_rank_factors(self._sum(), self._full_rank, model.base.model.dtype)
        rows = factors.n_chunks * next(iter(factors.A.values())).shape[2]
        source = Source(
            self._sha256,
            self.title or "untitled",
            tuple(self._tok_of_chunk),
            rows,
            folded=self._dense is not None,
        )
        return model.adapter_of(factors, source)

    def _sum(self) -> Factors:
        total = dict(self._dense or {})
        for part in self._parts:
            for m, A in part.A.items():
                W = torch.einsum("clro,clri->loi", part.B[m].float(), A.float())
                total[m] = total[m] + W if m in total else W
        return total

    def _fold(self) -> None:
        """Sum the chunks held into one matrix per linear: nothing is lost, memory stops growing."""
        self._dense, self._parts = self._sum(), []

    def _warn(self, n_chunks: int, since: int = 0) -> None:
        trained = self.model.trained_chunks
        if trained is not None and since <= trained < n_chunks:
            warnings.warn(
                f"the document has more chunks than the {trained} that this hypernetwork was "
                f"trained to compose (chunks of {self.model.chunk.max_tok} tokens): answers may be "
                "wrong",
                UserWarning,
                stacklevel=3,
            )

    def _open(self, document: Document) -> Iterator[list[int]]:
        if isinstance(document, Path):
            self.title = self.title or document.name
            document = text_of(document)
        if isinstance(document, Tensor):
            document = document.tolist()
        if isinstance(document, str):
            if len(document) <= STREAMED_CHARS:
                return self._whole(document)
            document = iter([document])
        if isinstance(document, Iterator):
            return self._stream(document)
        if isinstance(document, Sequence) and all(type(i) is int for i in document):
            return self._ids(document)
        raise ValueError(
            "a document is a text, a pathlib.Path, a list of token ids or an iterator of texts, "
            f"got {type(document).__name__}; internalize_batch takes several documents"
        )

    def _whole(self, text: str) -> Iterator[list[int]]:
        chunks = self.model.chunks(text)
        self._sha256 = sha256_of(text)
        self.title = self.title or title_of(text)
        self.total_chunks = len(chunks)
        return iter(chunks)

    def _ids(self, ids: Sequence[int]) -> Iterator[list[int]]:
        tokenizer, size = self.model.reader.tokenizer, self.model.reader.vocab_size
        bad = [i for i in ids if not 0 <= i < size]
        if bad or not ids:
            raise ValueError(f"token id {bad[0]} is not in 0..{size - 1}" if bad else _EMPTY)
        prefix, suffix = chat_affixes(tokenizer)
        whole = [*prefix, *ids, *suffix]
        self._sha256 = sha256_of(ids)
        self.total_chunks = fewest_chunks(len(whole), self.model.chunk)
        return iter(split(whole, self.total_chunks, prefix, suffix))

    def _stream(self, texts: Iterator[str]) -> Iterator[list[int]]:
        digest = hashlib.sha256()

        def blocks() -> Iterator[str]:
            for block in blocks_of(texts):
                self.title = self.title or title_of(block)
                digest.update(block.encode())
                self._sha256 = digest.hexdigest()
                yield block
            if not self._sha256:
                raise ValueError(_EMPTY)

        tokenizer, config = self.model.reader.tokenizer, self.model.chunk
        ids = stream_chat(tokenizer, blocks())
        for i, chunk in enumerate(cut(ids, config.max_tok, *chat_affixes(tokenizer))):
            if i == 0:
                fewest_chunks(len(chunk), config)
            yield chunk


_EMPTY = "the document is empty: give some text to internalise"


def sha256_of(document: str | Sequence[int] | Iterator[str]) -> str:
    """Hash a document as its `Source` does: the stripped text in UTF-8, or the token ids.

    >>> sha256_of(" Here we go.\\n") == sha256_of(iter(["Here ", "we go."]))
    True
    """
    digest = hashlib.sha256()
    if isinstance(document, str):
        document = iter([document])
    if isinstance(document, Iterator):
        for block in blocks_of(document):
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


def _full_rank_factors(total: Factors, rank: int, dtype: torch.dtype) -> ChunkLora:
    """Write ``W`` (layer, d_out, d_in) as ``B^T A`` with the narrower factor an identity."""
    A, B = {}, {}
    for m, W in total.items():
        d_out, d_in = W.shape[1:]
        eye = torch.eye(min(d_out, d_in), device=W.device).expand(len(W), -1, -1)
        a, b = (W, eye) if d_out <= d_in else (eye, W.mT)
        pad = (0, 0, 0, rank - a.shape[1])
        A[m], B[m] = (torch.nn.functional.pad(t, pad)[None].to(dtype) for t in (a, b))
    return ChunkLora(A, B)
