"""Figure 2: needle in a haystack, internalised against in context (paper section 4, Appendix A)."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..artifacts import build_dir, write_text
from ..checkpoint import load_model, save_model
from ..config import (
    ChunkConfig,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    PerceiverConfig,
    config_id,
    to_dict,
    with_overrides,
)
from ..data.example import Example
from ..data.needle import Filler, Needle, NeedleGenerator, NeedleSample, Words
from ..data.needle_training import NeedleStream, NeedleTraining
from ..evaluate import Score, answer_in_context, answer_internalized, answer_without_context
from ..figures import draw_fig2
from ..home import repo_root
from ..lm.base import LanguageModel, load_base
from ..lm.tiny_training import train_tiny_base
from ..model import DocToLoRA
from ..train import TrainConfig
from ..train import read_curve
from ..train import train as fit
from .base import Run, need_gpu_and_model, request

BACKENDS = ("auto", "torch")


@dataclasses.dataclass(frozen=True)
class NeedleEval:
    """Lengths (documents of 0.9 to 1 times so many tokens) and documents per length."""

    lengths: tuple[int, ...] = ()
    n_docs: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    n_context: tuple[int, ...] = ()
    variant_lengths: tuple[int, ...] = ()
    n_variant: int = 0
    batch: int = 4
    max_new_tokens: int = 8
    seed: int = 1234


@dataclasses.dataclass(frozen=True)
class Fig2Config:
    """Everything that a run depends on."""

    base: str
    dtype: Literal["float32", "bfloat16"]
    hypernet: HypernetConfig
    chunk: ChunkConfig
    train_chunk: ChunkConfig
    stream: NeedleStream
    train: TrainConfig
    eval: NeedleEval


PAPER = Fig2Config(
    base="google/gemma-2-2b-it",
    dtype="bfloat16",
    hypernet=HypernetConfig(
        encoder=EncoderConfig("early_exit", layer_idx=6),
        perceiver=PerceiverConfig(d_latent=512, n_latents=208, n_blocks=8),
        lora=LoraConfig(rank=8, target_modules=("down_proj",)),
    ),
    chunk=ChunkConfig(max_tok=1024, min_tok=25),
    train_chunk=ChunkConfig(max_tok=512, min_tok=25),
    stream=NeedleStream(max_tok=256, curriculum=0.0, cut_share=0.5, max_chunks=8),
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
        max_tok=256, curriculum=0.3, compose_share=0.5, max_chunks=64, prose_share=0.3,
        word_share=0.3,
    ),
    "train": TrainConfig(
        steps=1500, docs_per_step=32, docs_per_micro_batch=32, lr=2e-3, betas=(0.9, 0.98),
        warmup=50,
    ),
    "eval": NeedleEval(
        lengths=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
        n_docs=(100,) * 8,
        context_lengths=(64, 128, 256, 512, 1024, 2048, 4096),
        n_context=(100, 100, 100, 100, 50, 50, 20),
        variant_lengths=(256, 2048, 8192),
        n_variant=50,
        batch=10,
    ),
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": _TINY,
    "smoke": _TINY
    | {
        "train.steps": 3,
        "train.docs_per_step": 4,
        "eval": NeedleEval(
            lengths=(64, 512), n_docs=(4, 4), context_lengths=(64,), n_context=(4,),
            variant_lengths=(64,), n_variant=4, batch=4,
        ),
    },
    "small": {
        "base": "smollm2-135m",
        "hypernet.encoder.layer_idx": 6,
        "hypernet.perceiver": PerceiverConfig(
            d_latent=192, n_latents=48, n_blocks=3, n_heads=4, n_kv_heads=2, d_head=64,
            projection_factor=2,
        ),
        "hypernet.lora": LoraConfig(rank=4, scale=4.0, layers=tuple(range(18, 30))),
        "hypernet.chunk_gate": True,
        "chunk": ChunkConfig(max_tok=512, min_tok=8),
        "stream": NeedleStream(
            max_tok=256, curriculum=0.25, compose_share=0.5, max_chunks=256, prose_share=0.4,
            word_share=0.3,
        ),
        "train": TrainConfig(
            steps=3000, docs_per_step=32, docs_per_micro_batch=32, lr=1e-3, betas=(0.9, 0.98),
            warmup=50,
        ),
        "eval": NeedleEval(
            lengths=tuple(64 * 2**i for i in range(12)),
            n_docs=(100,) * 7 + (60,) * 5,
            context_lengths=(64, 256, 1024, 4096, 8192, 16384),
            n_context=(40, 40, 24, 12, 6, 4),
            variant_lengths=(256, 4096, 32768),
            n_variant=40,
            batch=10,
        ),
    },
}  # fmt: skip

VARIANTS: tuple[tuple[Filler, Needle, Words], ...] = (
    ("prose", "digits", "seen"),
    ("repeat", "word", "seen"),
    ("repeat", "word", "heldout"),
    ("prose", "word", "seen"),
)


def config(scale: str, overrides: dict[str, Any] | None = None) -> Fig2Config:
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
    ``retrain`` trains from scratch, at ``tiny`` the base too.  Raises ValueError for a request that
    cannot be served and CannotRun where the scale needs a GPU or the hub.
    """
    began = time.monotonic()
    asked = request("fig2", scale, seed, overrides, out_dir)
    wanted = config(scale, {"train.seed": seed} | asked.overrides)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if scale == "paper":
        need_gpu_and_model("fig2", wanted.base)
    models = _models(wanted, scale, retrain=retrain)
    tables, variants = [], []
    for trained, model in models.items():
        tables.append(measure(wanted, model, seed=trained))
        variants.append(measure_variants(wanted, model, seed=trained))
    window = next(iter(models.values())).base.window
    return Run(
        request=asked,
        config=wanted,
        paper=PAPER,
        sources=SOURCES,
        table=pd.concat(tables, ignore_index=True),
        variants=pd.concat(variants, ignore_index=True),
        context={"window": window, "train_tok": wanted.stream.max_tok},
        title=wanted.base,
        seconds=time.monotonic() - began,
        draw=draw_fig2,
    ).save()


