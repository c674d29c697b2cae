import os
import re

import pytest
from document_files import epub
from playwright.sync_api import expect

import d2l

LIMIT_S = 240
MODEL = os.environ.get("D2L_MODEL", "fig2/tiny")
QUESTION = "What is the special magic number? Reply with only the number."


def test_fig2_runs_at_smoke(open_page):
    page = open_page("fig2.ipynb", scale="smoke")
    page.run_all(LIMIT_S)
    picture = page.tab.locator(".jp-OutputArea-output img").first
    assert picture.evaluate("img => img.naturalWidth") > 300
    assert page.tab.get_by_text("not testable at this scale").count() > 0
    page.shot("smoke")


def test_quickstart_answers_from_the_page(open_page):
    page = open_page("00_quickstart.ipynb", model=MODEL)
    page.run_all(LIMIT_S)
    shown = page.tab.locator(".jp-OutputArea-output").all_inner_texts()
    assert re.fullmatch(r"\d+ chunks, \d\.\d MiB", shown[0].strip())
    assert shown[1].strip() == "'7314'"
    assert shown[2].split()[:2] == ["D2L", "7314"]
    assert "ms to the first token" in shown[2]
    assert "documents: ['page.txt', 'a note']\nboth: 7314\n" in shown[3]
    page.shot("answers")


@pytest.fixture
def chat(open_page):
    page = open_page("01_chat_with_a_document.ipynb", model=MODEL)
    page.run_all(LIMIT_S)
    return page


def read(page):
    page.tab.get_by_role("button", name="Read it").click()
    expect(page.tab.get_by_text("The adapter has")).to_be_visible(timeout=LIMIT_S * 1000)


def upload(page, name, content):
    with page.tab.expect_file_chooser() as chooser:
        page.tab.get_by_role("button", name="Upload (").click()
    kind = "application/octet-stream"
    chooser.value.set_files({"name": name, "mimeType": kind, "buffer": content})


def ask(page, question, strength="1"):
    field = page.tab.get_by_placeholder("Ask about the document")
    field.fill("")
    field.press_sequentially(question)
    page.tab.get_by_role("button", name="Ask").click()
    done = page.tab.get_by_text(f"Answered with strength {strength}.")
    expect(done).to_be_visible(timeout=LIMIT_S * 1000)
    columns = page.tab.locator(".widget-html b")
    return {
        b.inner_text(): b.locator("xpath=following-sibling::div[1]").inner_text()
        for b in columns.all()[:3]
    }


def test_chat_reads_answers_and_shows_the_source(chat):
    ask_button = chat.tab.get_by_role("button", name="Ask")
    expect(ask_button).to_be_disabled()
    read(chat)
    strips = chat.tab.locator(".widget-html svg")
    assert strips.nth(0).locator("rect[fill-opacity='1.00']").count() >= 3
    chat.shot("read")

    answers = ask(chat, QUESTION)
    assert list(answers) == ["D2L", "base", "in context"]
    assert answers["D2L"] == "7314"
    assert answers["base"] != "7314"
    found = chat.tab.locator(".widget-html b", has_text="moved the answer most")
    expect(found).to_be_visible()
    assert chat.tab.locator("mark").inner_text() == "7314"
    opacities = [
        float(r.get_attribute("fill-opacity")) for r in strips.nth(1).locator("rect").all()
    ]
    assert sorted(opacities)[-1] == 1.0
    assert sorted(opacities)[-2] < 0.2
    chat.shot("answered")


def test_chat_takes_an_uploaded_book_and_silences_it(chat):
    sentence = "The special magic number is 5120."
    book = epub("The grass is green.", f"The sky is blue. {sentence}")
    upload(chat, "book.epub", book)
    expect(chat.tab.get_by_text("press Read it")).to_be_visible(timeout=LIMIT_S * 1000)
    text = chat.tab.get_by_placeholder("Paste a document").input_value()
    assert sentence in text
    read(chat)
    model = d2l.DocToLoRA.from_pretrained(MODEL)
    assert ask(chat, QUESTION)["D2L"] == model.ask(QUESTION, model.internalize(text))

    slider = chat.tab.locator(".widget-slider .noUi-handle")
    slider.focus()
    slider.press("Home")
    expect(chat.tab.locator(".widget-readout")).to_have_text("0.00")
    answers = ask(chat, QUESTION, strength="0")
    assert answers["D2L"] == answers["base"]


def test_chat_says_what_is_wrong(chat):
    upload(chat, "x.bin", b"\0\1\2")
    expect(chat.tab.get_by_text("x.bin is a binary file")).to_be_visible(timeout=LIMIT_S * 1000)
    chat.tab.get_by_placeholder("Paste a document").fill(" ")
    chat.tab.get_by_role("button", name="Read it").click()
    expect(chat.tab.get_by_text("the document is empty")).to_be_visible(timeout=LIMIT_S * 1000)
    expect(chat.tab.get_by_role("button", name="Read it")).to_be_enabled()
