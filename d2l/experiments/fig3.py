"""Figure 3: answers from the document's adapter against every alternative (paper section 5.1)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import QA_COLUMNS
from ..config import (
    ChunkConfig,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    PerceiverConfig,
    with_overrides,
)
from ..data.fact_training import FactStream
from ..figures import draw_fig3
from ..train import TrainConfig
from .base import need_gpu_and_model, request
from .facts import FactEval, FactRun, QaRun, card, measure, trained
from .shipped import models, train_and_ship

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
        loss="kl",
    ),
    eval=FactEval(n_facts=(8,), n_docs=(500,), n_slow=100, cd_queries=(5, 20), metric="f1"),
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
    "hypernet.lora.rank": 16,
    "hypernet.lora.scale": 8.0,
    "chunk": ChunkConfig(max_tok=256, min_tok=8),
    "stream": FactStream(
        vocabulary="closed", max_facts=8, queries_per_doc=4, words="all", rivals=False
    ),
    "train": TrainConfig(
        steps=1200, docs_per_step=32, docs_per_micro_batch=32, lr=2e-3, betas=(0.9, 0.98),
        warmup=50,
        curriculum=400,
        eval_every=250,
    ),
    "eval": FactEval(
        n_facts=(1, 4, 8, 16), n_docs=(40,) * 4, n_slow=4, cd_lr=5e-3
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
        "eval": FactEval(
            n_facts=(2,), n_docs=(3,), n_questions=2, n_slow=1, rates=(0.5,), cd_queries=(2,),
            cd_epochs=2, n_metered=1, max_new_tokens=6,
        ),
    },
}  # fmt: skip


def config(scale: str, overrides: dict[str, Any] | None = None) -> FactRun:
    """Return the complete config of a scale, with dotted overrides applied last.

    Raises ValueError for an unknown key or a value of another type.
    """
    return with_overrides(with_overrides(PAPER, OVERRIDES[scale]), overrides or {})


def run(
    scale: str = "tiny",
    seed: int = 0,
    overrides: str | dict[str, Any] = "{}",
    out_dir: str = "",
    retrain: bool = False,
) -> QaRun:
    """Ask every method the same held-out questions; hand back table, figure and verdicts.

    Raises ValueError for a request that cannot be served and CannotRun where the scale needs a GPU
    or the hub.
    """
    began = time.monotonic()
    asked = request("fig3", scale, seed, overrides, out_dir)
    wanted = config(scale, {"train.seed": seed} | asked.overrides)
    if scale == "paper":
        need_gpu_and_model("fig3", wanted.base)
    standard = config(scale, {"train.seed": seed})
    found = models("fig3", scale, wanted, standard, trained, retrain=retrain)
    series = {"d2l", "wrong_document", "base_with_context"}
    tables = [
        measure(wanted, model, seed=of, only=None if i == 0 else series)
        for i, (of, model) in enumerate(found.items())
    ]
    drawn = QaRun(
        request=asked,
        config=wanted,
        paper=PAPER,
        sources=SOURCES,
        table=pd.concat(tables, ignore_index=True),
        context={"metric": wanted.eval.metric},
        title=wanted.base,
        seconds=time.monotonic() - began,
        draw=draw_fig3,
        columns=QA_COLUMNS,
    )
    drawn.save()
    return drawn


def train(scale: str, seed: int = 0, overrides: dict[str, Any] | None = None) -> Path:
    """Train the hypernetwork of a scale; see `shipped.train_and_ship`."""
    wanted = config(scale, {"train.seed": seed} | (overrides or {}))
    return train_and_ship("fig3", scale, wanted, trained, card, custom=bool(overrides))
