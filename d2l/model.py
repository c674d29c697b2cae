"""`DocToLoRA`: a frozen base, an encoder and a hypernetwork behind a few calls.

`read` and `internalize` turn documents into adapters; `generate`, `ask` and `stream` answer with
them.  Adapters travel with the call: nothing about a document stays in the model.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from d2l_kernels import Segments
from torch import Tensor

from .adapter import Adapter, Source
from .chunking import Ends, cut, ends_of, fewest_chunks, group_by_length, split, unique
from .config import ChunkConfig, HypernetConfig
from .hypernet import Hypernet, TargetShapes
from .lm.base import LanguageModel, chat_affixes, render_chat
from .lm.encoder import ContextEncoder
from .lm.hooks import applied, instrument, is_merged, sites_of
from .lm.rows import alike
from .lm.stream import stream_text
from .lora import ChunkLora, Delta, LoraBatch, route_rows
from .reading import EMPTY, Document, Reading, sha256_of, title_of

Prompt = str | Sequence[int]
Adapters = Adapter | Sequence[Adapter | None] | None

_READ_PER_RUN = 4
"""Tokens of a group that the Perceiver may read for each that the encoder runs, chunks alike."""


def target_shapes(base: LanguageModel, config: HypernetConfig) -> TargetShapes:
    """Find the linears of ``base`` that ``config`` adapts.

    Raises ValueError for a module or a layer that the base does not have.
    """
    sites = sites_of(base.model)
    n_layers = 1 + max(s.layer for s in sites)
    chosen = tuple(range(n_layers)) if config.lora.layers is None else config.lora.layers
    if not chosen or min(chosen) < 0 or max(chosen) >= n_layers:
        raise ValueError(f"lora.layers {chosen} do not fit a base of {n_layers} layers")
    d_in: dict[str, int] = {}
    d_out: dict[str, int] = {}
    for index in chosen:
        linears = {s.module: s for s in sites if s.layer == index}
        for module in config.lora.target_modules:
            if module not in linears:
                raise ValueError(
                    f"layer {index} of {base.name!r} has no linear {module!r}; "
                    f"it has {', '.join(sorted(linears))}"
                )
            d_in[module] = max(linears[module].d_in, d_in.get(module, 0))
            d_out[module] = max(linears[module].d_out, d_out.get(module, 0))
    return TargetShapes(chosen, d_in, d_out)


class DocToLoRA:
    """Internalise documents into LoRA adapters of a frozen language model.

    ``encoder_base`` is another frozen model to read with; by default the base reads for itself.
    ``tok_budget`` bounds the tokens encoded at once, and with it the memory of reading; of chunks
    that begin alike up to 4 times as many are read from what is encoded.
    ``trained_chunks`` is the most chunks (sentences, where these are read apart) that the
    hypernetwork was trained to compose, None where that is unknown; more are warned about.

    Any number of threads may use one model: an adapter acts inside the call that it is given to.
    """

    def __init__(
        self,
        base: LanguageModel,
        config: HypernetConfig,
        chunk: ChunkConfig | None = None,
        *,
        encoder_base: LanguageModel | None = None,
        tok_budget: int = 4096,
        trained_chunks: int | None = None,
    ) -> None:
        self.base, self.config, self.chunk = base, config, chunk or ChunkConfig()
        self.reader = encoder_base or base
        self.tok_budget, self.trained_chunks = tok_budget, trained_chunks
        instrument(base.model)
        self.encoder = ContextEncoder(self.reader.model, config.encoder)
        self.hypernet = Hypernet(config, target_shapes(base, config), self.encoder.d_model)
        self.hypernet.to(base.device)
        self._sites = {(s.layer, s.module): s for s in sites_of(base.model)}
        self._id: tuple[Any, str] = (None, "")

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        base: str | LanguageModel | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> DocToLoRA:
        """Load a hypernetwork and its base; see `d2l.pretrained.from_pretrained`.

        >>> import d2l
        >>> model = d2l.DocToLoRA.from_pretrained("fig2/tiny")
        >>> adapter = model.internalize("The grass is green. The special magic number is 4 8 2 9.")
        >>> model.ask("What is the special magic number? Reply with only the number.", adapter)
        '4829'
        """
        from .pretrained import from_pretrained

        return from_pretrained(name_or_path, base, device=device, dtype=dtype)

    @property
    def hypernet_id(self) -> str:
        """sha256 over the hypernetwork's weights, in float32: who made an adapter."""
        named = sorted(self.hypernet.named_parameters())
        state = [(p.data_ptr(), p._version) for _, p in named]
        if self._id[0] != state:
            digest = hashlib.sha256()
            for name, p in named:
                digest.update(f"{name}{tuple(p.shape)}".encode())
                digest.update(p.detach().float().cpu().contiguous().numpy().data)
            self._id = (state, digest.hexdigest())
        return self._id[1]

    def chunks(self, document: str) -> list[list[int]]:
        """Template, tokenise and cut a document; special tokens in its text stay plain text.

        Raises ValueError for a document that is empty or shorter than a chunk's minimum.
        """
        if not document.strip():
            raise ValueError(EMPTY)
        return self.cut_whole(render_chat(self.reader.tokenizer, document.strip()))

    def cut_whole(self, ids: Sequence[int]) -> list[list[int]]:
        """Cut a document that is templated and tokenised; raises ValueError for a short one."""
        fewest, affixes = fewest_chunks(len(ids), self.chunk), chat_affixes(self.reader.tokenizer)
        ends = self.ends if fewest > 1 else None
        pieces = list(cut([ids], self.chunk.max_tok, *affixes, ends)) if ends else [[]]
        return pieces if len(pieces[-1]) > 2 * self.chunk.min_tok else split(ids, fewest, *affixes)

    @property
    def ends(self) -> Ends | None:
        """What ends a chunk with a sentence, from three quarters of its full length on."""
        least = 3 * self.chunk.max_tok // 4
        return ends_of(self.reader.tokenizer, least) if self.chunk.sentences else None

    def sentences(self, chunk: Sequence[int]) -> list[list[int]]:
        """List the parts of a chunk that have rows of their own: itself, or its sentences."""
        if not self.chunk.sentences:
            return [[*chunk]]
        ends = ends_of(self.reader.tokenizer, self.chunk.min_tok)
        *found, last = cut([chunk], len(chunk), (), (), ends)
        n_frame = len(chat_affixes(self.reader.tokenizer)[1])  # no sentence of the frame alone
        return [*found[:-1], found[-1] + last] if found and len(last) <= n_frame else [*found, last]

    def encode(self, chunks: Sequence[Sequence[int]], *, dedupe: bool = True) -> ChunkLora:
        """Compute factors of all chunks' `sentences`; equal chunks are encoded once by default."""
        distinct, where = unique(chunks) if dedupe else (chunks, list(range(len(chunks))))
        longest = max(map(len, distinct))
        most = min(2 * longest, max(longest, self.tok_budget))
        rows = alike(distinct, most, _READ_PER_RUN * self.tok_budget) if dedupe else []
        if len(rows) in (0, len(distinct)) or not self.encoder.shares(longest):
            rows = [(len(c), len(c), [i]) for i, c in enumerate(distinct)]
        sizes = [max(n_tok, n_read // _READ_PER_RUN) for n_tok, n_read, _ in rows]
        groups = [[rows[r][2] for r in group] for group in group_by_length(sizes, self.tok_budget)]
        parts = [self._encode_group([[distinct[i] for i in row] for row in g]) for g in groups]
        at: dict[int, list[tuple[int, int]]] = {}
        for g, group in enumerate(groups):
            place = itertools.count()
            for i in itertools.chain(*group):
                at[i] = [(g, next(place)) for _ in self.sentences(distinct[i])]
        return ChunkLora.pick(parts, [one for i in where for one in at[i]])

    def _encode_group(self, rows: Sequence[Sequence[Sequence[int]]]) -> ChunkLora:
        tensors = [torch.tensor(c) for row in rows for c in row]
        read: list[Tensor | None] = []
        segments = Segments.of(len(s) for row in rows for c in row for s in self.sentences(c))

        def keep(feature: Tensor) -> None:  # nothing of layers that are not adapted
            needed = self.hypernet.needs(len(read))
            read.append(self.hypernet.read(feature, segments) if needed else None)

        dtype = self.reader.model.dtype
        half = torch.autocast(self.base.device.type, dtype, enabled=dtype.itemsize < 4)
        with half:
            self.encoder(tensors, keep, per_row=[len(row) for row in rows])
        with half:  # anew, so that its copies of the weights that have read are gone
            factors = self.hypernet.generate(self.hypernet.assemble(read))
        if torch.is_grad_enabled():
            return factors
        return factors.map(lambda t: t.to(self.base.model.dtype))

    def read(
        self, document: Document, *, title: str | None = None, chunks_at_once: int | None = None
    ) -> Reading:
        """Open a document for reading: iterate over the result, and use its adapter meanwhile.

        A document is a text, a `pathlib.Path`, token ids of a text, or an iterator of texts.
        A text is templated, cut into the fewest chunks of equal length (with
        `ChunkConfig.sentences` where sentences end), and each chunk gets the template's affixes;
        special tokens spelled out in it stay plain text.  An iterator (and a text or file beyond a
        million characters) is read as it comes, in chunks of full length: once their rank reaches
        that of a full matrix they are summed, exactly, and memory does not grow with the document.

        ``title`` names the document in its adapter; by default the file's name or the first line.
        ``chunks_at_once`` sets the step, by default as many as ``tok_budget`` takes.

        Raises ValueError, before anything is encoded, for a document that is empty, too short, not
        text, or of another type; for a stream, where reading comes to it.
        """
        self.refuse_if_merged()
        return Reading(self, document, title, chunks_at_once)

    def internalize(self, document: Document, *, title: str | None = None) -> Adapter:
        """Read a document to its end and return its adapter; as `read`.

        Raises ValueError as `read` does.
        """
        return self.read(document, title=title).finish()

    @torch.no_grad()
    def internalize_batch(self, documents: Iterable[str], *, dedupe: bool = True) -> list[Adapter]:
        """Read several texts together and return their adapters, chunks kept however many.

        Chunks of all documents share forward passes, and equal chunks are encoded once.
        Raises ValueError as `chunks` does, before anything is encoded.
        """
        self.refuse_if_merged()
        texts = list(documents)
        listed = [self.chunks(text) for text in texts]
        factors = self.encode([chunk for doc in listed for chunk in doc], dedupe=dedupe)
        made, start = [], 0
        for text, chunks in zip(texts, listed, strict=True):
            n_tok = tuple(len(s) for chunk in chunks for s in self.sentences(chunk))
            own = factors.take(torch.arange(start, start + len(n_tok)))
            rows = len(n_tok) * self.config.lora.rank
            source = Source(sha256_of(text), title_of(text), n_tok, rows)
            made.append(self.adapter_of(own, source))
            start += len(n_tok)
        return made

    def adapter_of(self, factors: ChunkLora, source: Source) -> Adapter:
        """Make the adapter of one document from its chunks' factors; the bias comes last."""
        lora = self.hypernet.compose(factors, [factors.n_chunks], apart=source.folded)
        targets = self.hypernet.targets
        return Adapter(
            lora.A,
            lora.B,
            sources=(source,),
            sites=tuple(self._sites[i, m] for i in targets.layers for m in targets.modules),
            multiplier=lora.multiplier,
            base_name=self.base.name,
            base_fingerprint=self.base.fingerprint,
            hypernet_id=self.hypernet_id,
            bias_rows=lora.rank.total - source.rows,
        )

    def ask(self, question: str, adapter: Adapter | None = None, **options: Any) -> str:
        """Answer one question, greedily unless ``options`` for HF ``generate`` say otherwise."""
        return self.generate([question], adapter, **options)[0]

    def generate(
        self, prompts: Sequence[Prompt], adapters: Adapters = None, **options: Any
    ) -> list[str]:
        """Answer chat prompts; as `answer`, without the measurement."""
        return self.answer(prompts, adapters, **options)[0]

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], adapters: Adapters = None, **options: Any
    ) -> tuple[list[str], int]:
        """Answer chat prompts together, each with its own adapter, or None for the bare base.

        One adapter serves all prompts.  A prompt is a user's text, or token ids that are templated
        already.  ``options`` go to HF ``generate`` (128 new tokens, greedy, unless they say so);
        with ``num_return_sequences=n`` every prompt gives n answers, one after another.
        Returns the answers and the bytes of the KV cache that generation ended with.

        Raises ValueError when counts differ, for an empty prompt, for an adapter that does not fit
        the base, and for any adapter while one is merged; warns about one made for other weights.
        """
        if not prompts:
            return [], 0
        order, delta = self._route(len(prompts), adapters)
        tokenizer, device = self.base.tokenizer, self.base.device
        rows = [self.prompt_ids(prompts[i]) for i in order]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        options = {"max_new_tokens": 128, "do_sample": False, "pad_token_id": pad} | options
        with applied(self.base.model, delta):
            out = self.base.model.generate(
                input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options
            )
        texts = tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True)
        copies = len(texts) // len(rows)
        place = {row: at for at, row in enumerate(order)}
        answers = [texts[place[i] * copies + k] for i in range(len(rows)) for k in range(copies)]
        return answers, cache_bytes(out.past_key_values)

    def stream(
        self, question: Prompt, adapter: Adapter | None = None, **options: Any
    ) -> Iterator[str]:
        """Yield the answer's text in pieces as they are generated; closing it stops generation.

        Raises ValueError as `answer` does.
        """
        criteria = options.pop("stopping_criteria", [])

        def run(stopping_criteria: Any, **more: Any) -> None:
            stopping_criteria.extend(criteria)
            more |= {"stopping_criteria": stopping_criteria}
            self.answer([question], adapter, **options, **more)

        return stream_text(self.base.tokenizer, run)

    @torch.no_grad()
    def log_likelihood(
        self, question: Prompt, answer: str, adapters: Sequence[Adapter | None]
    ) -> list[float]:
        """Return ``log p(answer | question)`` in nats under each adapter (None is the base).

        Raises ValueError as `answer` does, and for an answer without tokens.
        """
        prompt = self.prompt_ids(question)
        target = self.base.tokenizer(answer, add_special_tokens=False).input_ids
        if not target:
            raise ValueError("the answer is empty: its likelihood says nothing")
        order, delta = self._route(len(adapters), adapters)
        ids = torch.tensor([prompt + target] * len(order), device=self.base.device)
        with applied(self.base.model, delta):
            logits = self.base.model(input_ids=ids, logits_to_keep=len(target) + 1).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        total = log_p.gather(-1, ids[:, len(prompt) :, None]).sum((1, 2)).tolist()
        return [total[order.index(i)] for i in range(len(order))]

    def refuse_if_merged(self) -> None:
        """Raise ValueError while an adapter is merged into the base."""
        if is_merged(self.base.model):
            raise ValueError("an adapter is merged into the base: unmerge it first")

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids as the base sees them; ValueError for an empty one."""
        ids = render_chat(self.base.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not ids or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError("a prompt is empty: ask something")
        return ids

    def _route(self, n: int, adapters: Adapters) -> tuple[list[int], Delta | None]:
        """Bring rows with the same adapter together; return their order and the update."""
        if adapters is None or isinstance(adapters, Adapter):
            adapters = [adapters] * n
        of_row = list(adapters)
        if len(of_row) != n:
            raise ValueError(f"{n} prompts need {n} adapters, or one for all, not {len(of_row)}")
        distinct = {id(a): a for a in of_row if a is not None}
        if not distinct:
            return list(range(n)), None
        self.refuse_if_merged()
        for adapter in distinct.values():
            self._check(adapter)
        place = {key: i for i, key in enumerate(distinct)}
        docs = [place.get(id(a), -1) for a in of_row]
        order = sorted(range(n), key=docs.__getitem__)
        dtype = self.base.model.dtype
        loras = LoraBatch.cat([a.batch(self.base.device, dtype) for a in distinct.values()])
        return order, route_rows(loras, [docs[i] for i in order])

    def _check(self, adapter: Adapter) -> None:
        made, here = f"made for base {adapter.base_name!r}", f"used with {self.base.name!r}"
        for site in adapter.sites:
            if self._sites.get((site.layer, site.module)) != site:
                raise ValueError(f"the adapter was {made}, {here}, which has no {site}")
        if adapter.base_fingerprint != self.base.fingerprint:
            warnings.warn(
                f"the adapter was {made} with fingerprint {adapter.base_fingerprint[:12]}, {here} "
                f"with fingerprint {self.base.fingerprint[:12]}: answers may be wrong",
                UserWarning,
                stacklevel=5,
            )


def cache_bytes(cache: object) -> int:
    """Return the bytes of all tensors that an HF KV cache holds."""
    layers = getattr(cache, "layers", [])
    return sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, Tensor))
