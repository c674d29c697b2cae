"""Commands that reproduce the papers: reproduce, train, figures, claims, bench, notebooks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from .. import experiments, notebooks
from ..experiments import EXPERIMENTS, SCALES, Experiment
from ..home import repo_root
from .common import AsJson, console, print_json, short

SMOKE = {"scale": "smoke", "model": "fig2/tiny"}
OWN_OPTIONS = ("scale", "seed", "out_dir", "retrain", "overrides")
PANEL = "The paper"
app = typer.Typer()


def _complete(known: Iterable[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


Id = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="Figure or table, e.g. fig2.", autocompletion=_complete(EXPERIMENTS)
    ),
]
Scale = Annotated[
    str,
    typer.Option(
        help="smoke, tiny, small or paper; empty: the usual one.", autocompletion=_complete(SCALES)
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of training and of the evaluation data.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, repeatable; VALUE as JSON."),
]


@app.command(rich_help_panel=PANEL)
def reproduce(
    experiment_id: Id,
    scale: Scale = "",
    seed: Seed = 0,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train again, from scratch.")] = False,
    settings: Settings = None,
    out_dir: Annotated[str, typer.Option(help="Folder for the results.")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if a claim fails.")] = False,
) -> None:
    """Run the notebook of a figure or table and judge its claims."""
    experiment = experiments.find(experiment_id)
    scale = experiments.check_scale(experiment, scale or experiment.default_scale)
    notebook = repo_root() / experiment.notebook
    given, overrides = _split_settings(parse_settings(settings), notebook, experiment, scale)
    from ..experiments import base

    request = base.request(experiment.id, scale, seed, overrides, out_dir)
    given |= {
        "scale": scale,
        "seed": seed,
        "retrain": retrain,
        "overrides": json.dumps(overrides),
        "out_dir": str(request.out_dir) if out_dir else "",
    }
    usual = base.default_out_dir(experiment, scale, seed, overrides)
    executed = _executed(f"{experiment.id}-{usual.name}")
    say = console()
    say.print(f"[bold]{experiment.id}[/] at scale [bold]{scale}[/]: {experiment.cost[scale]}")
    started = time.time()
    try:
        notebooks.execute(notebook, executed, given)
    except notebooks.NotebookError as error:
        if error.error_name == experiments.CannotRun.__name__:
            raise experiments.CannotRun(str(error)) from error
        raise OSError(
            0, f"{error}\n({error.error_name}; traceback in {short(executed)})"
        ) from error
    manifest = request.out_dir / "manifest.json"
    if not manifest.is_file() or manifest.stat().st_mtime < started - 1:
        raise OSError(0, f"{short(executed)} ran, but wrote no {manifest}")
    verdicts = json.loads(manifest.read_text(encoding="utf-8"))["verdicts"]
    say.print(_verdict_table(f"Claims of {experiment.id} at scale {scale}", verdicts))
    say.print(f"{time.time() - started:.0f} s. Results: {short(request.out_dir)}", soft_wrap=True)
    say.print(f"Executed notebook: {short(executed)}", soft_wrap=True)
    if strict and any(v["verdict"] == "does not hold" for v in verdicts):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def train(experiment_id: Id, scale: Scale = "", seed: Seed = 0, settings: Settings = None) -> None:
    """Train the hypernetwork of an experiment again; an interrupted run resumes."""
    experiment = experiments.find(experiment_id)
    scale = experiments.check_scale(experiment, scale or experiment.default_scale)
    overrides = parse_settings(settings)
    experiment.function("config")(scale, overrides)
    experiment.function("train")(scale=scale, seed=seed, overrides=overrides)


@app.command(rich_help_panel=PANEL)
def figures() -> None:
    """List what can be reproduced, its cost at each scale, and how its claims stand."""
    from .. import artifacts, claims

    say = console()
    for experiment in EXPERIMENTS.values():
        title = f"{experiment.id}: {experiment.title}"
        table = Table("scale", "cost on two CPU cores", "claims, as committed", title=title)
        for scale in experiment.scales:
            folder = artifacts.results_dir(experiment.id, scale, experiment.paper)
            stand = "-"
            if (folder / "manifest.json").is_file():
                found = artifacts.Manifest.read(folder).verdicts
                stand = claims.count([v["verdict"] for v in found])
            usual = " (usual)" if scale == experiment.default_scale else ""
            table.add_row(scale + usual, experiment.cost[scale], stand)
        say.print(table)


@app.command(name="claims", rich_help_panel=PANEL)
def claims_(as_json: AsJson = False) -> None:
    """Judge every committed result afresh against the papers' claims."""
    import dataclasses

    from .. import claims

    ledger = claims.ledger()
    if as_json:
        rows = [dataclasses.asdict(v) for _, verdicts, _ in ledger for v in verdicts]
        print_json(rows)
        return
    say = console()
    if not ledger:
        say.print("No committed results yet; `just reproduce fig2 --scale tiny` makes some.")
    for folder, verdicts, changed in ledger:
        rows = [dataclasses.asdict(v) for v in verdicts]
        say.print(_verdict_table(short(folder), rows))
        if changed:
            say.print(f"[yellow]changed since the run: {', '.join(changed)}[/]")


