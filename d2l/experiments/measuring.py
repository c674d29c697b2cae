"""Asking every method about the held-out documents; an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import d2l_kernels
import pandas as pd
from tqdm import tqdm

from ..artifacts import QA_COLUMNS, describe_device, versions
from ..baselines import Method, Reply, Setting
from ..config import config_id
from ..data.encyclopedia import LEXICONS
from ..data.record import Record
from ..model import DocToLoRA
from ..qa_metrics import QaScore, score
from .facts import FactRun, Methods, Metric, asker, counts, documents, methods
from .shipped import FROM_SCRATCH

_SOURCES = (Path(__file__).parents[1], Path(d2l_kernels.__file__).parent)


class Kept:
    """What one model was measured to answer to one set of questions, in a file of lines of JSON.

    A line is a row with the seconds that it took, and the scores by document of the method that
    the others are divided by.  One that was cut short where the run was killed does not count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[tuple[int, str, str], dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(line)
                row = found["row"]
                self._found[row["n_facts"], row["series"], row["part"]] = found

    @classmethod
    def of(cls, folder: Path, wanted: FactRun, model: DocToLoRA, records: Sequence[Record]) -> Kept:
        """Return what ``folder`` keeps for a config, documents, and a model as it was loaded."""
        base = model.base
        made = f"{config_id(wanted)} {model.hypernet_id} {base.fingerprint} {base.device.type} "
        made += f"{base.model.dtype} {describe_device()} {records}"
        return cls(folder / f"{hashlib.sha256(made.encode()).hexdigest()[:16]}.jsonl")

    def find(
        self, n_facts: int, series: str, part: str
    ) -> tuple[dict[str, Any], dict[str, list[QaScore]]] | None:
        """Return a row, and the scores that were kept with it."""
        found = self._found.get((n_facts, series, part))
        if found is None:
            return None
        scores = {d: [QaScore(**s) for s in listed] for d, listed in found["scores"].items()}
        return found["row"], scores

    def add(
        self, row: Mapping[str, Any], scores: Mapping[str, list[QaScore]], seconds: float
    ) -> None:
        """Write a row down at once."""
        listed = {d: [dataclasses.asdict(s) for s in found] for d, found in scores.items()}
        line = json.dumps({"row": dict(row), "scores": listed, "seconds": seconds})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # what was cut short stays a line of its own


def seconds_kept(folder: Path) -> float:
    """Return how many seconds it took to measure what ``folder`` keeps."""
    return sum(f["seconds"] for path in folder.glob("*.jsonl") for f in Kept(path)._found.values())


def _code_id() -> str:
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


CODE_ID = _code_id()
"""Digest of the sources when this module was imported, and of Python, torch and transformers."""


def measure(
    wanted: FactRun,
    model: DocToLoRA,
    *,
    seed: int,
    only: Iterable[str] | None = None,
    methods: Methods = methods,
    keep: Path | None = None,
) -> pd.DataFrame:
    """Ask every one of ``methods`` (or the series in ``only``) about the held-out documents.

    One row for each method and number of facts, columns as in `artifacts.QA_COLUMNS`, and
    ``unknown``, the share of replies that say that there is no answer.
    ``relative`` is the metric over that of the first method, the base with the document in
    context, on the same questions; its interval a bootstrap over documents.  Memory is counted
    apart, and of two epochs where a method trains: it peaks in the first.  What the folder ``keep``
    holds is not measured again, and rows are written there at once.
    """
    base, rows, mean = model.base, [], statistics.fmean
    none = LEXICONS[wanted.stream.vocabulary].unknown
    short = dataclasses.replace(wanted, eval=dataclasses.replace(wanted.eval, cd_epochs=2))
    for n_facts, n_docs in counts(wanted):
        records = documents(wanted, n_facts, n_docs)
        kept = Kept.of(keep, wanted, model, records) if keep else None
        ask = asker(wanted, records) if wanted.base in FROM_SCRATCH else None
        chosen, brief = methods(wanted, records), methods(short, records)
        picked = [k for k in chosen if only is None or k[0] in only]
        reference: dict[str, list[QaScore]] = {}
        for series, part in tqdm(
            picked, desc=wanted.eval.public or f"{n_facts} facts", unit="method"
        ):
            found = kept.find(n_facts, series, part) if kept else None
            if found and (reference or found[1]):
                rows.append(found[0])
                reference = reference or found[1]
                continue
            began = time.monotonic()
            slow = series.startswith("cd_")
            main = series.startswith("base_") or series in ("d2l", "wrong_document")
            seen = wanted.eval.n_slow if slow else None if main else wanted.eval.n_alternatives
            asked = records[:seen]
            half = max(1, len(base.tokenizer(asked[0].document).input_ids) // 2)
            setting = Setting(
                base,
                model,
                max_new_tokens=wanted.eval.max_new_tokens,
                context_tok=half if part == "half" else None,
                ask=ask,
            )
            scores, replies = _ask_all(setting, chosen[series, part], asked)
            first = not reference
            reference = reference or scores
            metered = dataclasses.replace(setting, count_memory=True)
            few = asked[: 1 if slow else wanted.eval.n_metered]
            _, measured = _ask_all(metered, brief[series, part], few)
            row = {"series": series, "part": part, "n_facts": n_facts, "n_docs": len(asked)}
            row |= _row(scores, replies, measured, reference, wanted.eval.metric)
            row |= {"seed": seed, "unknown": mean(score(r.text, none).exact for r in replies)}
            rows.append(row)
            if kept:
                kept.add(row, scores if first else {}, time.monotonic() - began)
    return pd.DataFrame(rows, columns=[*QA_COLUMNS, "unknown"])


def _texts(record: Record) -> list[str]:
    return [q.text for q in record.questions]


def _ask_all(
    setting: Setting, method: Method, records: Sequence[Record]
) -> tuple[dict[str, list[QaScore]], list[Reply]]:
    scores: dict[str, list[QaScore]] = {}
    replies: list[Reply] = []
    for record in records:
        answered = method(setting, record.document, _texts(record))
        pairs = zip(answered, record.questions, strict=True)
        scores[record.document] = [score(r.text, q.answers) for r, q in pairs]
        replies += answered
    return scores, replies


def _row(
    scores: Mapping[str, list[QaScore]],
    replies: Sequence[Reply],
    metered: Sequence[Reply],
    reference: Mapping[str, list[QaScore]],
    metric: Metric,
) -> dict[str, float]:
    every = [s for listed in scores.values() for s in listed]
    low, mid, high = _relative(scores, reference, metric)
    mean = statistics.fmean
    return {
        "n": len(every),
        "f1": mean(s.f1 for s in every),
        "recall": mean(s.recall for s in every),
        "exact": mean(s.exact for s in every),
        "relative": mid,
        "relative_low": low,
        "relative_high": high,
        "context_ratio": mean(r.context_ratio for r in replies),
        "update_s": mean(r.update.seconds for r in replies),
        "update_mib": max(r.update.peak_mib for r in metered),
        "generation_s": mean(r.generation.seconds for r in replies),
        "generation_mib": max(r.generation.peak_mib for r in metered),
        "adapter_mib": mean(r.adapter_mib for r in replies),
    }


def _relative(
    scores: Mapping[str, list[QaScore]],
    reference: Mapping[str, list[QaScore]],
    metric: Metric,
    n_draws: int = 1000,
) -> tuple[float, float, float]:
    """Return the ratio of sums with a 95 % bootstrap interval over documents.

    NaN where the reference scores nothing; draws in which it does are left out.
    """
    pairs = [
        (
            math.fsum(getattr(s, metric) for s in listed),
            math.fsum(getattr(s, metric) for s in reference[document]),
        )
        for document, listed in scores.items()
    ]
    rng = random.Random(0)

    def ratio(drawn: Sequence[tuple[float, float]]) -> float:
        below = sum(b for _, b in drawn)
        return sum(a for a, _ in drawn) / below if below else math.nan

    drawn = (ratio(rng.choices(pairs, k=len(pairs))) for _ in range(n_draws))
    draws = sorted(r for r in drawn if not math.isnan(r)) or [math.nan]
    return draws[len(draws) // 40], ratio(pairs), draws[-(len(draws) // 40) - 1]
