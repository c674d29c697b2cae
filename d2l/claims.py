"""The ledger of claims: read claims.toml, test each claim on a results table, give a verdict.

A claim is data: the paper's statement and number, and for each scale either a named measure with a
threshold or the reason why it cannot be tested there.  Measures live in d2l.measures.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from . import artifacts, measures_data, measures_qa  # noqa: F401  (they register measures)
from .measures import MEASURES, Measurement, NotTestable, single_seeds

SCALES = ("smoke", "tiny", "small", "paper")
Outcome = Literal["holds", "does not hold", "not testable at this scale"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "does not hold", "not testable at this scale")
_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How a claim is tested: `measure(table, **args) op threshold`, or why it is not.

    The measure sees the rows whose columns have the values in `where`.
    """

    measure: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    op: str = ""
    threshold: float = math.nan
    not_testable: str = ""

    @property
    def tolerance(self) -> str:
        """The condition as text, e.g. `>= 0.95`."""
        return "" if self.not_testable else f"{self.op} {self.threshold:g}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement about a figure or table, with the paper's number and a test per scale."""

    id: str
    figure: str
    statement: str
    source: str
    paper_value: str
    tests: dict[str, Criterion]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one claim at one scale."""

    claim: str
    scale: str
    statement: str
    verdict: Outcome
    measured: float | None
    tolerance: str
    paper_value: str
    source: str
    note: str


def load(paper: str = artifacts.DEFAULT_PAPER) -> list[Claim]:
    """Read and check the claims of `paper`; ValueError names the claim and what is wrong."""
    return parse(artifacts.paper_dir(paper) / "claims.toml")


def parse(path: Path) -> list[Claim]:
    """Read and check one claims.toml."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    claims = [_claim(entry) for entry in data.get("claim", [])]
    ids = [claim.id for claim in claims]
    twice = {i for i in ids if ids.count(i) > 1}
    if twice:
        raise ValueError(f"{path}: claim ids used twice: {', '.join(sorted(twice))}")
    return claims


def judge(
    table: pd.DataFrame, claims: Sequence[Claim], scale: str, context: Mapping[str, Any]
) -> list[Verdict]:
    """Test every claim on `table`.

    Several seeds are pooled; the note then gives the range over single seeds.  `context` holds the
    run's own lengths, e.g. `{"window": 512, "train_tok": 450}`.
    """
    return [_judge_one(table, claim, scale, context) for claim in claims]


def as_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return the verdicts as a table, one row each."""
    columns = [field.name for field in dataclasses.fields(Verdict)]
    return pd.DataFrame([dataclasses.asdict(v) for v in verdicts], columns=columns)


def count(verdicts: Sequence[str]) -> str:
    """Summarise outcomes in one line, e.g. `9 hold, 1 does not, 2 not testable`."""
    holds, fails, untested = (verdicts.count(outcome) for outcome in OUTCOMES)
    parts = [f"{holds} {'holds' if holds == 1 else 'hold'}"]
    if fails:
        parts.append(f"{fails} {'does' if fails == 1 else 'do'} not")
    if untested:
        parts.append(f"{untested} not testable")
    return ", ".join(parts)


def ledger() -> list[tuple[Path, list[Verdict], list[str]]]:
    """Judge every committed result afresh: (folder, verdicts, files changed since the run)."""
    out = []
    for folder in artifacts.committed_results():
        manifest = artifacts.Manifest.read(folder)
        paper = folder.parents[2].name
        claims = [c for c in load(paper) if c.figure == manifest.experiment]
        table = artifacts.read_csv(folder / "data.csv")
        verdicts = judge(table, claims, manifest.scale, manifest.context)
        out.append((folder, verdicts, manifest.changed_files(folder)))
    return out


def _judge_one(
    table: pd.DataFrame, claim: Claim, scale: str, context: Mapping[str, Any]
) -> Verdict:
    test = claim.tests[scale]
    measured: float | None = None
    verdict: Outcome = "not testable at this scale"
    note = test.not_testable
    if not note:
        try:
            found = _measure(table, test, context)
        except NotTestable as reason:
            note = str(reason)
        else:
            measured, note = found.value, found.note + _over_seeds(table, test, context)
            passed = _OPERATORS[test.op](measured, test.threshold)
            verdict = "holds" if passed else "does not hold"
    return Verdict(
        claim=claim.id,
        scale=scale,
        statement=claim.statement,
        verdict=verdict,
        measured=measured,
        tolerance=test.tolerance,
        paper_value=claim.paper_value,
        source=claim.source,
        note=note,
    )


def _measure(table: pd.DataFrame, test: Criterion, context: Mapping[str, Any]) -> Measurement:
    for column, value in test.where.items():
        known = column in table
        table = pd.DataFrame(table[table[column] == value]) if known else table.head(0)
    if test.where and table.empty:
        raise NotTestable(f"no rows with {test.where}")
    found = MEASURES[test.measure](table, context, **test.args)
    if not math.isfinite(found.value):
        raise NotTestable(f"{test.measure} is {found.value}")
    return found


def _over_seeds(table: pd.DataFrame, test: Criterion, context: Mapping[str, Any]) -> str:
    seeds = single_seeds(table)
    if len(seeds) < 2:
        return ""
    try:
        values = [_measure(rows, test, context).value for rows in seeds]
    except NotTestable:
        return ""
    return f"; {len(seeds)} seeds: {min(values):.3g} to {max(values):.3g}"


def _claim(entry: Mapping[str, Any]) -> Claim:
    name = entry.get("id", "claim without id")
    texts = ("id", "figure", "statement", "source", "paper_value")
    _check_keys(entry, (*texts, "test"), name)
    missing = [key for key in texts if not entry.get(key)]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    tests: dict[str, Criterion] = {}
    for data in entry.get("test", []):
        _check_keys(
            data,
            (
                "scales",
                "measure",
                "args",
                "where",
                "op",
                "threshold",
                "not_testable",
            ),
            name,
        )
        test = _test(data, name)
        for scale in data.get("scales", []):
            if scale not in SCALES or scale in tests:
                raise ValueError(f"{name} tests scale {scale!r} twice, or it is none of {SCALES}")
            tests[scale] = test
    untested = [scale for scale in SCALES if scale not in tests]
    if untested:
        raise ValueError(f"{name} says nothing about {', '.join(untested)}; test it or give the "
                         "reason in `not_testable`")  # fmt: skip
    return Claim(**{key: entry[key] for key in texts}, tests=tests)


def _test(data: Mapping[str, Any], name: str) -> Criterion:
    test = Criterion(**{key: value for key, value in data.items() if key != "scales"})
    if test.not_testable:
        if test.measure or test.op:
            raise ValueError(f"{name} gives both a measure and a reason not to test")
        return test
    if test.measure not in MEASURES:
        close = difflib.get_close_matches(test.measure, MEASURES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(MEASURES)}"
        raise ValueError(f"{name} uses an unknown measure {test.measure!r}; {hint}")
    if test.op not in _OPERATORS or not math.isfinite(test.threshold):
        rule = f"an op of {', '.join(_OPERATORS)} and a finite threshold"
        raise ValueError(f"{name} needs {rule}, got {test.op!r} {test.threshold}")
    return test


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; known: {', '.join(known)}")
