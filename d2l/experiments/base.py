"""What every experiment shares: checking a request before any work, and the run it hands back.

An experiment's `run` calls `request(...)` first, and ends with `Run(...).save()`; the notebook then
asks the run for its table, its figure and its verdicts.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .. import artifacts, claims, experiments
from ..config import config_id, diff, to_dict
from ..figures import Figure, save_figure


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request: what to run, and the folder that its results go to."""

    experiment: str
    scale: str
    seed: int
    overrides: dict[str, Any]
    out_dir: Path


def request(
    experiment: str,
    scale: str,
    seed: int = 0,
    overrides: str | Mapping[str, Any] = "{}",
    out_dir: str | Path = "",
) -> Request:
    """Check id, scale, seed, overrides and that the results folder can be written.

    `overrides` is a mapping of dotted config keys or the same as JSON text (keys are checked where
    the config is built).  An empty `out_dir` means `default_out_dir`.  Raises ValueError or OSError
    that name the value and the way out.
    """
    known = experiments.find(experiment)
    experiments.check_scale(known, scale)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    chosen = parse_overrides(overrides)
    folder = default_out_dir(known, scale, seed, chosen)
    if str(out_dir):
        folder = Path(out_dir).expanduser().resolve()
    _check_writable(folder)
    return Request(experiment, scale, seed, chosen, folder)


def parse_overrides(overrides: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides as a dictionary; ValueError for text that is no JSON object."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    example = '{"train.steps": 100}'
    try:
        found = json.loads(overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"overrides must be JSON such as {example}, got {overrides!r}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"overrides must be a JSON object such as {example}, got {overrides!r}")
    return found


def default_out_dir(
    experiment: experiments.Experiment, scale: str, seed: int, overrides: Mapping[str, Any]
) -> Path:
    """Return the committed results folder, or one under build/ for a run that is not the standard.

    Smoke runs, other seeds and overridden configs never touch the committed results.
    """
    if scale != "smoke" and seed == 0 and not overrides:
        return artifacts.results_dir(experiment.id, scale, experiment.paper)
    return artifacts.build_dir() / "results" / experiment.id / run_name(scale, seed, overrides)


def run_name(scale: str, seed: int, overrides: Mapping[str, Any]) -> str:
    """Name a run among those of its experiment."""
    name = scale if seed == 0 else f"{scale}-seed{seed}"
    if overrides:
        canonical = json.dumps(dict(overrides), sort_keys=True)
        name += "-" + hashlib.sha256(canonical.encode()).hexdigest()[:6]
    return name


def need_gpu_and_model(experiment: str, model: str) -> None:
    """Raise CannotRun unless a CUDA GPU is there and `model` is local, cached or to be fetched."""
    import torch

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU (this machine has none that torch can use)")
    problem = _why_no_model(model)
    if problem:
        missing.append(f"the model {model} ({problem})")
    if missing:
        known = experiments.find(experiment)
        instead = [s for s in ("small", "tiny") if s in known.scales]
        commands = " or ".join(f"`just reproduce {experiment} --scale {s}`" for s in instead)
        raise experiments.CannotRun(
            f"{experiment} at scale paper needs {' and '.join(missing)}. "
            f"Run {commands} instead: the same experiment on a CPU."
        )


@dataclasses.dataclass
class Run:
    """A finished run: its table, and what is needed to draw it and to judge its claims.

    `paper` is the paper's config, `sources` says where each of its values stands (by dotted key; a
    prefix serves all keys below it).  `context` holds the lengths that the claims and the figure
    refer to, and goes to `draw(table, scale=..., title=..., **context)`.  `title` names the base.
    """

    request: Request
    config: Any
    paper: Any
    sources: Mapping[str, str]
    table: pd.DataFrame
    context: dict[str, Any]
    title: str
    seconds: float
    draw: Callable[..., Figure]
    variants: pd.DataFrame | None = None
    columns: tuple[str, ...] = artifacts.COLUMNS

    def __post_init__(self) -> None:
        artifacts.check_columns(self.table, self.columns, "table")
        if self.variants is not None:
            artifacts.check_columns(self.variants, artifacts.VARIANT_COLUMNS, "variants")

    @property
    def out_dir(self) -> Path:
        """The folder that holds the results."""
        return self.request.out_dir

    @property
    def scale(self) -> str:
        """The scale that was run."""
        return self.request.scale

    def save(self) -> Run:
        """Write data.csv and variants.csv, and return the run."""
        artifacts.write_csv(self.out_dir / "data.csv", self.table)
        if self.variants is not None:
            artifacts.write_csv(self.out_dir / "variants.csv", self.variants)
        return self

    def config_diff(self) -> pd.DataFrame:
        """List every setting that differs from the paper's: key, paper, source, here."""
        rows = [
            {"key": key, "paper": _show(a), "source": self._source(key), "here": _show(b)}
            for key, (a, b) in diff(self.paper, self.config).items()
        ]
        return pd.DataFrame(rows, columns=["key", "paper", "source", "here"])

    def accuracy(self) -> pd.DataFrame:
        """Return accuracy by haystack length (rows) and series (columns), mean over seeds."""
        return _by_length(self.table, ["series"])

    def variant_accuracy(self) -> pd.DataFrame:
        """Return accuracy by haystack length and (filler, needle, series), if measured."""
        if self.variants is None:
            return pd.DataFrame()
        return _by_length(self.variants, ["filler", "needle", "series"])

    def figure(self) -> Figure:
        """Draw the figure, write figure.svg and figure.png, and return it for display."""
        figure = self.draw(self.table, scale=self.scale, title=self.title, **self.context)
        save_figure(figure, self.out_dir)
        return figure

    def check(self) -> pd.DataFrame:
        """Judge every claim, write manifest.json, and return one row a claim."""
        known = experiments.find(self.request.experiment)
        about = [c for c in claims.load(known.paper) if c.figure == known.id]
        verdicts = claims.judge(self.table, about, self.scale, self.context)
        artifacts.Manifest(
            experiment=known.id,
            scale=self.scale,
            seed=self.request.seed,
            config=to_dict(self.config),
            config_id=config_id(self.config),
            seconds=round(self.seconds, 1),
            context=self.context,
            versions=artifacts.versions(),
            device=artifacts.describe_device(),
            commit=artifacts.git_commit(),
            files=artifacts.file_hashes(self.out_dir),
            verdicts=[dataclasses.asdict(v) for v in verdicts],
        ).write(self.out_dir)
        return claims.as_frame(verdicts)

    def _source(self, key: str) -> str:
        while key not in self.sources and "." in key:
            key = key.rpartition(".")[0]
        return self.sources.get(key, "")


def _by_length(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table.pivot_table(index="haystack_tok", columns=columns, values="accuracy").round(3)


def _show(value: Any) -> str:
    return "-" if value is None else str(value)


def _check_writable(folder: Path) -> None:
    """Try a small file in `folder`, or where it will be made; nothing is left behind."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        probe = place / f".probe.{os.getpid()}"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write to {folder}: {reason}; free space or choose another with out_dir"
        raise OSError(error.errno, message) from error


def _why_no_model(model: str) -> str | None:
    if Path(model).expanduser().is_dir():
        return None
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "not cached, and HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{model}", timeout=5) as page:
            gated = json.load(page).get("gated", False)
    except urllib.error.HTTPError as error:
        return f"not cached, and the hub answers {error.code} {error.reason}"
    except (OSError, ValueError):
        return "not cached, and the hub cannot be reached"
    if gated and not get_token():
        return "gated: accept its licence on the hub and log in with `hf auth login`"
    return None
