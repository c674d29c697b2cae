"""Documents on disk as text, a piece at a time: plain text, HTML, PDF, Word, EPUB, notebooks.

Text and notebooks need nothing beyond Python, the other formats the extra `documents` (pypdf,
mammoth and markdownify, all pure Python).  Markup becomes Markdown without emphasis, links, images.
"""

from __future__ import annotations

import codecs
import importlib.util
import io
import json
import logging
import posixpath
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree


class DocumentError(ValueError):
    """A file that cannot be read as a document; the message says why and what to do."""


WHOLE_MIB = 64
"""Largest web page, notebook, Word text or EPUB chapter, in MiB: these are parsed in one piece."""
_BLOCK_BYTES = 1 << 16
_INLINE = ["a", "img", "b", "strong", "em", "i"]
_UNSEEN = ("head", "script", "style", "noscript", "template")


def read(path: str | Path) -> Iterator[str]:
    """Open a document and return an iterator over its text; joined, the pieces are the text.

    A piece is 64 KiB of a text file, a page of a PDF, a chapter of an EPUB or a cell of a notebook
    (its outputs left out), so memory does not grow with these.  Text is UTF-8, or UTF-16 with its
    byte order mark; a file whose suffix is not in `SUFFIXES` is read as text if it is text.

    Raises FileNotFoundError; ModuleNotFoundError naming the extra that is missing; DocumentError,
    perhaps only while iterating, for a folder, a file that is empty, binary, damaged, encrypted, in
    another encoding or larger than `WHOLE_MIB` where it is parsed whole, and a PDF without text.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     page = Path(folder) / "page.txt"
    ...     _ = page.write_text("The magic number is 0417.")
    ...     "".join(read(page))
    'The magic number is 0417.'
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DocumentError(f"{path} is a folder; give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    reader, needs = _READERS.get(path.suffix.lower(), (_text, ()))
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reading {path.suffix} files needs {' and '.join(missing)}: "
            "pip install 'd2l-core[documents]'"
        )
    return _pieces(path, reader)


def read_text(path: str | Path) -> str:
    """Return the whole text of a document; raises as `read` does."""
    return "".join(read(path))


def _pieces(path: Path, reader: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    """Yield what ``reader`` finds; turn whatever a damaged file makes it raise into one message."""
    blank = True
    try:
        for piece in reader(path):
            blank = blank and not piece.strip()
            yield piece
    except Exception as error:
        if isinstance(error, DocumentError) or getattr(error, "errno", None):
            raise
        kind = path.suffix.lstrip(".").upper() or "text"
        raise DocumentError(f"{path} cannot be read as {kind}; is it damaged? ({error})") from error
    if blank and reader is _pdf:
        raise DocumentError(
            f"{path} has pages but no text, as scans do: recognise the text first, for example "
            f"with `ocrmypdf {path.name} with-text.pdf`"
        )
    if blank:
        raise DocumentError(f"{path} is empty: there is no text to read")


def _text(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if file.read(2) in marks else "utf-8-sig"
        file.seek(0)
        decoder = codecs.getincrementaldecoder(encoding)()
        newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
        while True:
            block = file.read(_BLOCK_BYTES)
            if encoding != "utf-16" and b"\0" in block:
                raise DocumentError(_binary(path))
            try:
                yield newlines.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise DocumentError(
                    f"{path} is not {encoding.removesuffix('-sig').upper()} text: byte {at} "
                    f"({error.object[error.start]:#04x}) does not fit; save it as UTF-8, for "
                    f"example with `iconv -f latin1 -t utf-8 {path.name}`"
                ) from None
            if not block:
                return


def _binary(path: Path) -> str:
    suffix = path.suffix.lower()
    what = f"a binary file ({suffix})" if suffix else "a binary file"
    return f"{path} is {what}, no document; read are {', '.join(SUFFIXES)} and other UTF-8 text"


def _html(path: Path) -> Iterator[str]:
    yield _markdown(_whole(path.name, path.stat().st_size, path.read_bytes))


def _markdown(markup: bytes) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(markup, "html.parser")
    for tag in soup(_UNSEEN):
        tag.decompose()
    plain = dict.fromkeys(("escape_asterisks", "escape_underscores", "escape_misc"), False)
    text = MarkdownConverter(strip=_INLINE, heading_style="ATX", **plain).convert_soup(soup)
    return text.replace("\xa0", " ").strip() + "\n"


def _pdf(path: Path) -> Iterator[str]:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    with path.open("rb") as file:
        try:
            for page in PdfReader(file).pages:
                yield page.extract_text().rstrip() + "\n\n"
        except FileNotDecryptedError:
            raise DocumentError(f"{path} is encrypted: save a copy without its password") from None


def _docx(path: Path) -> Iterator[str]:
    import mammoth

    with zipfile.ZipFile(path) as archive:
        size = sum(i.file_size for i in archive.infolist() if i.filename.endswith(".xml"))
    no_images = mammoth.images.img_element(lambda image: {})

    def markup() -> bytes:
        with path.open("rb") as file:
            return mammoth.convert_to_html(file, convert_image=no_images).value.encode()

    yield _markdown(_whole(path.name, size, markup))


def _epub(path: Path) -> Iterator[str]:
    """Read the chapters in the order of the spine (EPUB 3.3, section 5.7)."""
    with zipfile.ZipFile(path) as archive:

        def part(name: str) -> bytes:
            size = archive.getinfo(name).file_size
            return _whole(f"{path.name}/{name}", size, lambda: archive.read(name))

        def parsed(name: str) -> Any:
            return ElementTree.fromstring(part(name))

        package = parsed("META-INF/container.xml").find(".//{*}rootfile").get("full-path")
        book = parsed(package)
        href = {item.get("id"): item.get("href") for item in book.iterfind(".//{*}item")}
        for chapter in book.iterfind(".//{*}itemref"):
            name = posixpath.join(posixpath.dirname(package), unquote(href[chapter.get("idref")]))
            yield _markdown(part(posixpath.normpath(name))) + "\n"


def _ipynb(path: Path) -> Iterator[str]:
    page = json.loads(_whole(path.name, path.stat().st_size, path.read_bytes))
    for cell in page["cells"]:
        yield "".join(cell["source"]).rstrip() + "\n\n"


def _whole(name: str, n_bytes: int, get: Callable[[], bytes]) -> bytes:
    if n_bytes > WHOLE_MIB << 20:
        raise DocumentError(
            f"{name} has {n_bytes >> 20} MiB, at most {WHOLE_MIB} MiB can be parsed in one piece: "
            "split it, or convert it to a text file, which is read piece by piece at any size"
        )
    return get()


_READERS: dict[str, tuple[Callable[[Path], Iterator[str]], tuple[str, ...]]] = {
    ".txt": (_text, ()),
    ".md": (_text, ()),
    ".html": (_html, ("markdownify",)),
    ".htm": (_html, ("markdownify",)),
    ".xhtml": (_html, ("markdownify",)),
    ".pdf": (_pdf, ("pypdf",)),
    ".docx": (_docx, ("mammoth", "markdownify")),
    ".epub": (_epub, ("markdownify",)),
    ".ipynb": (_ipynb, ()),
}
SUFFIXES = tuple(_READERS)
"""Endings of the file names that are read as their format; others are read as text."""
