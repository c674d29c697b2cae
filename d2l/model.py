"""`DocToLoRA`: a frozen base, an encoder and a hypernetwork behind two calls.

`internalize` turns documents into adapters; `generate` answers with them.  Adapters travel with the
call: nothing about a document stays in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from d2l_kernels import Segments
from torch import Tensor

from .chunking import fewest_chunks, group_by_length, split, unique
from .config import ChunkConfig, HypernetConfig
from .hypernet import Hypernet, TargetShapes
from .lm.base import LanguageModel, chat_affixes, render_chat
from .lm.encoder import ContextEncoder
from .lm.hooks import applied, decoder_of, instrument, linears_of, widths_of
from .lora import ChunkLora, LoraBatch, route_rows


def target_shapes(base: LanguageModel, config: HypernetConfig) -> TargetShapes:
    """Find the linears of ``base`` that ``config`` adapts.

    Raises ValueError for a module or a layer that the base does not have.
    """
    decoder, name = decoder_of(base.model)
    layers = getattr(decoder, name)
    chosen = tuple(range(len(layers))) if config.lora.layers is None else config.lora.layers
    if not chosen or min(chosen) < 0 or max(chosen) >= len(layers):
        raise ValueError(f"lora.layers {chosen} do not fit a base of {len(layers)} layers")
    d_in: dict[str, int] = {}
    d_out: dict[str, int] = {}
    for index in chosen:
        linears = linears_of(layers[index])
        for module in config.lora.target_modules:
            if module not in linears:
                raise ValueError(
                    f"layer {index} of {base.name!r} has no linear {module!r}; "
                    f"it has {', '.join(sorted(linears))}"
                )
            a, b = widths_of(linears[module])
            d_in[module] = max(a, d_in.get(module, 0))
            d_out[module] = max(b, d_out.get(module, 0))
    return TargetShapes(chosen, d_in, d_out)


class DocToLoRA:
    """Internalise documents into LoRA adapters of a frozen language model.

    ``encoder_base`` is another frozen model to read with; by default the base reads for itself.
    ``tok_budget`` bounds the tokens encoded at once, and with it the memory of `internalize`.
    """

    def __init__(
        self,
        base: LanguageModel,
        config: HypernetConfig,
        chunk: ChunkConfig | None = None,
        *,
        encoder_base: LanguageModel | None = None,
        tok_budget: int = 4096,
    ) -> None:
        self.base, self.config, self.chunk = base, config, chunk or ChunkConfig()
        self.reader = encoder_base or base
        self.tok_budget = tok_budget
        instrument(base.model)
        self.encoder = ContextEncoder(self.reader.model, config.encoder)
        self.hypernet = Hypernet(config, target_shapes(base, config), self.encoder.d_model)
        self.hypernet.to(base.device)

    def chunks(self, document: str) -> list[list[int]]:
        """Template, tokenise and cut a document; special tokens in its text stay plain text.

        Raises ValueError for a document that is empty or shorter than a chunk's minimum.
        """
        if not document.strip():
            raise ValueError("the document is empty: give some text to internalise")
        ids = render_chat(self.reader.tokenizer, document.strip())
        prefix, suffix = chat_affixes(self.reader.tokenizer)
        return split(ids, fewest_chunks(len(ids), self.chunk), prefix, suffix)

    def encode(self, chunks: Sequence[Sequence[int]], *, dedupe: bool = True) -> ChunkLora:
        """Compute the factors of every chunk; equal chunks are encoded once unless told not to."""
        distinct, where = unique(chunks) if dedupe else (chunks, list(range(len(chunks))))
        groups = group_by_length([len(c) for c in distinct], self.tok_budget)
        parts = [self._encode_group([distinct[i] for i in group]) for group in groups]
        at = {i: (g, k) for g, group in enumerate(groups) for k, i in enumerate(group)}
        return ChunkLora.pick(parts, [at[i] for i in where])

    def _encode_group(self, chunks: Sequence[Sequence[int]]) -> ChunkLora:
        tensors = [torch.tensor(c) for c in chunks]
        read: list[Tensor] = []
        segments = Segments.of(len(c) for c in chunks)
        dtype = self.reader.model.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.base.device.type, dtype if half else torch.bfloat16, enabled=half):
            self.encoder(tensors, lambda f: read.append(self.hypernet.read(f, segments)))
            factors = self.hypernet.generate(self.hypernet.assemble(read))
        if torch.is_grad_enabled():
            return factors
        return factors.map(lambda t: t.to(self.base.model.dtype))

    @torch.no_grad()
    def internalize(self, documents: str | Iterable[str], *, dedupe: bool = True) -> LoraBatch:
        """Read each document once and return its adapter, several side by side.

        Raises ValueError as `chunks` does, before anything is encoded.
        """
        texts = [documents] if isinstance(documents, str) else list(documents)
        cut = [self.chunks(text) for text in texts]
        factors = self.encode([chunk for doc in cut for chunk in doc], dedupe=dedupe)
        return self.hypernet.compose(factors, [len(doc) for doc in cut])

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[str],
        loras: LoraBatch | None = None,
        doc_of_prompt: Sequence[int] | None = None,
        **options,
    ) -> tuple[list[str], int]:
        """Answer chat prompts greedily, prompt i with the adapter of document ``doc_of_prompt[i]``.

        By default prompt i asks document i; -1 asks the base.  ``options`` go to HF ``generate``.
        Returns the answers and the bytes of the KV cache that generation ended with.

        Raises ValueError for a document that is not among ``loras``.
        """
        if not prompts:
            return [], 0
        tokenizer, device = self.base.tokenizer, self.base.device
        rows = [render_chat(tokenizer, p) for p in prompts]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        delta = None
        if loras is not None:
            docs = range(len(prompts)) if doc_of_prompt is None else doc_of_prompt
            delta = route_rows(loras, list(docs))
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": pad} | options
        with applied(self.base.model, delta):
            out = self.base.model.generate(
                input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options
            )
        texts = tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True)
        return texts, cache_bytes(out.past_key_values)

    def generate(
        self,
        prompts: Sequence[str],
        loras: LoraBatch | None = None,
        doc_of_prompt: Sequence[int] | None = None,
        **options,
    ) -> list[str]:
        """Answer chat prompts; as `answer`, without the measurement."""
        return self.answer(prompts, loras, doc_of_prompt, **options)[0]


def cache_bytes(cache: object) -> int:
    """Return the bytes of all tensors that an HF KV cache holds."""
    layers = getattr(cache, "layers", [])
    return sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, Tensor))
