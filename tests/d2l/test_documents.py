import subprocess
import sys
import tracemalloc

import document_files as files
import pytest
from document_files import DOCUMENTS, SENTENCE

from d2l import documents
from d2l.documents import DocumentError, read, read_text


@pytest.fixture
def write(tmp_path):
    """Write a file; return its path."""

    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_format_gives_its_sentence_as_text(write, name):
    text = read_text(write(name, DOCUMENTS[name]))
    assert SENTENCE in text
    for markup in ("<", "*", "\r", "\xa0", "alert", "color", "OUTPUT", "A title"):
        assert markup not in text


def test_suffixes_are_those_that_are_read(write):
    read_now = {f".{name.split('.')[1]}" for name in DOCUMENTS}
    assert set(documents.SUFFIXES) - {".htm", ".xhtml"} == read_now
    assert SENTENCE in read_text(write("PAGE.PDF", DOCUMENTS["page.pdf"]))
    assert read_text(write("notes.rst", b"Other text.\n")) == "Other text.\n"
    assert read_text(write("README", b"Other text.\n")) == "Other text.\n"


def test_pieces_keep_their_order(write):
    pages = list(read(write("a.pdf", files.pdf("One.", "Two.", "Three."))))
    assert [p.strip() for p in pages] == ["One.", "Two.", "Three."]
    chapters = list(read(write("a.epub", files.epub("One.", "Two.", "Three."))))
    assert [c.split()[-1] for c in chapters] == ["One.", "Two.", "Three."]
    cells = list(read(write("a.ipynb", files.ipynb(("code", "a\nb"), ("markdown", "c")))))
    assert cells == ["a\nb\n\n", "c\n\n"]


def test_structure_survives_as_markdown(write):
    body = (
        "<h2>The <b>list</b></h2><ul><li>x_y</li><li>2 * 3 &lt; 7</li></ul>"
        "<table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td>é</td></tr></table>"
        '<p>See <a href="http://x">there</a><img src="data:image/png;base64,AAAA">.</p>'
    )
    text = read_text(write("a.html", files.html(body)))
    assert text.startswith("## The list\n\n* x_y\n* 2 * 3 < 7\n")
    assert "| k | v |\n| --- | --- |\n| 1 | é |" in text
    assert text.endswith("See there.\n")
    assert "| a | b |" in read_text(write("a.docx", files.docx("x")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_decoded_across_blocks(write, encoding, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 3)
    text = "Zürich, 東京, 🙂\nline\n"
    data = text.replace("\n", "\r\n").encode(encoding)
    pieces = list(read(write("a.txt", data)))
    assert "".join(pieces) == text
    assert len(pieces) > len(data) // 3


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", b"x" * 100_000 + b"caf\xe9 ole", r"not UTF-8 text: byte 100003 \(0xe9\)"),
        ("a.txt", b"\xff\xfea\x00b", "not UTF-16 text"),
        ("a.txt", b"caf\xc3", r"byte 3 \(0xc3\)"),
        ("a.md", b"ab\0cd", "is a binary file"),
        ("a.xlsx", b"PK\x03\x04\0\0", r"binary file \(\.xlsx\), no document; read are \.txt, "),
        ("a.pdf", b"", "cannot be read as PDF; is it damaged"),
        ("a.pdf", b"%PDF-1.7 and no more", "cannot be read as PDF; is it damaged"),
        ("a.pdf", files.pdf("", ""), r"no text, as scans do.*ocrmypdf a\.pdf"),
        ("a.pdf", DOCUMENTS["page.docx"], "cannot be read as PDF"),
        ("a.docx", b"PK\x03\x04 and no more", "cannot be read as DOCX; is it damaged"),
        ("a.docx", files.zipped({"x": "y"}), "cannot be read as DOCX"),
        ("a.epub", files.zipped({"x": "y"}), "cannot be read as EPUB.*container.xml"),
        ("a.epub", DOCUMENTS["page.pdf"], "cannot be read as EPUB"),
        ("a.epub", files.epub(), "is empty"),
        ("a.html", files.html(""), "is empty"),
        ("a.ipynb", b"{", "cannot be read as IPYNB"),
        ("a.ipynb", b"[]", "cannot be read as IPYNB"),
        ("a.ipynb", files.ipynb(), "is empty"),
    ],
)
def test_bad_files_are_named_with_the_reason(write, name, data, complaint):
    path = write(name, data)
    with pytest.raises(DocumentError, match=complaint) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_encrypted_pdf(write):
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(PdfReader(write("a.pdf", DOCUMENTS["page.pdf"])))
    writer.encrypt("secret", algorithm="RC4-128")
    with (path := write("b.pdf", b"")).open("wb") as file:
        writer.write(file)
    with pytest.raises(DocumentError, match="is encrypted: save a copy without its password"):
        read_text(path)


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none"):
        read(tmp_path / "none.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["page.html", "page.docx", "page.epub", "page.ipynb"])
def test_what_is_parsed_whole_has_a_limit(write, name, monkeypatch):
    monkeypatch.setattr(documents, "WHOLE_MIB", 0)
    with pytest.raises(DocumentError, match=r"at most 0 MiB .* convert it to a text file"):
        read_text(write(name, DOCUMENTS[name]))


def test_archive_that_unpacks_to_much_more_is_refused(write):
    bomb = files.zipped({"word/document.xml": "x" * ((documents.WHOLE_MIB << 20) + (1 << 20))})
    assert len(bomb) < 1 << 20
    with pytest.raises(DocumentError, match=f"has {documents.WHOLE_MIB + 1} MiB"):
        read_text(write("a.docx", bomb))


def test_100_mib_of_text_are_streamed(write):
    path = write("a.txt", b"")
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"0123456789abcde\n" * (1 << 16))
    tracemalloc.start()
    try:
        n_chars = sum(map(len, read(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_chars == 100 << 20
    assert peak < 2 << 20


def test_missing_extra_is_named_before_reading(write, monkeypatch):
    find = documents.importlib.util.find_spec
    gone = ("mammoth", "pypdf", "markdownify")
    monkeypatch.setattr(
        documents.importlib.util, "find_spec", lambda n: None if n in gone else find(n)
    )
    for name, package in (("page.pdf", "pypdf"), ("page.docx", "mammoth and markdownify")):
        message = rf"needs {package}: pip install 'd2l-core\[documents\]'"
        with pytest.raises(ModuleNotFoundError, match=message):
            read(write(name, DOCUMENTS[name]))
    for name in ("page.txt", "page.ipynb"):
        assert SENTENCE in read_text(write(name, DOCUMENTS[name]))


def test_import_brings_no_converter():
    code = (
        "import sys, d2l.documents\n"
        "heavy = {'pypdf', 'mammoth', 'markdownify', 'bs4', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
