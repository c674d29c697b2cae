"""One shape for every document with questions: generated, or read from a public set."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fact:
    """One statement of a document: ``text`` says that ``attribute`` of ``entity`` is ``value``.

    ``form`` names the sentence form, so that train and test forms can be told apart.
    """

    entity: str
    attribute: str
    value: str
    form: str
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its accepted answers, the usual one first.

    ``facts`` are the indices of the facts that it takes; empty where no fact answers it or where
    facts are not known.  ``paraphrase`` names the question form.  Raises ValueError without text
    or without an answer.
    """

    text: str
    answers: tuple[str, ...]
    kind: str = "recall"
    facts: tuple[int, ...] = ()
    paraphrase: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("a question needs text")
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(f"the question {self.text!r} needs answers that are not empty")


@dataclasses.dataclass(frozen=True)
class Record:
    """A document with its questions.  ``source`` names the set, ``title`` the article."""

    document: str
    questions: tuple[Question, ...]
    facts: tuple[Fact, ...] = ()
    source: str = ""
    title: str = ""

    def __post_init__(self) -> None:
        if not self.document.strip():
            raise ValueError(f"a record of {self.source or 'unknown source'} has an empty document")
