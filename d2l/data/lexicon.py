"""What an invented encyclopedia is written with: attributes, forms, values and names.

A lexicon is written as a text table, one attribute a block of three lines:

    person.pet: animal; pet
    {e} keeps a {v}. | {e} lives with a {v}. || The company of a {v} comforts {e}.
    What animal does {e} keep? || Which animal shares the house of {e}?

Name, kind of value and noun; sentence forms; question forms.  What stands behind ``||`` is for
held-out documents only.  Frames serve every attribute through its noun ``{n}``.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence

_TEST_SHARE = 4
_HELDOUT_EVERY = 6


@dataclasses.dataclass(frozen=True)
class Form:
    """A text with holes, and its name."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Forms:
    """Texts for training documents and, disjoint from them, for held-out ones."""

    train: tuple[Form, ...]
    test: tuple[Form, ...]

    @classmethod
    def parse(cls, line: str, name: str) -> Forms:
        """Read ``one | two || three``; forms are named ``name0``, ``name1``, ... in order."""
        known, held_out = (part.split("|") for part in line.split("||"))
        texts = [text.strip() for text in (*known, *held_out)]
        if not all(texts) or len(set(texts)) < len(texts):
            raise ValueError(f"the forms {line!r} are empty or repeated")
        forms = tuple(Form(f"{name}{i}", text) for i, text in enumerate(texts))
        return cls(forms[: len(known)], forms[len(known) :])

    def of(self, split: str) -> tuple[Form, ...]:
        """Return the forms of a split, or ``all``."""
        return {"train": self.train, "test": self.test, "all": self.train + self.test}[split]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Something that can be said about an entity of type ``of``.

    ``kind`` is a list of words, a numeric range ``number LOW HIGH``, or a type of entity, in which
    case the value names one and the attribute is a link to it.
    """

    name: str
    of: str
    kind: str
    noun: str
    sentences: Forms
    questions: Forms


@dataclasses.dataclass(frozen=True)
class Rule:
    """A general statement that favours ``{a}`` over ``{b}``, and situations that it decides.

    Each situation names two people and asks for the one with ``{a}``.
    """

    name: str
    of: str
    kind: str
    sentences: Forms
    situations: Forms


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Everything a generator needs.

    Frames also know ``{art}``, the article of a ``countable`` kind of value, and ``{who}``.
    ``numeric`` maps an operation to its question forms, ``phrases`` a kind to two lists and what
    joins their words; ``people`` are those of situations.
    """

    attributes: Mapping[str, tuple[Attribute, ...]]
    rules: Mapping[str, tuple[Rule, ...]]
    sentence_frames: Forms
    question_frames: Forms
    numeric: Mapping[str, Forms]
    values: Mapping[str, tuple[str, ...]]
    phrases: Mapping[str, tuple[str, str, str]]
    people: Mapping[str, tuple[str, ...]]
    name: Callable[[random.Random, str, str], str]
    unknown: tuple[str, ...]
    countable: frozenset[str] = frozenset()

    def article(self, kind: str) -> str:
        """Return what stands before a value of this kind in a frame."""
        return "a " if kind in self.countable else ""

    def group(self, kind: str) -> str:
        """Return what a kind of value is: ``words``, ``phrases``, ``numbers`` or ``names``."""
        if kind in self.values:
            return "words"
        if kind in self.phrases:
            return "phrases"
        return "numbers" if kind.startswith("number") else "names"

    def draw(self, rng: random.Random, kind: str, split: str, words: str) -> str:
        """Draw a value.  ``words`` is ``seen``, ``heldout`` or ``all`` of the word lists."""
        if kind in self.values:
            return pick(rng, seen_words(self.values[kind], words))
        if kind in self.phrases:
            first, joint, second = self.phrases[kind]
            one = pick(rng, seen_words(self.values[first], words))
            options = seen_words(self.values[second], words)
            other = pick(rng, options)
            while other == one:
                other = pick(rng, options)
            return f"{one}{joint}{other}"
        if kind.startswith("number"):
            low, high = map(int, kind.split()[1:])
            return str(low + int(rng.random() * (high - low + 1)))
        return self.name(rng, kind, split)


def parse_attributes(table: str) -> dict[str, tuple[Attribute, ...]]:
    """Read a table of attributes, by the type of their entity."""
    found: dict[str, tuple[Attribute, ...]] = {}
    for head, sentences, questions in _blocks(table):
        name, _, rest = head.partition(":")
        kind, _, noun = (part.strip() for part in rest.partition(";"))
        of = name.partition(".")[0]
        forms = Forms.parse(sentences, f"{name}/s"), Forms.parse(questions, f"{name}/q")
        found[of] = (*found.get(of, ()), Attribute(name, of, kind, noun, *forms))
    return found


def parse_rules(table: str) -> dict[str, tuple[Rule, ...]]:
    """Read a table of rules, by the type of their entity; a head is ``type.name: kind``."""
    found: dict[str, tuple[Rule, ...]] = {}
    for head, sentences, situations in _blocks(table):
        name, _, kind = (part.strip() for part in head.partition(":"))
        of = name.partition(".")[0]
        forms = Forms.parse(sentences, f"{name}/s"), Forms.parse(situations, f"{name}/q")
        found[of] = (*found.get(of, ()), Rule(name, of, kind, *forms))
    return found


def parse_words(table: str) -> dict[str, tuple[str, ...]]:
    """Read lists of words: one list a line, its name before a colon."""
    lines = (line.partition(":") for line in table.strip().splitlines())
    return {name.strip(): tuple(w.strip() for w in rest.split(",")) for name, _, rest in lines}


@functools.cache
def seen_words(listed: tuple[str, ...], which: str) -> tuple[str, ...]:
    """Return ``all`` of a list, the sixth of it that a hash chooses (``heldout``), or the others.

    The hash is the word's alone, so a word is held out of every list that it stands in.
    """
    if which == "all":
        return listed
    held_out = which == "heldout"
    return tuple(w for w in listed if (zlib.crc32(w.encode()) % _HELDOUT_EVERY == 0) == held_out)


def belongs(text: str, split: str) -> bool:
    """Tell whether a name is one of ``split``: a quarter of all names, by hash, are for test."""
    return (zlib.crc32(text.encode()) % _TEST_SHARE == 0) == (split == "test")


def pick(rng: random.Random, options: Sequence[str]) -> str:
    """Draw one of ``options``."""
    return options[int(rng.random() * len(options))]


def _blocks(table: str) -> list[tuple[str, str, str]]:
    blocks = [tuple(block.strip().splitlines()) for block in table.strip().split("\n\n")]
    for block in blocks:
        if len(block) != 3:
            raise ValueError(f"a block of the table has {len(block)} lines, not 3: {block[:1]}")
    return blocks  # type: ignore[return-value]
