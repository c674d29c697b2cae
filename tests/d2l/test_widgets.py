import re
from datetime import datetime

import document_files as files
import pytest

from d2l import DocToLoRA
from d2l.compare import Answer

widgets = pytest.importorskip("d2l.widgets", reason="the extra lab is not installed")

QUESTION = "What is the special magic number? Reply with only the number."
FILLER = "The grass is green. The sky is blue. The sun is yellow.\n"
PAGE = FILLER * 25 + "The special magic number is 4821.\n" + FILLER * 25


@pytest.fixture(scope="module")
def model():
    return DocToLoRA.from_pretrained("fig2/tiny")


def opacities(html):
    return [float(o) for o in re.findall(r"fill-opacity='([\d.]+)'", html)]


def test_a_conversation(model):
    chat = widgets.DocumentChat(model, PAGE, QUESTION)
    assert chat.ask.disabled
    chat.read.click()
    chat.wait()
    n = len(model.chunks(PAGE))
    assert chat.status.value.startswith(f"Read {n} of {n} chunks, ")
    assert opacities(chat.picture.value) == [1.0] * n
    assert not chat.read.disabled
    chat.ask.click()
    assert re.findall(r"<b style='color:\S+'>([^<]+)</b>", chat.answers.value) == [
        "D2L", "base", "in context",
    ]  # fmt: skip
    assert "4821" in chat.answers.value
    top = max(range(n), key=opacities(chat.source.value).__getitem__)
    assert f"Chunk {top + 1} of {n} moved the answer most" in chat.source.value
    assert "<mark>4821</mark>" in chat.source.value
    assert not chat.ask.disabled
    chat.strength.value = 0.0
    chat.ask.click()
    found = re.findall(r"overflow-wrap:anywhere'>([^<]*)<", chat.answers.value)
    assert found[0] == found[1] == model.ask(QUESTION)


def test_questions_are_answered_while_it_reads(model, monkeypatch):
    chat = widgets.DocumentChat(model, PAGE, QUESTION)
    asked = []
    original = model.encode

    def encode(chunks, **options):
        if chat.reading and not asked:
            asked.append(chat.reading.n_chunks)
            chat.answer()
        return original(chunks, **options)

    monkeypatch.setattr(model, "encode", encode)
    chat.start()
    chat.wait()
    assert asked == [1]
    assert "in context" in chat.answers.value


def test_uploads_of_any_format_fill_the_field(model):
    chat = widgets.DocumentChat(model)
    chat.upload.value = (upload("book.epub", files.DOCUMENTS["page.epub"]),)
    assert files.SENTENCE in chat.document.value
    assert "book.epub: press" in chat.status.value
    chat.upload.value = (upload("../../<b>.bin", b"\0\1"),)
    assert "&lt;b&gt;.bin is a binary file" in chat.status.value


def test_mistakes_are_shown_in_place(model):
    chat = widgets.DocumentChat(model, " ")
    chat.start()
    chat.wait()
    assert "the document is empty" in chat.status.value
    assert not chat.read.disabled
    chat.ask.click()
    assert "read a document first" in chat.status.value
    chat.document.value = PAGE
    chat.start()
    chat.wait()
    chat.question.value = "  "
    chat.ask.click()
    assert "ask something" in chat.status.value


def test_text_of_models_and_documents_is_escaped():
    nasty = "<script>alert(1)</script>"
    shown = widgets.side_by_side([Answer("D2L", nasty, 0.1, 0.2, 1.0)]).value
    assert nasty not in shown
    strip = widgets._strip([1.0, -0.5], ["<b>", "x"])
    assert "<b>" not in strip
    assert opacities(strip) == [1.0, 0.5]
    assert widgets.COLOURS["in context"] in strip
    assert nasty not in widgets._around(nasty, "alert")


def test_long_documents_are_shown_in_few_parts(model, monkeypatch):
    monkeypatch.setattr(widgets, "_MOST_PARTS", 2)
    chat = widgets.DocumentChat(model, PAGE, QUESTION)
    chat.start()
    chat.wait()
    chat.answer()
    assert len(opacities(chat.source.value)) == 2
    assert "of 2 moved" in chat.source.value


def test_bars_show_the_shares():
    answers = [Answer("D2L", "a", 0.1, 1, 2.0), Answer("in context", "b", 0.4, 1, 8.0)]
    widths = re.findall(r"width:(\d+)%", widgets.side_by_side(answers).value)
    assert widths == ["25", "25", "100", "100"]


def upload(name, content):
    about = {"name": name, "size": len(content), "type": "", "last_modified": datetime.now()}
    return about | {"content": memoryview(content)}
