"""Public question answering sets as records: from files in ``D2L_DATA_DIR``, or from their hubs.

Files are read in the sets' own formats.  The hub needs the extra ``hub`` (the package `datasets`),
except for LongBench, whose archive is read as it is.  A document comes once, with all its
questions.
"""

from __future__ import annotations

import io
import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import Question, Record

Asked = tuple[str, str, str, list[str]]
"""Title, document, question and its accepted answers."""


@dataclass(frozen=True)
class PublicSet:
    """Where a set lies: its repository on the hub, and names of files by split, the first found."""

    hub: str
    files: Mapping[str, tuple[str, ...]]
    parse: Callable[[Any], Iterator[Asked]]
    licence: str


def load(
    name: str,
    split: str,
    *,
    source: str = "auto",
    data_dir: str | Path | None = None,
    max_answer_words: int | None = None,
    drop_bad: bool = False,
) -> list[Record]:
    """Load a split of one of `SETS`.

    ``source`` is ``files``, ``hub``, or ``auto``: files of ``data_dir`` (by default
    ``D2L_DATA_DIR``) where they are, else the hub.  A question without an answer, or with one of
    more than ``max_answer_words`` words, is an error; ``drop_bad`` leaves it out and warns.

    Raises ValueError for unknown names and for bad questions, FileNotFoundError where ``files`` has
    none, ImportError without the extra, OSError where the hub cannot be reached.
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}, known: {', '.join(SETS)}")
    known = SETS[name]
    if split not in known.files:
        raise ValueError(f"{name} has the splits {', '.join(known.files)}, not {split!r}")
    if source not in ("auto", "files", "hub"):
        raise ValueError(f"source must be auto, files or hub, got {source!r}")
    path = None if source == "hub" else _find(known.files[split], data_dir)
    if path is not None:
        rows = known.parse(_read(path))
    elif source == "files":
        where = _folder(data_dir) or "D2L_DATA_DIR, which is not set"
        raise FileNotFoundError(
            f"no file of {name} ({split}) in {where}; looked for {', '.join(known.files[split])}"
        )
    else:
        rows = _from_hub(name, known, split)
    return _records(f"{name}-{split}", rows, max_answer_words, drop_bad)


def split_titles(
    records: Sequence[Record], n_held_out: int = 10
) -> tuple[list[Record], list[Record]]:
    """Split by title: all but the last ``n_held_out`` titles for training, the last for tests.

    Titles count in order of appearance; of SQuAD's 48 development titles 38 are for training.
    Raises ValueError where there are not more titles than are held out.
    """
    titles = list(dict.fromkeys(record.title for record in records))
    if len(titles) <= n_held_out:
        raise ValueError(f"{len(titles)} titles cannot leave {n_held_out} out and train on others")
    held_out = set(titles[-n_held_out:])
    return (
        [r for r in records if r.title not in held_out],
        [r for r in records if r.title in held_out],
    )


def choose_questions(
    records: Sequence[Record], n: int, seed: int = 0
) -> list[tuple[Record, Question]]:
    """Draw ``n`` questions, or all in order where there are not so many.

    The choice depends on the set, the seed and the records alone, not on what was drawn before.
    """
    pairs = [(record, question) for record in records for question in record.questions]
    if len(pairs) <= n:
        return pairs
    return random.Random(f"{records[0].source}/{seed}").sample(pairs, n)


def _records(
    source: str, rows: Iterable[Asked], max_answer_words: int | None, drop_bad: bool
) -> list[Record]:
    documents: dict[tuple[str, str], list[Question]] = {}
    dropped: list[str] = []
    for title, document, question, answers in rows:
        kept = tuple(dict.fromkeys(a.strip() for a in answers if a.strip()))
        fault = _fault(document, question, kept, max_answer_words)
        if fault is None:
            documents.setdefault((title, document.strip()), []).append(
                Question(question.strip(), kept, source.partition("-")[0])
            )
        elif drop_bad:
            dropped.append(fault)
        else:
            raise ValueError(f"{source}: {fault}; drop_bad=True leaves such questions out")
    if dropped:
        warnings.warn(
            f"{source}: {len(dropped)} questions left out, the first: {dropped[0]}",
            UserWarning,
            stacklevel=3,
        )
    if not documents:
        raise ValueError(f"{source} holds no questions that can be used")
    return [
        Record(document, tuple(questions), source=source, title=title)
        for (title, document), questions in documents.items()
    ]


def _fault(
    document: str, question: str, answers: tuple[str, ...], max_words: int | None
) -> str | None:
    if not document.strip():
        return f"the question {question!r} has no document"
    if not question.strip():
        return f"a question about {document[:40]!r}... is empty"
    if not answers:
        return f"the question {question!r} has no answer"
    longest = max(len(answer.split()) for answer in answers)
    if max_words is not None and longest > max_words:
        return f"an answer to {question!r} has {longest} words, more than {max_words}"
    return None


def _folder(data_dir: str | Path | None) -> str | Path | None:
    return data_dir or os.environ.get("D2L_DATA_DIR") or None


def _find(names: Sequence[str], data_dir: str | Path | None) -> Path | None:
    folder = _folder(data_dir)
    paths = [Path(folder).expanduser() / name for name in names] if folder else []
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not the JSON it should be ({error}): fetch it again"
        ) from error


def _from_hub(name: str, known: PublicSet, split: str) -> Iterator[Asked]:
    if name in _LONGBENCH:
        return known.parse(_longbench(name, known.hub))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name} comes from the hub through the package datasets: pip install 'd2l-core[hub]', "
            f"or put {' or '.join(known.files[split])} into the folder D2L_DATA_DIR"
        ) from error
    try:
        rows = load_dataset(known.hub, split=split)
    except (OSError, ConnectionError) as error:
        raise OSError(f"{known.hub} cannot be fetched from the hub: {error}") from error
    return known.parse(list(rows))


def _longbench(name: str, hub: str) -> list[Any]:
    """Read one set out of LongBench's archive (its loading script is no longer supported)."""
    from huggingface_hub import hf_hub_download

    with zipfile.ZipFile(hf_hub_download(hub, "data.zip", repo_type="dataset")) as archive:
        member = next((m for m in archive.namelist() if m.endswith(f"/{name}.jsonl")), None)
        if member is None:
            raise ValueError(f"{hub} has no {name}.jsonl in its data.zip")
        with archive.open(member) as file:
            return [json.loads(line) for line in io.TextIOWrapper(file, "utf-8") if line.strip()]


