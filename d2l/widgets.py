"""Chat with a document in a notebook: paste or upload it, watch it being read, ask three ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import ipywidgets as w

from . import compare
from .compare import Answer
from .documents import read_text
from .model import DocToLoRA
from .reading import Reading

COLOURS = {"D2L": "#0072B2", "base": "#888888", "in context": "#E69F00"}
_MOST_PARTS = 32


class DocumentChat(w.VBox):
    """A document, a question, three answers, and where in the document the answer came from.

    Reading goes on beside the page, and questions may be asked meanwhile.  ``question`` and
    ``document`` are what the fields show at first.
    """

    def __init__(self, model: DocToLoRA, document: str = "", question: str = "") -> None:
        self.model, self.text = model, ""
        self.reading: Reading | None = None
        self.worker: threading.Thread | None = None
        wide = w.Layout(width="98%")
        self.document = w.Textarea(document, placeholder="Paste a document", rows=8, layout=wide)
        self.upload = w.FileUpload(description="Upload")
        self.read = w.Button(description="Read it", button_style="primary", icon="book")
        self.status, self.picture = w.HTML("Nothing read yet."), w.HTML()
        self.question = w.Text(question, placeholder="Ask about the document", layout=wide)
        self.strength = w.FloatSlider(1.0, min=0.0, max=2.0, step=0.25, description="Strength")
        self.ask = w.Button(
            description="Ask", button_style="primary", icon="question", disabled=True
        )
        self.answers, self.source = w.HTML(), w.HTML()
        self.read.on_click(lambda _: self.start())
        self.ask.on_click(lambda _: self._guarded(self.answer))
        self.upload.observe(lambda _: self._guarded(self._uploaded), "value")
        super().__init__(
            [
                self.document,
                w.HBox([self.upload, self.read]),
                self.status,
                self.picture,
                self.question,
                w.HBox([self.ask, self.strength]),
                self.answers,
                self.source,
            ]
        )

    def start(self) -> None:
        """Read the text of the field in a thread of its own; `wait` waits for it."""
        self.ask.disabled, self.answers.value, self.source.value = True, "", ""
        self.read.disabled = True
        text = self.document.value
        self.worker = threading.Thread(
            target=self._guarded, args=(lambda: self._read(text),), daemon=True
        )
        self.worker.start()

    def wait(self) -> None:
        """Wait until the document has been read."""
        if self.worker:
            self.worker.join()

    def answer(self) -> None:
        """Ask three ways, show each answer as it comes, then look for its source."""
        question, reading = self.question.value.strip(), self.reading
        if reading is None or not reading.n_chunks or not question:
            raise ValueError("ask something" if reading else "read a document first")
        self.ask.disabled, self.source.value = True, ""
        adapter = reading.adapter.scaled(self.strength.value)
        shown: list[Answer] = []
        try:
            for answer in compare.compare(
                self.model, question, adapter, self.text, max_new_tokens=48
            ):
                shown.append(answer)
                self.answers.value = side_by_side(shown).value
            self._find_source(question, shown[0].text)
            self.status.value = f"Answered with strength {self.strength.value:g}."
        finally:
            self.ask.disabled = False

    def _read(self, text: str) -> None:
        try:
            self.text, self.reading = text, None
            reading = self.model.read(text, chunks_at_once=1)
            self.picture.value = _strip([0.0] * (reading.total_chunks or 1))
            for n_tok in reading:
                self.reading, self.ask.disabled = reading, False
                total = reading.total_chunks or reading.n_chunks
                done = [1.0] * reading.n_chunks + [0.0] * (total - reading.n_chunks)
                self.status.value = f"Read {reading.n_chunks} of {total} chunks, {n_tok} tokens."
                self.picture.value = _strip(done)
            self.status.value += f" The adapter has {reading.adapter.nbytes / 2**20:.1f} MiB."
        finally:
            self.read.disabled = False

    def _find_source(self, question: str, answer: str) -> None:
        reading = self.reading
        if reading is None or not answer.strip() or len(reading.adapter.chunks) < 2:
            return
        adapter = reading.adapter.scaled(self.strength.value)
        n = len(adapter.chunks)
        size = -(-n // _MOST_PARTS)
        parts = [range(n)[i : i + size] for i in range(0, n, size)]
        moved = compare.influence(self.model, question, answer, adapter, parts)
        top = max(range(len(moved)), key=moved.__getitem__)
        chunks = [s for c in self.model.chunks(self.text) for s in self.model.sentences(c)]
        excerpts = [
            self.model.reader.tokenizer.decode(
                [i for c in part for i in chunks[c]], skip_special_tokens=True
            )
            for part in parts
        ]
        self.source.value = (
            f"<b>Chunk {top + 1} of {len(parts)} moved the answer most</b> ({moved[top]:+.1f} nats)"
            f"{_strip(moved, excerpts)}<small>Blue made it likelier, orange less likely; a chunk's "
            f"text shows under the pointer.</small><blockquote>{_around(excerpts[top], answer)}"
            "</blockquote>"
        )

    def _uploaded(self) -> None:
        for file in self.upload.value:
            with TemporaryDirectory() as folder:
                path = Path(folder) / Path(file["name"]).name
                path.write_bytes(file["content"])
                self.document.value = read_text(path)
            self.status.value = f"{escape(file['name'])}: press <b>Read it</b>."

    def _guarded(self, action: Callable[[], None]) -> None:
        """Show what went wrong where the user looks, and no traceback."""
        try:
            action()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            self.status.value = f"<span style='color:#D55E00'>{escape(str(error))}</span>"


def side_by_side(answers: Iterable[Answer]) -> w.HTML:
    """Show answers in columns with bars for the time to the first token and for memory.

    >>> print(side_by_side([Answer("D2L", "4821", 0.05, 0.1, 2.0)]).value[:14])
    <div style='di
    """
    answers = list(answers)
    slowest = max(a.first_token_s for a in answers)
    largest = max(a.mib for a in answers)
    columns = "".join(
        f"<div style='flex:1;min-width:0'><b style='color:{COLOURS[a.name]}'>{escape(a.name)}</b>"
        f"<div style='min-height:4em;margin:6px 0;overflow-wrap:anywhere'>{escape(a.text)}</div>"
        f"{_bar(a.first_token_s / slowest, COLOURS[a.name])}"
        f"{a.first_token_s * 1000:.0f} ms to the first token"
        f"{_bar(a.mib / largest, COLOURS[a.name])}{a.mib:.1f} MiB kept</div>"
        for a in answers
    )
    return w.HTML(f"<div style='display:flex;gap:24px;line-height:1.5'>{columns}</div>")


def _bar(share: float, colour: str) -> str:
    return (
        f"<div style='background:{colour};width:{max(1.0, 100 * share):.0f}%;height:8px;"
        "margin-top:6px'></div>"
    )


def _strip(values: Sequence[float], titles: Sequence[str] = ()) -> str:
    """Draw chunks as a strip: blue where a value is positive, orange where negative."""
    most = max(map(abs, values), default=0.0) or 1.0
    width = 100 / len(values)
    cells = ""
    for i, value in enumerate(values):
        colour = COLOURS["D2L"] if value > 0 else COLOURS["in context"]
        title = f"<title>{i + 1}: {escape(titles[i][:400])}</title>" if titles else ""
        cells += (
            f"<rect x='{i * width:.2f}%' width='{width * 0.94:.2f}%' height='26' fill='{colour}' "
            f"fill-opacity='{abs(value) / most:.2f}' stroke='#888888' stroke-width='1'>{title}"
            "</rect>"
        )
    return f"<svg width='100%' height='28' role='img'>{cells}</svg>"


def _around(text: str, answer: str, n_chars: int = 300) -> str:
    """Cut a text around the answer, or at its start, with the answer marked."""
    at = max(0, text.find(answer))
    start = max(0, at - n_chars // 2)
    cut = escape(text[start : start + n_chars])
    return f"…{cut.replace(escape(answer), f'<mark>{escape(answer)}</mark>')}…"