@app.command(rich_help_panel=PANEL)
def bench(
    scale: Annotated[str, typer.Option(help="tiny or small, from shipped weights.")] = "small",
    repeats: Annotated[int, typer.Option(min=1, help="Runs per length; medians are kept.")] = 3,
    only: Annotated[
        Literal["internalize", "queries"] | None, typer.Option(help="Measure one of the two.")
    ] = None,
) -> None:
    """Measure what internalising and asking cost, against the bare encoder and the bare base."""
    from ..experiments.bench import run

    folder, tables = run(scale, repeats, only)
    for table in tables:
        console().print(table.round(3).to_string(index=False))
    console().print(f"Written to {short(folder)}")


@app.command(name="notebooks", rich_help_panel=PANEL)
def notebooks_() -> None:
    """Run every notebook at scale smoke; executed copies lie under build/notebooks."""
    say, failed = console(), []
    for notebook in sorted((repo_root() / "notebooks").glob("*.ipynb")):
        known = notebooks.parameters(notebook)
        given = {k: v for k, v in SMOKE.items() if k in known}
        started = time.time()
        try:
            notebooks.execute(notebook, _executed(f"{notebook.stem}-smoke"), given, quiet=True)
        except notebooks.NotebookError as error:
            failed.append(notebook.name)
            say.print(f"[red]failed[/] {notebook.name}: {error.error_name}: {error}")
        else:
            say.print(f"[green]ran[/] {notebook.name}, {time.time() - started:.0f} s")
    if failed:
        raise typer.Exit(1)


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """Read `key=value` settings; a value is JSON where it parses, else the text itself."""
    found: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, e.g. train.steps=100, got {setting!r}")
        if key in found:
            raise ValueError(f"--set names {key!r} twice")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def _split_settings(
    settings: dict[str, Any], notebook: Path, experiment: Experiment, scale: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into parameters of the notebook and overrides of the config; check both."""
    names = notebooks.parameters(notebook)
    given, overrides = {}, {}
    for key, value in settings.items():
        if key in OWN_OPTIONS:
            raise ValueError(f"--set {key}=... has its own option, --{key.replace('_', '-')}")
        (given if key in names else overrides)[key] = value
    if overrides:
        experiment.function("config")(scale, overrides)
    return given, overrides


def _executed(name: str) -> Path:
    return repo_root() / "build" / "notebooks" / f"{name}.ipynb"


def _verdict_table(title: str, verdicts: Sequence[dict[str, Any]]) -> Table:
    colours = {"holds": "green", "does not hold": "red"}
    table = Table("verdict", "claim", "measured", "tolerance", title=title, show_lines=True)
    for v in verdicts:
        colour = colours.get(v["verdict"], "dim")
        measured = "-" if v["measured"] is None else f"{v['measured']:.4g}"
        about = (
            f"[bold]{v['claim']}[/]\npaper: {escape(v['paper_value'])}\nhere: {escape(v['note'])}"
        )
        table.add_row(f"[{colour}]{v['verdict']}[/]", about, measured, v["tolerance"])
    return table
