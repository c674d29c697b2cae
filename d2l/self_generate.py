"""Training data that a model makes from documents: questions, its own answers, and its beliefs.

A folder holds shards of Parquet, one row a question, a manifest and a card.  It is written shard by
shard, each complete or not there at all, so a run that stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .artifacts import replacing, write_json, write_text
from .data.example import Query
from .lm.base import render_chat
from .teacher import Taught, Teacher, check_finite

ASK = (
    "Read this text:\n\n{document}\n\nWrite {n} questions that the text answers. Each should be "
    "about another detail, name what it is about so that it makes sense without the text, and have "
    "a short answer. Write one question per line and nothing else."
)
ASK_MORE = "\n\nThese have been asked already, do not repeat them:\n{asked}"
ANSWER = "{question}"
AskedBy = Callable[[str, int], Sequence[str]]
SCHEMA = pa.schema(
    [
        ("document_index", pa.int64()),
        ("document", pa.string()),
        ("question", pa.string()),
        ("reply", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("teacher_logprob", pa.list_(pa.list_(pa.float32()))),
        ("teacher_idx", pa.list_(pa.list_(pa.int32()))),
    ]
)


@dataclasses.dataclass(frozen=True)
class SelfGeneration:
    """What is asked and kept.

    ``rounds`` of ``n_questions`` each; later rounds are shown the questions before.  ``prompt``
    holds ``{question}`` and frames both the teacher's and the student's turn.  ``k``
    log-probabilities are kept of each answer token.  Answers that the teacher does not end within
    ``max_new_tokens`` are dropped, as in the published data.
    """

    n_questions: int = 5
    rounds: int = 1
    prompt: str = ANSWER
    k: int = 16
    max_new_tokens: int = 256
    max_question_tokens: int = 512
    shard_docs: int = 64


def ask_questions(
    teacher: Teacher, documents: Sequence[str], n: int, *, rounds: int = 1, max_tokens: int = 512
) -> list[list[str]]:
    """Let a model write up to ``rounds * n`` different questions about each document."""
    asked: list[list[str]] = [[] for _ in documents]
    for _ in range(rounds):
        prompts = []
        for document, known in zip(documents, asked, strict=True):
            text = ASK.format(document=document, n=n)
            text += ASK_MORE.format(asked="\n".join(known)) if known else ""
            prompts.append(render_chat(teacher.tokenizer, text))
        replies = teacher.reply(prompts, max_tokens, 0)
        for known, reply in zip(asked, replies, strict=True):
            text = teacher.tokenizer.decode(reply.ids, skip_special_tokens=True)
            known += [q for q in read_questions(text) if q not in known][:n]
    return asked


def read_questions(text: str) -> list[str]:
    """Read questions off a model's list: one a line, bullets and numbers taken off.

    >>> read_questions("Sure!\\n1. Who made it?\\n- Where is it kept?\\n2) Who made it?")
    ['Who made it?', 'Where is it kept?']
    """
    lines = (
        re.sub(r"^\s*(?:[-*•]|\(?\d+[.):]+)\s*", "", line).strip() for line in text.splitlines()
    )
    return list(dict.fromkeys(line for line in lines if len(line) > 1 and line.endswith("?")))


def generate(
    documents: Sequence[str],
    teacher: Teacher,
    out_dir: Path | str,
    config: SelfGeneration = SelfGeneration(),
    *,
    questions: AskedBy | None = None,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Generate data for ``documents`` into ``out_dir`` and return the number of rows there.

    Goes on where an earlier run with the same documents, teacher and config stopped.
    ``questions(document, n)`` replaces the teacher as the one who asks.  ``report(done, all)`` is
    called after each shard.

    Raises ValueError for an empty document, for a folder made from other documents or by another
    teacher or config, and for a shard that cannot be read; RuntimeError while another run writes
    there; FloatingPointError when the teacher emits NaN (the shards before it are kept).
    """
    empty = [i for i, document in enumerate(documents) if not document.strip()]
    if empty:
        raise ValueError(f"document {empty[0]} of {len(documents)} is empty")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        "teacher": teacher.identity,
        "questions_by": "teacher"
        if questions is None
        else getattr(questions, "__name__", "caller"),
        "documents": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "config": dataclasses.asdict(config),
    }
    try:
        with FileLock(out / ".lock", timeout=0):
            claim(out, identity)
            starts = range(0, len(documents), config.shard_docs)
            for done, start in enumerate(starts):
                path = out / f"shard-{done:05d}.parquet"
                if path.exists():
                    _open(path)
                else:
                    part = documents[start : start + config.shard_docs]
                    rows = list(_rows(part, start, teacher, config, questions))
                    with replacing(path) as temporary:
                        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
                if report is not None:
                    report(done + 1, len(starts))
            n_rows = sum(_open(path).metadata.num_rows for path in shards(out))
            write_text(out / "README.md", _card(identity, len(documents), n_rows))
            return n_rows
    except Timeout as error:
        raise RuntimeError(
            f"another run is writing to {out}: wait for it, or choose another folder"
        ) from error


