"""Context distillation: train a LoRA on one document, with the model itself as the teacher."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Sequence

import torch
from d2l_kernels import Segments
from torch import Tensor

from ..data.example import Batch, Example, Query
from ..lm.base import LanguageModel
from ..lm.hooks import decoder_of, linears_of, widths_of
from ..lora import LoraBatch
from ..losses import average
from ..self_generate import SelfGeneration, ask_questions, teach
from ..teacher import HfTeacher
from ..train import answer_loss
from .prompted import cut_middle
from .setting import Method, Reply, Setting, reply_to


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The published recipe: rank 8, scale 2, down_proj, AdamW 1e-4 with a cosine to 0, top-16.

    ``n_queries`` None trains on the test question itself (oracle), a number on so many questions
    from `Setting.ask`.  Published: oracle, 5 and 20 queries at 300 epochs of mini-batches of 16;
    25 queries at 50 epochs of 2.  The document is truncated to what fits beside a question.
    """

    n_queries: int | None = None
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("down_proj",)
    lr: float = 1e-4
    epochs: int = 300
    batch: int = 16
    k: int = 16
    seed: int = 0


def distilled(config: DistillConfig = DistillConfig()) -> Method:
    """Return the method that trains a LoRA on each document (or, as oracle, on each question).

    With generated queries one adapter serves all questions about a document.  The update counts
    asking, the teacher's answers and training.  Where nobody asks anything, as a small base may
    not, a warning says so and the adapter changes nothing.
    """

    def method(setting: Setting, document: str, questions: Sequence[str]) -> list[Reply]:
        if config.n_queries is not None:
            loras, update = setting.measured(lambda: distill(setting, document, None, config))
            return [reply_to(setting, document, q, update, loras=loras) for q in questions]
        replies = []
        for question in questions:
            work = functools.partial(distill, setting, document, question, config)
            loras, update = setting.measured(work)
            replies.append(reply_to(setting, document, question, update, loras=loras))
        return replies

    return method


def distill(
    setting: Setting, document: str, question: str | None, config: DistillConfig
) -> LoraBatch:
    """Train and return the adapter of one document, for ``question`` or for generated ones."""
    base = setting.base
    teacher = HfTeacher(base)
    asked = [question] if question is not None else _ask(setting, teacher, document, config)
    if not asked:
        what = f"nobody asked a question about the document {document[:60]!r}..."
        warnings.warn(f"{what}: its adapter changes nothing", UserWarning, stacklevel=2)
        return fresh_lora(base, config).map(lambda t: t.to(base.model.dtype))
    context = cut_middle(base, document, min(map(setting.room_tok, asked)))
    how = SelfGeneration(prompt=setting.prompt, k=config.k, max_new_tokens=setting.max_new_tokens)
    queries = [
        Query(tuple(student), taught.ids, taught.logprob, taught.idx)
        for _, taught, student in teach(teacher, [context], [(0, q) for q in asked], how)
    ]
    loras = fresh_lora(base, config)
    parameters = [t.requires_grad_() for t in (*loras.A.values(), *loras.B.values())]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr)
    rng = random.Random(config.seed)
    n_batches = math.ceil(len(queries) / config.batch)
    steps = config.epochs * n_batches
    for step in range(steps):
        if step % n_batches == 0:
            rng.shuffle(queries)
        start = step % n_batches * config.batch
        batch = Batch.of([Example(((0,),), tuple(queries[start : start + config.batch]))])
        with torch.enable_grad():
            cast = loras.map(lambda t: t.to(base.model.dtype))
            per_token, _ = answer_loss(base, batch, cast, "kl", training=True)
            counts = [len(q.answer) for q in batch.queries]
            loss = average(per_token, counts, batch.queries_per_doc, "per_ctx")
            optimizer.zero_grad()
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    return loras.map(lambda t: t.detach().to(base.model.dtype))


def fresh_lora(base: LanguageModel, config: DistillConfig) -> LoraBatch:
    """Return an adapter that changes nothing yet: A drawn as PEFT does, B zero.

    Raises ValueError for a module that some layer lacks.
    """
    decoder, name = decoder_of(base.model)
    layers = getattr(decoder, name)
    generator = torch.Generator().manual_seed(config.seed)
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for module in config.target_modules:
        missing = [i for i, layer in enumerate(layers) if module not in linears_of(layer)]
        if missing:
            raise ValueError(f"layer {missing[0]} of {base.name!r} has no linear {module!r}")
        widths = [widths_of(linears_of(layer)[module]) for layer in layers]
        d_in, d_out = (max(column) for column in zip(*widths, strict=True))
        bound = 1 / math.sqrt(d_in)
        drawn = torch.rand(len(layers), config.rank, d_in, generator=generator)
        A[module] = (bound * (2 * drawn - 1)).to(base.device)
        B[module] = torch.zeros(len(layers), config.rank, d_out, device=base.device)
    return LoraBatch(
        A,
        B,
        rank=Segments((config.rank,)),
        layers=tuple(range(len(layers))),
        multiplier=config.alpha / config.rank,
    )


def _ask(setting: Setting, teacher: HfTeacher, document: str, config: DistillConfig) -> list[str]:
    n = config.n_queries or 0
    if setting.ask is not None:
        asked = list(setting.ask(document, n))
    else:
        (asked,) = ask_questions(teacher, [document], min(n, 5), rounds=math.ceil(n / 5))
    return asked[:n]
