"""Runs that train a hypernetwork: their folders, and the weights that ship with the repository."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch

from .. import tiny_needle, tiny_qa
from ..artifacts import build_dir, paper_dir, write_text
from ..checkpoint import load_model, save_model
from ..config import ChunkConfig, HypernetConfig, config_id, flatten, from_dict, to_dict
from ..lm.base import LanguageModel, load_base, native_dtype
from ..model import DocToLoRA
from ..tiny_training import train_tiny
from ..train import Patience, TrainConfig, read_curve
from .base import need_gpu_and_model

Curve = list[dict[str, float]]


@runtime_checkable
class TrainedRun(Protocol):
    """What the configs of all such runs have; everything but ``eval`` decides the weights."""

    @property
    def base(self) -> str: ...  # noqa: D102

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...  # noqa: D102

    @property
    def hypernet(self) -> HypernetConfig: ...  # noqa: D102

    @property
    def chunk(self) -> ChunkConfig: ...  # noqa: D102

    @property
    def train(self) -> TrainConfig: ...  # noqa: D102

    @property
    def eval(self) -> Any: ...  # noqa: D102


R = TypeVar("R", bound=TrainedRun)
Trainer = Callable[[R, LanguageModel, Path], DocToLoRA]
Card = Callable[[R, DocToLoRA, Curve, str], str]
_GPU_TOK = 1 << 16
"""Tokens encoded at once in training on a GPU, where many small passes wait for the host."""
FROM_SCRATCH = {
    "tiny": (tiny_needle.NeedleTask, tiny_needle.RECIPE),
    "tiny-qa": (tiny_qa.QaTask, tiny_qa.RECIPE),
}


def load(wanted: TrainedRun) -> LanguageModel:
    """Load the base on the GPU if there is one, in float32 where bfloat16 would be emulated."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = native_dtype(device, getattr(torch, wanted.dtype))
    return load_base(wanted.base, device=device, dtype=dtype)


def fresh(
    wanted: TrainedRun, base: LanguageModel, *, trained_chunks: int | None = None
) -> DocToLoRA:
    """Return the untrained model; its weights depend on the training seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.train.seed)
        model = DocToLoRA(base, wanted.hypernet, wanted.chunk, trained_chunks=trained_chunks)
    if base.device.type != "cpu":
        model.tok_budget = _GPU_TOK
    return model


def run_dir(wanted: TrainedRun, name: str) -> Path:
    """Return the folder of a training run; it depends on everything but the evaluation."""
    return build_dir() / "runs" / f"{name}-{config_id(_with(wanted, eval=type(wanted.eval)()))}"


def finished(wanted: TrainedRun, folder: Path) -> bool:
    """Tell whether a training run in ``folder`` has reached its last step, or stopped early."""
    rows = read_curve(folder) if (folder / "curve.csv").exists() else []
    done = bool(rows) and rows[-1]["step"] >= wanted.train.steps
    return done or Patience(wanted.train, rows).over


def models(
    figure: str,
    scale: str,
    wanted: R,
    standard: R,
    trained: Trainer[R],
    *,
    retrain: bool,
    base_too: bool = True,
) -> dict[int, DocToLoRA]:
    """Return the models to evaluate by training seed: those that ship, or one trained for this.

    All seeds that ship where ``wanted`` is ``standard`` but for the evaluation and its seed is 0.
    With ``retrain`` and ``base_too`` a tiny base is trained from scratch as well; what was
    interrupted resumes.
    """
    seed, there = wanted.train.seed, shipped_seeds(figure, scale)
    ships = _with(wanted, eval=standard.eval) == standard and seed in there
    if ships and not retrain:
        trains = {s: dataclasses.replace(standard.train, seed=s) for s in there}
        runs = {s: _with(standard, train=t) for s, t in trains.items() if seed in (0, s)}
        return load_shipped(figure, runs, scale)
    folder = run_dir(wanted, f"{figure}-{scale}")
    scratch = retrain and base_too and wanted.base in FROM_SCRATCH and scale != "smoke"
    if scratch:  # another base than the one that ships: never resume the one's run with the other
        folder = folder.with_name(f"{folder.name}-from-scratch")
    if retrain and finished(wanted, folder):
        shutil.rmtree(folder)
    if scratch:
        if not (folder / "base").exists():
            task, recipe = FROM_SCRATCH[wanted.base]
            train_tiny(task(), folder / "base", seed, recipe)
        base = load_base(str(folder / "base"), dtype=getattr(torch, wanted.dtype))
    else:
        base = load(wanted)
    return {seed: trained(wanted, base, folder)}


def train_and_ship(
    figure: str, scale: str, wanted: R, trained: Trainer[R], card: Card[R], *, custom: bool
) -> Path:
    """Train the hypernetwork of a scale, write it with curve and model card; return the folder.

    An interrupted run resumes from its last checkpoint.  Only the standard configuration goes to
    the folder that ships; a ``custom`` one, as ``smoke``, stays beside its run.
    """
    if scale == "paper":
        need_gpu_and_model(figure, wanted.base)
    folder = run_dir(wanted, f"{figure}-{scale}")
    model = trained(wanted, load(wanted), folder)
    target = weights_dir(figure, scale, wanted.train.seed)
    if custom or scale == "smoke":
        target = folder / "hypernet"
    curve = until_best(read_curve(folder), wanted.train)
    facts = {"run": to_dict(wanted), "steps_done": int(curve[-1]["step"])}
    save_model(target, model, facts, dtype=torch.bfloat16)
    shutil.copy(folder / "curve.csv", target / "curve.csv")
    write_text(target / "README.md", card(wanted, model, curve, f"{figure} --scale {scale}"))
    return target


def until_best(curve: Curve, config: TrainConfig) -> Curve:
    """Leave out what came after the weights that were kept; all of it stays without patience."""
    patience = Patience(config)
    better = [i for i, row in enumerate(curve) if patience.is_better(row)]
    return curve[: better[-1] + 1] if better else curve


def weights_dir(figure: str, scale: str, seed: int) -> Path:
    """Return the folder of a hypernetwork that ships."""
    return paper_dir() / "weights" / figure / scale / f"seed{seed}"


def shipped_seeds(figure: str, scale: str) -> list[int]:
    """List the training seeds whose hypernetworks ship."""
    found = weights_dir(figure, scale, 0).parent.glob("seed*/config.json")
    return sorted(int(f.parent.name.removeprefix("seed")) for f in found)


def load_shipped(figure: str, runs: Mapping[int, TrainedRun], scale: str) -> dict[int, DocToLoRA]:
    """Load the shipped hypernetwork of every seed in ``runs``.

    Raises ValueError naming the settings when one was trained by another recipe than its run asks
    for; the evaluation may differ.
    """
    folders = {seed: weights_dir(figure, scale, seed) for seed in runs}
    for seed, wanted in runs.items():
        recorded = json.loads((folders[seed] / "config.json").read_text())["metadata"]["run"]
        there, here = flatten(from_dict(type(wanted), recorded)), flatten(wanted)
        other = [k for k in here if not k.startswith("eval.") and here[k] != there.get(k)]
        if other:
            raise ValueError(
                f"{folders[seed]} was trained with other settings than scale {scale} has now "
                f"({', '.join(other)}): train again with --retrain"
            )
    base = load(next(iter(runs.values())))
    return {seed: load_model(folder, base) for seed, folder in folders.items()}


def _with(wanted: R, **changes: Any) -> R:
    return dataclasses.replace(wanted, **changes)  # pyright: ignore