def _parse(rows_of: Callable[[Any], Iterator[Asked]]) -> Callable[[Any], Iterator[Asked]]:
    """Name the rule when a file has another layout than its set."""

    def parse(data: Any) -> Iterator[Asked]:
        try:
            yield from rows_of(data)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = rows_of.__name__.strip("_")
            raise ValueError(f"this is not laid out as {what} is: {error!r}") from error

    return parse


@_parse
def _squad(data: Any) -> Iterator[Asked]:
    """Read SQuAD 1.1: its release, the hub's rows, or a list of contexts with their questions."""
    if isinstance(data, dict):
        data = [
            {"title": article["title"], **paragraph}
            for article in data["data"]
            for paragraph in article["paragraphs"]
        ]
    for row in data:
        for asked in row.get("questions") or row.get("qas") or [row]:
            answers = asked["answers"] if "answers" in asked else [asked["answer"]]
            yield row["title"], row["context"], asked["question"], _texts(answers)


@_parse
def _ropes(data: Any) -> Iterator[Asked]:
    """Read ROPES; the document is the background and, on a new line, the situation."""
    if isinstance(data, dict):
        data = [p for article in data["data"] for p in article["paragraphs"]]
    for row in data:
        document = f"{row['background'].strip()}\n{row['situation'].strip()}"
        for asked in row.get("qas") or [row]:
            yield "ropes", document, asked["question"], _texts(asked["answers"])


@_parse
def _drop(data: Any) -> Iterator[Asked]:
    """Read DROP.  Of several spans any counts, as in the published evaluation."""
    if isinstance(data, dict):
        for title, row in data.items():
            for asked in row["qa_pairs"]:
                given = [asked["answer"], *asked.get("validated_answers", ())]
                answers = [text for answer in given for text in _drop_answers(answer)]
                yield title, row["passage"], asked["question"], answers
        return
    for row in data:
        yield (
            row["section_id"],
            row["passage"],
            row["question"],
            list(row["answers_spans"]["spans"]),
        )


def _drop_answers(answer: Mapping[str, Any]) -> list[str]:
    if answer.get("number"):
        return [str(answer["number"])]
    date = answer.get("date") or {}
    parts = [str(date[part]) for part in ("day", "month", "year") if date.get(part)]
    return list(answer.get("spans") or ()) or ([" ".join(parts)] if parts else [])


@_parse
def _longbench_rows(data: Any) -> Iterator[Asked]:
    """Read a set of LongBench."""
    for row in data:
        yield row.get("dataset", ""), row["context"], row["input"], list(row["answers"])


@_parse
def _pwc(data: Any) -> Iterator[Asked]:
    """Read PwC: prompts with contexts; the answers are sentences of a model."""
    for row in data:
        yield "pwc", row["input"], row["prompt"], [row["answer"]]


def _texts(answers: Any) -> list[str]:
    """Return the texts of answers: files hold a list of mappings, the hub a mapping."""
    if isinstance(answers, Mapping):
        return list(answers["text"])
    return [a["text"] if isinstance(a, Mapping) else a for a in answers]


_LONGBENCH = ("2wikimqa_e", "multifieldqa_en_e", "qasper_e")
SETS: dict[str, PublicSet] = {
    "squad": PublicSet(
        "rajpurkar/squad",
        {
            "train": ("train-v1.1.json",),
            "validation": ("dev-v1.1.json", "squad_v1.1_dev.json"),
        },
        _squad,
        "CC BY-SA 4.0",
    ),
    "drop": PublicSet(
        "ucinlp/drop",
        {
            "train": ("drop_dataset_train.json",),
            "validation": ("drop_dataset_dev.json", "drop_contrast.json"),
        },
        _drop,
        "CC BY-SA 4.0",
    ),
    "ropes": PublicSet(
        "allenai/ropes",
        {
            "train": ("ropes-train-v1.0.json",),
            "validation": ("ropes-dev-v1.0.json", "ropes_contrast_original.json"),
        },
        _ropes,
        "CC BY 4.0",
    ),
    "pwc": PublicSet(
        "sggetao/PwC",
        {"train": ("PwC_train.jsonl",), "test": ("PwC_test.jsonl",)},
        _pwc,
        "CC BY 4.0",
    ),
} | {
    name: PublicSet("THUDM/LongBench", {"test": (f"{name}.jsonl",)}, _longbench_rows, "MIT")
    for name in _LONGBENCH
}