def train(scale: str, seed: int = 0, overrides: dict[str, Any] | None = None) -> Path:
    """Train the hypernetwork of a scale, write it with its model card, and return the folder.

    An interrupted run resumes from its last checkpoint.  Only the standard configuration goes to
    the folder that ships; any other stays beside its run.
    """
    wanted = config(scale, {"train.seed": seed} | (overrides or {}))
    if scale == "paper":
        need_gpu_and_model("fig2", wanted.base)
    run_dir = _run_dir(wanted, scale)
    model = _trained(wanted, _load_base(wanted), run_dir)
    target = run_dir / "hypernet" if overrides or scale == "smoke" else weights_dir(scale, seed)
    facts = {"scale": scale, "config": to_dict(wanted)}
    save_model(target, model, facts)
    shutil.copy(run_dir / "curve.csv", target / "curve.csv")
    write_text(target / "README.md", _card(wanted, model, scale, read_curve(run_dir)))
    return target


def weights_dir(scale: str, seed: int) -> Path:
    """Return the folder of a hypernetwork that ships."""
    return repo_root() / "papers" / "doc-to-lora" / "weights" / "fig2" / scale / f"seed{seed}"


def _models(wanted: Fig2Config, scale: str, *, retrain: bool) -> dict[int, DocToLoRA]:
    """Return the models to evaluate by training seed: those that ship, or one trained for this."""
    seed = wanted.train.seed
    standard = dataclasses.replace(config(scale, {"train.seed": seed}), eval=wanted.eval)
    ships = wanted == standard and (weights_dir(scale, seed) / "config.json").exists()
    if ships and not retrain:
        base = _load_base(wanted)
        found = sorted(weights_dir(scale, 0).parent.glob("seed*/config.json")) if seed == 0 else []
        seeds = [int(f.parent.name.removeprefix("seed")) for f in found] or [seed]
        return {s: load_model(weights_dir(scale, s), base) for s in seeds}
    run_dir = _run_dir(wanted, scale)
    if retrain:
        shutil.rmtree(run_dir, ignore_errors=True)
    if retrain and wanted.base == "tiny" and scale != "smoke":
        train_tiny_base(run_dir / "base", seed=seed)
        base = load_base(str(run_dir / "base"), dtype=getattr(torch, wanted.dtype))
    else:
        base = _load_base(wanted)
    return {seed: _trained(wanted, base, run_dir)}


def _load_base(wanted: Fig2Config) -> LanguageModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_base(wanted.base, device=device, dtype=getattr(torch, wanted.dtype))


def _run_dir(wanted: Fig2Config, scale: str) -> Path:
    trained_on = dataclasses.replace(wanted, eval=NeedleEval())
    return build_dir() / "runs" / f"fig2-{scale}-{config_id(trained_on)}"


