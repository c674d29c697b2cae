"""A base that is taught to write questions, and the questions it writes about paragraphs.

A pretrained base of this size asks poor questions when told to.  Trained for some minutes on those
that people asked about other paragraphs, it picks an answer out of a sentence and asks for it, as
the generators of synthetic question answering do (Alberti et al., arXiv 1906.05416).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .artifacts import write_text
from .data.articles import articles, text_id
from .data.example import Batch, Example, Query
from .data.fact_training import titles_for
from .data.needle_training import end_of_turn
from .data.passages import Passages, sentences_of
from .data.record import Question, Record
from .home import replacing
from .lm.base import LanguageModel, load_base, render_chat
from .self_generate import claim
from .teacher import HfTeacher
from .train import pad_queries

ASK = "{title}\n\n{before}\n\nAsk about this sentence: {sentence}"
_BEFORE, _FEWEST_WORDS = 2, 5
"""Sentences that are shown before the one to ask about, and the fewest words of that one."""


@dataclasses.dataclass(frozen=True)
class Writing:
    """How the base is taught, and how much it writes.

    ``per_paragraph`` replies are drawn for each paragraph from the likeliest tokens that make up
    ``top_p``, about its sentences in turn; those that are no question, or whose answer is not in
    the sentence or is given away, are dropped.  ``shard`` paragraphs are kept at once.
    """

    epochs: int = 2
    batch: int = 64
    lr: float = 2e-4
    per_paragraph: int = 8
    top_p: float = 0.8
    max_new_tokens: int = 32
    shard: int = 4096
    seed: int = 0


def write_questions(
    base: LanguageModel,
    paragraphs: Sequence[Record],
    examples: Sequence[Record],
    out: Path,
    config: Writing = Writing(),
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Let ``base``, taught by ``examples``, write questions about paragraphs, as `articles` reads.

    One line of JSON a paragraph, gzipped.  A file that is there is left as it is.  A run that
    stopped goes on from the folder beside it, which is removed at the end.  ``base`` stays as it
    is.  Minutes on a GPU, hours without one.

    Raises ValueError where that folder was begun with other paragraphs, examples, base or config,
    and FloatingPointError when the training diverges.
    """
    if out.exists():
        return
    work = out.with_name(f"{out.name}.part")
    work.mkdir(parents=True, exist_ok=True)
    identity = {
        "base": base.fingerprint,
        "paragraphs": _hash(paragraphs),
        "examples": _hash(examples),
        "config": dataclasses.asdict(config),
    }
    with FileLock(work / ".lock"):
        claim(work, identity)
        starts = range(0, len(paragraphs), config.shard)
        paths = [work / f"{start:06d}.jsonl" for start in starts]
        teacher = None
        for start, path in zip(starts, paths, strict=True):
            if path.exists():
                continue
            teacher = teacher or _taught(base, examples, work / "writer.pt", config, report)
            part = paragraphs[start : start + config.shard]
            asked = _ask(teacher, part, config, random.Random(f"{config.seed}/{start}"))
            rows = (
                {"paragraph": text_id(record.document), "asked": pairs}
                for record, pairs in zip(part, asked, strict=True)
            )
            write_text(path, "".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in rows))
            report(f"{start + len(part)} of {len(paragraphs)} paragraphs asked about")
        with replacing(out) as new, gzip.GzipFile(new, "wb", mtime=0) as file:
            for path in paths:
                file.write(path.read_bytes())
        shutil.rmtree(work)


def read_reply(text: str, sentence: str) -> tuple[str, str] | None:
    """Read an answer and its question off a reply; None where they are of no use.

    >>> read_reply("Ann Lee\\nWho built the castle?", "The castle was built by Ann Lee.")
    ('Who built the castle?', 'Ann Lee')
    """
    answer, _, question = (part.strip() for part in text.strip().partition("\n"))
    given_away = answer.lower() in question.lower()
    if not answer or answer not in sentence or given_away or "\n" in question:
        return None
    return (question, answer) if question.endswith("?") and len(question.split()) > 2 else None


def example_of(tokenizer: Any, record: Record, question: Question, at: int) -> Query:
    """Return the prompt for a sentence of a record, and the reply that asks ``question``."""
    reply = f"{question.answers[0]}\n{question.text}"
    ids = tokenizer(reply, add_special_tokens=False).input_ids
    return Query(_prompt(tokenizer, record, at), (*ids, end_of_turn(tokenizer)))


