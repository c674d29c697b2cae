"""Paragraphs of Wikipedia for training where no hub is reached, from a wheel of PyPI.

gensim carries a shortened dump of April 2016 (CC BY-SA 4.0, about a hundred articles from A to
Algorithm) to test itself with.  The text is fetched by each user and is no part of this repository.
"""

from __future__ import annotations

import bz2
import functools
import importlib.util
import random
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ..home import cache_dir, replacing
from ..lm.wheels import check_sha256, fetch_wheel
from .passages import asked_in_place, sentences_of
from .record import Record

REQUIREMENT = "gensim==4.4.0"
WHEELS = "gensim-4.4.0-*.whl"
_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_WORDS = range(40, 301)
_LATER = re.compile(r"==+ *(See also|References|Notes|External links|Further reading|Bibliography)")
_NO_PROSE = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<gallery.*?</gallery>|<math.*?</math>|\n?\{\|.*?\n\|\}"
    r"|\[\[(?:File|Image):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]",
    re.DOTALL,
)


@functools.cache
def articles() -> tuple[Record, ...]:
    """Return paragraphs of 40 to 300 words, article by article, asked about in their own words.

    A record has a question for each sentence that `passages.asked_in_place` can ask about, the same
    at every call.  The wheel is fetched at the first call (28 MB; ``D2L_WHEEL_DIR`` names a folder
    that is searched before) and what is needed of it kept in the cache.

    Raises OSError when it cannot be had, ValueError when it has been changed, and ImportError
    without mwparserfromhell (the extra ``articles``).
    """
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise ModuleNotFoundError(
            "reading articles of Wikipedia needs mwparserfromhell: pip install 'd2l-core[articles]'"
        )
    found = []
    for title, text in _pages(_dump()):
        for i, paragraph in enumerate(paragraphs(text)):
            rng = random.Random(f"{title}/{i}")
            asked = [asked_in_place(s, rng) for s in sentences_of(paragraph)]
            if questions := tuple(q for q in asked if q):
                found.append(Record(paragraph, questions, source="wikipedia", title=title))
    return tuple(found)


def paragraphs(wikitext: str) -> list[str]:
    """Return the paragraphs of plain prose of an article, without notes, tables and pictures.

    >>> text = "'''Ann''' sang in [[Bath, Somerset|Bath]]{{citation needed}}, it was said. " * 8
    >>> paragraphs(text)[0][:60]
    'Ann sang in Bath, it was said. Ann sang in Bath, it was said'
    """
    import mwparserfromhell

    prose = _NO_PROSE.sub("", _LATER.split(wikitext)[0])
    found = []
    for line in mwparserfromhell.parse(prose).strip_code().split("\n"):
        line = re.sub(r"\(\s*[;,]?\s*\)", "", line)  # a pronunciation was there
        line = re.sub(r" +([,.;:)])", r"\1", " ".join(line.split()))
        whole = line[-1:] in (".", '"', "'", ")") and not re.search(r"\||\[\[|\{\{", line)
        if whole and len(line.split()) in _WORDS:
            found.append(line)
    return found


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and wikitext of every article that is no redirection."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.endswith("}page"):
                text = page.findtext(".//{*}text") or ""
                if not text.lower().startswith("#redirect"):
                    yield page.findtext("{*}title") or "", text
                page.clear()


def _dump() -> Path:
    """Return the dump, fetched at the first call."""
    kept = cache_dir() / _DUMP
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="articles-") as work:
            wheel = fetch_wheel(REQUIREMENT, WHEELS, Path(work))
            with replacing(kept) as new:
                try:
                    with zipfile.ZipFile(wheel) as archive:
                        inner = [n for n in archive.namelist() if n.endswith(_DUMP)]
                        new.write_bytes(archive.read(inner[0]) if inner else b"")
                except zipfile.BadZipFile as error:
                    raise ValueError(f"{wheel} is damaged ({error}): delete it") from error
                check_sha256(new, _SHA256, f"delete {wheel}, it is not the expected one")
    check_sha256(kept, _SHA256, "delete it to fetch it again")
    return kept
