"""Make small documents of every format by hand, byte by byte where there is no writer."""

import io
import json
import zipfile

SENTENCE = "The magic number is 4821."


def pdf(*pages: str) -> bytes:
    """A PDF with one page per text, its lines one below the other."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
    ]
    for i, text in enumerate(pages):
        font = "/Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * i} 0 R "
            f"/Resources << {font} >> >>"
        )
        lines = " ".join(f"({line}) Tj T*" for line in text.splitlines())
        stream = f"BT /F1 12 Tf 72 700 Td 14 TL {lines} ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = b"0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % at for at in offsets)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF"
    return out + f"xref\n0 {len(objects) + 1}\n".encode() + table + trailer.encode()


def zipped(files: dict[str, str]) -> bytes:
    """A zip archive of these files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def docx(*paragraphs: str) -> bytes:
    """A Word document with these paragraphs and a table of two cells, a and b."""
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats"
    cells = "".join(f"<w:tc><w:p><w:r><w:t>{c}</w:t></w:r></w:p></w:tc>" for c in "ab")
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    return zipped(
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
            f'<Default Extension="rels" ContentType="{kind}-package.relationships+xml"/>'
            '<Override PartName="/word/document.xml" '
            f'ContentType="{kind}-officedocument.wordprocessingml.document.main+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
            f'Type="{office}/officeDocument" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f'<w:document xmlns:w="{word}"><w:body>{body}'
            f"<w:tbl><w:tr>{cells}</w:tr></w:tbl></w:body></w:document>",
        }
    )


def epub(*chapters: str) -> bytes:
    """An EPUB whose spine lists the chapters; their files are stored in another order."""
    names = [f"part {i}.xhtml" for i in range(len(chapters))]
    items = "".join(
        f'<item id="c{i}" href="../text/part%20{i}.xhtml" media-type="application/xhtml+xml"/>'
        for i in reversed(range(len(chapters)))
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    pages = {
        f"text/{name}": '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>A title</title>'
        f"</head><body><h1>Chapter {i}</h1><p>{text}</p></body></html>"
        for i, (name, text) in enumerate(zip(names, chapters, strict=True))
    }
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container version="1.0" '
            'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
            "OEBPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
            **dict(reversed(pages.items())),
        }
    )


def ipynb(*cells: tuple[str, str]) -> bytes:
    """A notebook of (kind, source) cells, each code cell with an output."""
    page = [
        {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        | ({"outputs": [{"text": "OUTPUT"}]} if kind == "code" else {})
        for kind, source in cells
    ]
    return json.dumps({"cells": page, "metadata": {}, "nbformat": 4}).encode()


def html(body: str) -> bytes:
    """A web page with a style, a script and a title around its body."""
    return (
        "<!doctype html><html><head><meta charset='utf-8'><title>A title</title>"
        f"<style>p {{color: red}}</style></head><body><script>alert(1)</script>{body}</body></html>"
    ).encode()


DOCUMENTS = {
    "page.txt": f"A page.\r\n{SENTENCE}\r\n".encode(),
    "page.md": f"# Head\n\n{SENTENCE}\n".encode(),
    "page.html": html(f"<h1>Head</h1><p>{SENTENCE}</p>"),
    "page.pdf": pdf("A page.\nIts second line.", SENTENCE),
    "page.docx": docx("A page.", SENTENCE),
    "page.epub": epub("A page.", SENTENCE),
    "page.ipynb": ipynb(("markdown", "# Head\nA page."), ("code", f'print("{SENTENCE}")')),
}
