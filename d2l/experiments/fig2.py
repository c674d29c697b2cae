"""Figure 2: needle in a haystack, internalised against in context (paper section 4, Appendix A)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
from d2l_kernels import use_backend

from ..config import (
    ChunkConfig,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    PerceiverConfig,
    with_overrides,
)
from ..data.needle_training import NeedleStream
from ..figures import draw_fig2
from ..train import TrainConfig
from .base import Run, need_gpu_and_model, request
from .needle import NeedleEval, NeedleRun, card, measure, measure_variants, trained
from .shipped import models, train_and_ship

BACKENDS = ("auto", "torch", "reference")

PAPER = NeedleRun(
    base="google/gemma-2-2b-it",
    dtype="bfloat16",
    hypernet=HypernetConfig(
        encoder=EncoderConfig("early_exit", layer_idx=6),
        perceiver=PerceiverConfig(d_latent=512, n_latents=208, n_blocks=8),
        lora=LoraConfig(rank=8, target_modules=("down_proj",)),
    ),
    chunk=ChunkConfig(max_tok=1024, min_tok=25),
    train_chunk=ChunkConfig(max_tok=512, min_tok=25),
    stream=NeedleStream(max_tok=256, cut_share=0.5, max_chunks=8),
    train=TrainConfig(
        steps=1482, docs_per_step=432, docs_per_micro_batch=27, lr=4e-5, warmup=100, l1=1.5, seed=1
    ),
    eval=NeedleEval(
        lengths=tuple(1024 * 2**i for i in range(8)),
        n_docs=(500,) * 8,
        context_lengths=tuple(1024 * 2**i for i in range(8)),
        n_context=(500,) * 8,
        variant_lengths=(1024, 8192, 32768),
        n_variant=500,
        batch=4,
    ),
)

SOURCES = {
    "base": "section 4",
    "hypernet.encoder.kind": "Appendix A",
    "hypernet.encoder.layer_idx": "Appendix A (a quarter of the layers)",
    "hypernet.perceiver.d_latent": "Listing 1",
    "hypernet.perceiver.n_latents": "published NIAH script",
    "hypernet.perceiver.n_blocks": "Listing 1",
    "hypernet.lora.rank": "section 4",
    "hypernet.lora.scale": "published code: 2 r^1.5, used raw",
    "chunk.max_tok": "published evaluation script",
    "train_chunk.max_tok": "published NIAH script",
    "train_chunk.min_tok": "published NIAH script",
    "stream.max_tok": "Appendix A (bins 32-128 and 128-256)",
    "train.steps": "one epoch of 640,000 documents (derived)",
    "train.docs_per_step": "16 packs of about 27 documents (derived)",
    "train.lr": "published NIAH script",
    "train.warmup": "published NIAH script",
    "train.l1": "published NIAH script (did not converge for an independent group; see LOG.md)",
    "eval.lengths": "figure 2",
    "eval.n_docs": "published evaluation script",
}

_TINY = {
    "base": "tiny",
    "dtype": "float32",
    "hypernet.encoder": EncoderConfig("per_layer_activations"),
    "hypernet.perceiver": PerceiverConfig(
        d_latent=128, n_latents=8, n_blocks=2, n_heads=4, n_kv_heads=2, d_head=32,
        projection_factor=2,
    ),
    "hypernet.lora.scale": 8.0,
    "hypernet.chunk_gate": True,
    "chunk": ChunkConfig(max_tok=256, min_tok=8),
    "train_chunk": ChunkConfig(max_tok=256, min_tok=25),
    "stream": NeedleStream(
        max_tok=256, compose_share=0.5, max_chunks=64, prose_share=0.3,
        word_share=0.3,
    ),
    "train": TrainConfig(
        steps=500, docs_per_step=32, docs_per_micro_batch=32, optimizer="muon", lr=2e-3,
        betas=(0.9, 0.98),
        warmup=50,
        curriculum=130,
        eval_every=250,
    ),
    "eval": NeedleEval(
        lengths=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
        n_docs=(100,) * 8,
        context_lengths=(64, 128, 256, 512, 1024, 2048, 4096),
        n_context=(100, 100, 100, 100, 50, 50, 20),
        variant_lengths=(256, 2048, 8192),
        n_variant=50,
        batch=50,
    ),
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": _TINY,
    "smoke": _TINY
    | {
        "train.steps": 3,
        "train.eval_every": 0,
        "train.docs_per_step": 4,
        "eval": NeedleEval(
            lengths=(64, 512), n_docs=(4, 4), context_lengths=(64,), n_context=(4,),
            variant_lengths=(64,), n_variant=4, batch=4,
        ),
    },
    "small": {
        "base": "smollm2-135m",
        "hypernet.encoder": EncoderConfig("early_exit", 8, next_token=True, unit_scale=True),
        "hypernet.perceiver": PerceiverConfig(
            d_latent=128, n_latents=16, n_blocks=1, n_heads=4, n_kv_heads=2, d_head=32,
            projection_factor=0,
        ),
        "hypernet.d_copy": 192,
        "hypernet.say_next": True,
        "hypernet.lora": LoraConfig(rank=8, scale=64.0, layers=(18, 21, 24, 27)),
        "hypernet.per_layer_processing": False,
        "hypernet.use_bias": False,
        "hypernet.chunk_gate": True,
        "chunk": ChunkConfig(max_tok=512, min_tok=8),
        "stream": NeedleStream(
            max_tok=256, compose_share=0.5, max_chunks=256, prose_share=0.4,
            word_share=0.3,
        ),
        "train": TrainConfig(
            steps=600, docs_per_step=32, docs_per_micro_batch=32, lr=1e-3, betas=(0.9, 0.98),
            warmup=50,
            curriculum=150,
            eval_every=300,
        ),
        "eval": NeedleEval(
            lengths=tuple(64 * 2**i for i in range(12)),
            n_docs=(50,) * 8 + (20,) * 4,
            context_lengths=(64, 256, 1024, 4096, 8192),
            n_context=(20, 10, 5, 3, 2),
            variant_lengths=(256,),
            n_variant=50,
            batch=25,
            max_new_tokens=16,
        ),
    },
}  # fmt: skip


def config(scale: str, overrides: dict[str, Any] | None = None) -> NeedleRun:
    """Return the complete config of a scale, with dotted overrides applied last.

    Raises ValueError for an unknown key or a value of another type.
    """
    return with_overrides(with_overrides(PAPER, OVERRIDES[scale]), overrides or {})


def run(
    scale: str = "small",
    seed: int = 0,
    backend: str = "auto",
    overrides: str | dict[str, Any] = "{}",
    out_dir: str = "",
    retrain: bool = False,
) -> Run:
    """Evaluate the hypernetworks of a scale and hand back the table, figure and verdicts.

    Shipped weights are used where the request leaves training as it is (all seeds that ship);
    ``retrain`` trains from scratch, at ``tiny`` the base too, and resumes what was interrupted.

    Raises ValueError for a request that cannot be served and CannotRun where the scale needs a GPU
    or the hub.
    """
    began = time.monotonic()
    asked = request("fig2", scale, seed, overrides, out_dir)
    wanted = config(scale, {"train.seed": seed} | asked.overrides)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if scale == "paper":
        need_gpu_and_model("fig2", wanted.base)
    tables, variants = [], []
    with use_backend(None if backend == "auto" else backend):
        standard = config(scale, {"train.seed": seed})
        found = models("fig2", scale, wanted, standard, trained, retrain=retrain)
        for i, (of, model) in enumerate(found.items()):
            tables.append(measure(wanted, model, seed=of, with_base=i == 0))
            variants.append(measure_variants(wanted, model, seed=of))
    window = next(iter(found.values())).base.window
    return Run(
        request=asked,
        config=wanted,
        paper=PAPER,
        sources=SOURCES,
        table=pd.concat(tables, ignore_index=True),
        variants=pd.concat(variants, ignore_index=True),
        context={"window": window, "train_tok": wanted.train_tok},
        title=wanted.base,
        seconds=time.monotonic() - began,
        draw=draw_fig2,
    ).save()


def train(scale: str, seed: int = 0, overrides: dict[str, Any] | None = None) -> Path:
    """Train the hypernetwork of a scale; see `shipped.train_and_ship`."""
    wanted = config(scale, {"train.seed": seed} | (overrides or {}))
    return train_and_ship("fig2", scale, wanted, trained, card, custom=bool(overrides))