def _prompt(tokenizer: Any, record: Record, at: int) -> tuple[int, ...]:
    sentences = sentences_of(record.document)
    before = " ".join(sentences[max(0, at - _BEFORE) : at])
    text = ASK.format(title=record.title, before=before, sentence=sentences[at])
    return tuple(render_chat(tokenizer, text))


def _taught(
    base: LanguageModel,
    examples: Sequence[Record],
    kept: Path,
    config: Writing,
    report: Callable[[str], None],
) -> HfTeacher:
    """Return a copy of the base that has learned to ask, from ``kept`` where it is there."""
    writer = dataclasses.replace(base, model=copy.deepcopy(base.model).float())
    model, device = writer.model, base.device
    if not kept.exists():
        known = [
            example_of(base.tokenizer, passage.record, question, at)
            for passage in Passages(examples).passages
            for question, at in passage.questions
        ]
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
        order = [q for e in range(config.epochs) for q in _shuffled(known, config.seed + e)]
        starts = range(0, len(order), config.batch)
        half = torch.autocast(device.type, base.model.dtype, enabled=base.model.dtype.itemsize < 4)
        for step, start in enumerate(starts):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min((step + 1) / 20, 1 - step / len(starts))
            queries = order[start : start + config.batch]
            with half:
                loss = model(**_padded(queries, device)).loss
            if not loss.isfinite():
                raise FloatingPointError(f"step {step}: the loss is {loss.item()}; lower the rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step == len(starts) - 1:
                report(f"learns to ask: step {step + 1} of {len(starts)}, loss {loss.item():.3f}")
        with replacing(kept) as new:
            torch.save(model.to(base.model.dtype).state_dict(), new)
    model.to(base.model.dtype)
    model.load_state_dict(torch.load(kept, map_location=device, weights_only=True))
    model.requires_grad_(False).eval()
    return HfTeacher(writer, 64 if device.type == "cpu" else 2048, config.top_p)


def _padded(queries: Sequence[Query], device: torch.device) -> dict[str, torch.Tensor]:
    batch = Batch.of([Example(((0,),), tuple(queries))])
    ids, mask, labels = (t.to(device) for t in pad_queries(batch, 0))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _ask(
    teacher: HfTeacher, paragraphs: Sequence[Record], config: Writing, rng: random.Random
) -> list[list[tuple[str, str]]]:
    """Return the questions and answers about each paragraph, no answer of it twice."""
    wanted: list[tuple[int, str, tuple[int, ...]]] = []
    for i, record in enumerate(paragraphs):
        sentences = sentences_of(record.document)
        usable = [j for j, s in enumerate(sentences) if len(s.split()) >= _FEWEST_WORDS]
        rng.shuffle(usable)
        for k in range(config.per_paragraph if usable else 0):
            at = usable[k % len(usable)]
            wanted.append((i, sentences[at], _prompt(teacher.tokenizer, record, at)))
    device = teacher.base.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(rng.getrandbits(32))
        replies = teacher.reply([prompt for *_, prompt in wanted], config.max_new_tokens, 0)
    found: list[dict[str, str]] = [{} for _ in paragraphs]
    for (i, sentence, _), reply in zip(wanted, replies, strict=True):
        text = teacher.tokenizer.decode(reply.ids, skip_special_tokens=True)
        if reply.finished and (pair := read_reply(text, sentence)):
            found[i].setdefault(pair[1], pair[0])
    return [[(question, answer) for answer, question in asked.items()] for asked in found]


def _shuffled(queries: Sequence[Query], seed: int) -> list[Query]:
    return random.Random(seed).sample(queries, len(queries))


def _hash(records: Sequence[Record]) -> str:
    said = "\0".join(f"{r.title}\0{r.document}\0{r.questions}" for r in records)
    return hashlib.sha256(said.encode()).hexdigest()


def main() -> None:
    """Write questions about articles, as those that ship: `just write-questions OUT.jsonl.gz`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="The file to write; one that is there is kept.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base("smollm2-135m", device=device, dtype=torch.bfloat16)
    asked = titles_for("squad", "train")
    write_questions(base, articles(), asked, parser.parse_args().out, report=print)


if __name__ == "__main__":
    main()
