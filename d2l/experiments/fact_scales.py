"""The scales of the figures and tables about facts: one recipe, which figure 3 trains and ships."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import (
    ChunkConfig,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    PerceiverConfig,
)
from ..data.fact_training import FactStream
from ..train import TrainConfig
from .facts import FactEval, FactRun, Stage

PAPER = FactRun(
    base="google/gemma-2-2b-it",
    dtype="bfloat16",
    hypernet=HypernetConfig(
        encoder=EncoderConfig("per_layer_activations"),
        perceiver=PerceiverConfig(d_latent=512, n_latents=8, n_blocks=8),
        lora=LoraConfig(rank=8, target_modules=("down_proj",)),
    ),
    chunk=ChunkConfig(max_tok=512, min_tok=25),
    stream=FactStream(),
    train=TrainConfig(
        steps=80_000, docs_per_step=944, docs_per_micro_batch=14, lr=4e-5, warmup=100, l1=0.1,
        neftune=5.0, loss="kl",
        eval_every=5000,
    ),
    eval=FactEval(
        n_docs=(500,), n_questions=1, n_slow=100, cd_queries=(5, 20), metric="f1", public="squad"
    ),
)  # fmt: skip

SOURCES = {
    "base": "section 5",
    "hypernet.encoder.kind": "section 3.2",
    "hypernet.perceiver.d_latent": "Listing 1",
    "hypernet.perceiver.n_latents": "published script",
    "hypernet.perceiver.n_blocks": "Listing 1",
    "hypernet.lora.rank": "section 5",
    "hypernet.lora.scale": "published code: 2 r^1.5, used raw",
    "chunk.max_tok": "published script, second stage",
    "train.steps": "section 5 (first stage)",
    "train.docs_per_step": "64 packs of 4,096 tokens, 277 tokens a document (derived)",
    "train.lr": "published script",
    "train.warmup": "published script",
    "train.l1": "published script",
    "train.neftune": "published default",
    "train.loss": "section 3.1",
    "eval.n_docs": "published evaluation script",
    "eval.cd_epochs": "published script",
    "eval.cd_lr": "published script",
}

_TINY = {
    "base": "tiny-qa",
    "dtype": "float32",
    "hypernet.perceiver": PerceiverConfig(
        d_latent=128, n_latents=16, n_blocks=2, n_heads=4, n_kv_heads=2, d_head=32,
        projection_factor=2,
    ),
    "hypernet.encoder.next_token": True,
    "hypernet.d_copy": 128,
    "hypernet.ridge": True,
    "hypernet.lora.rank": 16,
    "hypernet.lora.scale": 8.0,
    "chunk": ChunkConfig(max_tok=256, min_tok=8),
    "stream": FactStream(
        vocabulary="closed", max_facts=8, queries_per_doc=4, words="all", rivals=False
    ),
    "train": TrainConfig(
        steps=200, docs_per_step=32, docs_per_micro_batch=32, optimizer="muon", lr=8e-3,
        vector_lr=0.25, betas=(0.9, 0.98),
        warmup=25,
        curriculum=40,
        eval_every=40,
    ),
    "eval": FactEval(
        n_facts=(1, 4, 8, 16), n_docs=(40,) * 4, n_slow=4, cd_lr=5e-3
    ),
}  # fmt: skip


def _sentences(steps: int, lr: float, stream: FactStream) -> Stage:
    """Return a stage of `small` that gives each sentence rows of its own."""
    train = TrainConfig(
        steps=steps,
        docs_per_step=32,
        docs_per_micro_batch=32,
        optimizer="muon",
        lr=lr,
        vector_lr=0.25,
        betas=(0.9, 0.98),
        warmup=15,
        eval_every=230,
    )
    return Stage(stream, train, ChunkConfig(max_tok=512, min_tok=16, sentences=True))


_FACTS = FactStream(max_facts=8, queries_per_doc=4, mix={"squad": 1.5}, in_place=0.5)
_FIRST = Stage(
    _FACTS,
    TrainConfig(
        steps=800,
        docs_per_step=128,
        docs_per_micro_batch=32,
        optimizer="muon",
        lr=2e-3,
        betas=(0.9, 0.98),
        warmup=50,
        curriculum=160,
        curriculum_exact=0.1,
        eval_every=400,
    ),
    ChunkConfig(max_tok=512, min_tok=8),
)
_PAIRS = dataclasses.replace(_FACTS, queries_per_doc=2)
_BEFORE = (
    _FIRST,
    _sentences(
        450,
        2e-3,
        dataclasses.replace(_PAIRS, mix={"squad": 1.5, "wikipedia/written": 2.0}, in_place=0.25),
    ),
    _sentences(
        320,
        1.5e-3,
        dataclasses.replace(_PAIRS, mix={"squad": 1.0, "wikipedia/written": 3.0}, in_place=0.3),
    ),
)
_LAST = _sentences(
    380,
    2e-3,
    dataclasses.replace(
        _PAIRS, full=0.2, mix={"squad": 1.0, "wikipedia/written": 2.0}, in_place=0.3
    ),
)
_SMALL = {
    "base": "smollm2-135m",
    "hypernet.perceiver": PerceiverConfig(
        d_latent=128, n_latents=16, n_blocks=1, n_heads=4, n_kv_heads=2, d_head=32,
        projection_factor=0,
    ),
    "hypernet.encoder.kind": "early_exit",
    "hypernet.encoder.layer_idx": 8,
    "hypernet.encoder.next_token": True,
    "hypernet.encoder.unit_scale": True,
    "hypernet.d_copy": 192,
    "hypernet.say_next": True,
    "hypernet.lora": LoraConfig(rank=16, scale=64.0, layers=tuple(range(9, 30, 3))),
    "hypernet.per_layer_processing": False,
    "hypernet.use_bias": False,
    "hypernet.ridge": True,
    "hypernet.ridge_start": 1.0,
    "before": _BEFORE,
    "averaged": 3,
    "chunk": _LAST.chunk,
    "stream": _LAST.stream,
    "train": _LAST.train,
    "eval": FactEval(
        n_facts=(1, 4, 8), n_docs=(16,) * 3, n_questions=2, n_slow=1, n_alternatives=4,
        n_metered=1, rates=(0.5,), cd_queries=(5,), cd_epochs=30, cd_lr=1e-3,
        max_new_tokens=32, metric="recall",
    ),
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": _SMALL,
    "tiny": _TINY,
    "smoke": _TINY
    | {
        "train.steps": 3,
        "train.eval_every": 0,
        "train.docs_per_step": 4,
        "eval": FactEval(
            n_facts=(2,), n_docs=(3,), n_questions=2, n_slow=1, rates=(0.5,), cd_queries=(2,),
            cd_epochs=2, n_metered=1, max_new_tokens=6,
        ),
    },
}  # fmt: skip