def _trained(wanted: Fig2Config, base: LanguageModel, run_dir: Path) -> DocToLoRA:
    """Train, or resume, in ``run_dir``; the model's initialisation depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.train.seed)
        model = DocToLoRA(base, wanted.hypernet, wanted.chunk)
    stream = NeedleTraining(base.tokenizer, wanted.stream, wanted.train_chunk, wanted.train.seed)

    def held_out(_: int) -> dict[str, float]:
        out = {}
        for n_tok in (wanted.stream.max_tok, 16 * wanted.stream.max_tok):
            samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, 20, shift=10_000)
            own, wrong = answer_internalized(model, samples, **_decoding(wanted))
            out |= {f"exact_{n_tok}": own.hits / own.n, f"wrong_{n_tok}": wrong.hits / wrong.n}
        return out

    def examples(step: int) -> list[Example]:
        return stream.batch(step, wanted.train.steps, wanted.train.docs_per_step)

    fit(model, examples, wanted.train, run_dir, evaluate=held_out)
    return model


def measure(wanted: Fig2Config, model: DocToLoRA, *, seed: int) -> pd.DataFrame:
    """Evaluate every series at every length; one row each, columns as in ``data.csv``.

    Without context the length plays no part: the score of the first length stands at all of them.
    """
    e = wanted.eval
    rows: list[dict[str, Any]] = []
    pairs = [*zip(e.lengths, e.n_docs, strict=True)]
    context = dict(zip(e.context_lengths, e.n_context, strict=True))
    no_context: Score | None = None
    bar = tqdm(total=sum(e.n_docs) + sum(e.n_context), desc="evaluate", unit="doc")

    def add(series: str, n_tok: float, score: Score) -> None:
        rows.append({"series": series, "haystack_tok": round(n_tok), **score.row(), "seed": seed})

    for n_tok, n in pairs:
        samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, n)
        mean = sum(s.n_tok for s in samples) / n
        own, wrong = answer_internalized(model, samples, **_decoding(wanted))
        add("d2l", mean, own)
        add("wrong_document", mean, wrong)
        bar.update(n)
        if n_tok == e.lengths[0]:
            add(
                "base_without_context",
                0,
                answer_without_context(model, samples, **_decoding(wanted)),
            )
    for n_tok, n in context.items():
        samples = _documents(model, wanted, "repeat", "digits", "seen", n_tok, n)
        decoding = _decoding(wanted) | {"batch": max(1, min(e.batch, 8192 // n_tok))}
        add(
            "base_with_context",
            sum(s.n_tok for s in samples) / n,
            answer_in_context(model, samples, **decoding),
        )
        bar.update(n)
    bar.close()
    return pd.DataFrame(rows)


def measure_variants(wanted: Fig2Config, model: DocToLoRA, *, seed: int) -> pd.DataFrame:
    """Evaluate other haystacks and needles, named as trained on or not."""
    rows = []
    for filler, needle, words in VARIANTS:
        for n_tok in wanted.eval.variant_lengths:
            samples = _documents(model, wanted, filler, needle, words, n_tok, wanted.eval.n_variant)
            own, wrong = answer_internalized(model, samples, **_decoding(wanted))
            mean = round(sum(s.n_tok for s in samples) / len(samples))
            what = {
                "filler": filler,
                "needle": needle if words == "seen" else f"{needle} ({words})",
            }
            for series, score in (("d2l", own), ("wrong_document", wrong)):
                rows.append(
                    {**what, "series": series, "haystack_tok": mean, **score.row(), "seed": seed}
                )
    return pd.DataFrame(rows)


def _documents(
    model: DocToLoRA,
    wanted: Fig2Config,
    filler: Filler,
    needle: Needle,
    words: Words,
    n_tok: int,
    n: int,
    *,
    shift: int = 0,
) -> list[NeedleSample]:
    """Draw ``n`` test documents of 0.9 to 1 times ``n_tok`` tokens, depths in turn."""
    generator = NeedleGenerator(
        model.base.tokenizer, filler=filler, needle=needle, split="test", words=words
    )
    seed = wanted.eval.seed + shift + n_tok
    return generator.stratified(n, min(int(0.9 * n_tok), n_tok - 28), n_tok, seed)


def _decoding(wanted: Fig2Config) -> dict[str, int]:
    return {"batch": wanted.eval.batch, "max_new_tokens": wanted.eval.max_new_tokens}


def _card(
    wanted: Fig2Config, model: DocToLoRA, scale: str, curve: list[dict[str, float]]
) -> str:
    """Write the model card from the run itself."""
    last = {k: v for row in curve for k, v in row.items()}
    held_out = [k for k in last if k.startswith(("exact_", "wrong_"))]
    n_params = sum(p.numel() for p in model.hypernet.parameters())
    stream, fit_ = wanted.stream, wanted.train
    shown = "\n".join(f"| {k} | {last[k]:.2f} |" for k in held_out)
    return f"""# Needle hypernetwork for {wanted.base} (fig2, scale {scale}, seed {fit_.seed})

Turns a document into LoRA factors for `{", ".join(wanted.hypernet.lora.target_modules)}` of a frozen
`{wanted.base}` so that it recalls the magic number or word of a haystack that is not in its context.
It was trained for that task alone and is no general question answerer.

- Parameters: {n_params / 1e6:.2f} M, stored as bfloat16 safetensors. Licence: MIT.
- Base fingerprint: `{model.base.fingerprint}`. Another base is refused or warned about.
- Data: generated, stream seed {fit_.seed}; {fit_.steps} steps of {fit_.docs_per_step} documents of at
  most {stream.max_tok} tokens, cut into up to 8 chunks, {stream.compose_share:.0%} of them joined with
  repeated chunks of filler up to {stream.max_chunks} chunks in all; {stream.prose_share:.0%} prose
  haystacks, {stream.word_share:.0%} word needles.
- Everything else: `config.json`. Training curve: `curve.csv`. Make it again:
  `just train fig2 --scale {scale} --seed {fit_.seed}`.

Held-out documents at the last step (exact match with the right and with the wrong document's
adapter, 20 documents each, by haystack length in tokens; the full evaluation is in `results/`):

| measure | value |
|---|---|
{shown}
"""
