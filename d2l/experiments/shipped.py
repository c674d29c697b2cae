"""Runs that train a hypernetwork: their folders, and the weights that ship with the repository."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch

from ..artifacts import build_dir, paper_dir, write_text
from ..checkpoint import load_model, save_model
from ..config import ChunkConfig, HypernetConfig, config_id, flatten, from_dict, to_dict
from ..lm.base import LanguageModel, load_base, native_dtype
from ..model import DocToLoRA
from ..tiny_training import Task, TinyTraining, train_tiny
from ..train import TrainConfig, read_curve

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


def load(wanted: TrainedRun) -> LanguageModel:
    """Load the base on the GPU if there is one, in float32 where bfloat16 would be emulated."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = native_dtype(device, getattr(torch, wanted.dtype))
    return load_base(wanted.base, device=device, dtype=dtype)


def load_retrained(
    wanted: TrainedRun, folder: Path, task: Task, recipe: TinyTraining
) -> LanguageModel:
    """Train a tiny base from scratch beside its hypernetwork, unless it is there, and load it."""
    if not (folder / "base").exists():
        train_tiny(task, folder / "base", wanted.train.seed, recipe)
    return load_base(str(folder / "base"), dtype=getattr(torch, wanted.dtype))


def fresh(
    wanted: TrainedRun, base: LanguageModel, *, trained_chunks: int | None = None
) -> DocToLoRA:
    """Return the untrained model; its weights depend on the training seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.train.seed)
        return DocToLoRA(base, wanted.hypernet, wanted.chunk, trained_chunks=trained_chunks)


def run_dir(wanted: TrainedRun, name: str) -> Path:
    """Return the folder of a training run; it depends on everything but the evaluation."""
    recipe: Any = dataclasses.replace(wanted, eval=type(wanted.eval)())  # pyright: ignore
    return build_dir() / "runs" / f"{name}-{config_id(recipe)}"


def finished(wanted: TrainedRun, folder: Path) -> bool:
    """Tell whether a training run in ``folder`` has reached its last step."""
    return (folder / "curve.csv").exists() and read_curve(folder)[-1]["step"] >= wanted.train.steps


def ship(
    wanted: R,
    model: DocToLoRA,
    folder: Path,
    target: Path,
    card: Callable[[R, DocToLoRA, Curve], str],
) -> None:
    """Write a trained hypernetwork to ``target`` with its curve and a card made from the run."""
    curve = read_curve(folder)
    facts = {"run": to_dict(wanted), "steps_done": int(curve[-1]["step"])}
    save_model(target, model, facts, dtype=torch.bfloat16)
    shutil.copy(folder / "curve.csv", target / "curve.csv")
    write_text(target / "README.md", card(wanted, model, curve))


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