def shards(folder: Path) -> list[Path]:
    """List the shards of a folder, in order."""
    return sorted(folder.glob("shard-*.parquet"))


def read(folder: Path | str) -> Iterator[tuple[str, list[Query]]]:
    """Yield each document with its queries, in order; a document without any is left out.

    Raises FileNotFoundError for a folder without shards, ValueError for a damaged shard.
    """
    found = shards(Path(folder))
    if not found:
        raise FileNotFoundError(f"{folder} holds no shards of self-generated data")
    current, document, queries = -1, "", []
    for path in found:
        for row in _open(path).read().to_pylist():
            if row["document_index"] != current and queries:
                yield document, queries
                queries = []
            current, document = row["document_index"], row["document"]
            queries.append(
                Query(
                    tuple(row["prompt_ids"]),
                    tuple(row["answer_ids"]),
                    tuple(map(tuple, row["teacher_logprob"])),
                    tuple(map(tuple, row["teacher_idx"])),
                )
            )
    if queries:
        yield document, queries


def _rows(
    documents: Sequence[str],
    start: int,
    teacher: Teacher,
    config: SelfGeneration,
    questions: AskedBy | None,
) -> Iterator[dict[str, Any]]:
    n = config.n_questions
    if questions is None:
        asked = ask_questions(
            teacher, documents, n, rounds=config.rounds, max_tokens=config.max_question_tokens
        )
    else:
        asked = [list(questions(document, n * config.rounds)) for document in documents]
    pairs = [(i, question) for i, listed in enumerate(asked) for question in listed]
    for (i, question), taught, student in teach(teacher, documents, pairs, config):
        if taught.finished:
            yield {
                "document_index": start + i,
                "document": documents[i],
                "question": question,
                "reply": teacher.tokenizer.decode(taught.ids, skip_special_tokens=True),
                "prompt_ids": student,
                "answer_ids": taught.ids,
                "teacher_logprob": taught.logprob,
                "teacher_idx": taught.idx,
            }


def teach(
    teacher: Teacher,
    documents: Sequence[str],
    pairs: Sequence[tuple[int, str]],
    config: SelfGeneration,
) -> Iterator[tuple[tuple[int, str], Taught, list[int]]]:
    """Answer each (document, question) in context; yield it, the reply and the student's prompt.

    Raises FloatingPointError when the teacher emits NaN.
    """
    asked = [config.prompt.replace("{question}", question) for _, question in pairs]
    prompts = [
        render_chat(teacher.tokenizer, f"{documents[i]}\n\n{text}")
        for (i, _), text in zip(pairs, asked, strict=True)
    ]
    replies = teacher.reply(prompts, config.max_new_tokens, config.k)
    for pair, text, taught in zip(pairs, asked, replies, strict=True):
        check_finite(taught, f"the question {pair[1]!r} about {documents[pair[0]][:60]!r}...")
        yield pair, taught, render_chat(teacher.tokenizer, text)


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Write the manifest, or check that the one that is there says the same."""
    path = out / "manifest.json"
    if not path.exists():
        if shards(out):
            raise ValueError(f"{out} holds shards but no manifest.json: choose another folder")
        write_json(path, identity)
        return
    try:
        known = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another folder") from error
    changed = [
        f"{key} was {json.dumps(known.get(key))}, now {json.dumps(identity[key])}"
        for key in identity
        if known.get(key) != json.loads(json.dumps(identity[key]))
    ]
    if changed:
        raise ValueError(
            f"{out} was begun otherwise ({'; '.join(changed)}): choose another folder or delete it"
        )


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and generate again, the other shards are kept"
        ) from error
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(
            f"{path} has other columns than this version writes: {file.schema_arrow.names}"
        )
    return file


def _card(identity: dict[str, Any], n_docs: int, n_rows: int) -> str:
    config = identity["config"]
    return "\n".join(
        [
            "# Self-generated questions and answers",
            "",
            f"{n_rows:,} answers to questions about {n_docs:,} documents. Answers are greedy "
            f"replies of `{identity['teacher']}` with the document in its prompt; for each of "
            f"their tokens the {config['k']} likeliest are kept with their log-probabilities. "
            f"Replies that did not end within {config['max_new_tokens']} tokens were dropped.",
            "",
            f"Questions were asked by: {identity['questions_by']} ({config['rounds']} rounds of up "
            f"to {config['n_questions']}).",
            "",
            "One row a question: " + ", ".join(f"`{name}`" for name in SCHEMA.names) + ".",
            "",
            "The documents' licence holds for the questions and answers too; the model's licence "
            "may restrict what its replies are used for.",
            "",
        ]
    )
