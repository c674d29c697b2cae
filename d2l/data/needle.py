"""Needle in a haystack: one line to remember among many that do not matter.

A document is a haystack of blocks (one per line) with the needle line at a block boundary, sized
by the tokenizer in use.  Token ids are assembled from cached pieces, which is checked to equal
tokenizing the whole text; where it does not (no known case) the text is tokenized exactly.

Train and test documents never coincide: a hash of (needle, place, number of blocks), which equal
texts share, decides the split a document belongs to, and the generator draws until it fits.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Sequence
from typing import Any, Literal

from ..lm import vocabulary as words
from .prose import prose_line, shortest_prose_line

Filler = Literal["repeat", "prose"]
Needle = Literal["digits", "word"]
Words = Literal["seen", "heldout", "all"]

N_DEPTHS = 10
N_HELDOUT_WORDS = 16
_TEST_SHARE = 4
_OPTIONS = {
    "filler": ("repeat", "prose"),
    "needle": ("digits", "word"),
    "words": ("seen", "heldout", "all"),
}


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Which haystack and which needle.  ``words`` restricts the word needle: ``seen`` leaves out
    16 words that only ``heldout`` and ``all`` use.
    """

    filler: str = "repeat"
    needle: str = "digits"
    words: str = "seen"

    def __post_init__(self) -> None:
        for name, known in _OPTIONS.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class NeedleSample:
    """A document, its question and answer; ``depth`` is the tenth that holds the needle.

    ``document_ids`` equals tokenizing ``document`` without special tokens.
    """

    document: str
    question: str
    answer: str
    depth: int
    n_tok: int
    document_ids: list[int] = dataclasses.field(repr=False)


class NeedleGenerator:
    """Draw needle documents of a wanted token length (paper section 4.1, Appendix A).

    >>> from d2l.lm.tiny import build_tokenizer
    >>> sample = NeedleGenerator(build_tokenizer()).sample(random.Random(0), 80, 100)
    >>> sample.n_tok, sample.answer in sample.document
    (85, True)

    Raises ValueError for an unknown filler, needle, words or split.
    """

    def __init__(
        self,
        tokenizer: Any,
        filler: str = "repeat",
        needle: str = "digits",
        split: str = "train",
        words: str = "seen",
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be one of train, test, got {split!r}")
        self.config = NeedleConfig(filler, needle, words)
        self.split = split
        self._line, self.question = _NEEDLES[needle]
        self._answers = None if needle == "digits" else needle_words(words)
        self._pieces = _Pieces(tokenizer)
        self._lengths = self._pieces.repeat_lengths() if filler == "repeat" else None

    def sample(
        self, rng: random.Random, min_tok: int, max_tok: int, depth: int | None = None
    ) -> NeedleSample:
        """Draw a document of ``min_tok`` to ``max_tok`` tokens (both included).

        ``depth`` in 0..9 places the needle in that tenth of the blocks (the nearest where there
        are fewer than ten); None draws it.  Raises ValueError when no document fits the bin.
        """
        if min_tok > max_tok:
            raise ValueError(f"min_tok ({min_tok}) is larger than max_tok ({max_tok})")
        if depth is not None and not 0 <= depth < N_DEPTHS:
            raise ValueError(f"depth must lie in 0..{N_DEPTHS - 1}, got {depth}")
        depth = int(rng.random() * N_DEPTHS) if depth is None else depth
        fill = self._fill_repeat if self._lengths is not None else self._fill_prose
        drift, seen = 0, []
        for _ in range(200):
            answer = self._draw_answer(rng)
            needle = _needle_atoms(self._line, answer)
            n_needle = len(self._pieces.line(needle, first=False, last=False))
            blocks = fill(rng, min_tok - drift, max_tok - drift, n_needle)
            place = _place(rng, len(blocks), depth)
            if not self._belongs(answer, place, len(blocks)):
                continue
            lines = [*blocks[:place], needle, *blocks[place:]]
            document = "\n".join(["".join(line) for line in lines])
            ids = self._pieces.document(lines, document)
            if min_tok <= len(ids) <= max_tok:
                return NeedleSample(document, self.question, answer, depth, len(ids), ids)
            seen.append(len(ids))
            if not self._pieces.additive:
                drift += len(ids) - (min_tok + max_tok) // 2
        nearest = min(seen, key=lambda n: abs(n - min_tok)) if seen else "none"
        raise ValueError(
            f"no document of {min_tok} to {max_tok} tokens (nearest: {nearest}): widen the bin"
        )

    def stratified(self, n: int, min_tok: int, max_tok: int, seed: int) -> list[NeedleSample]:
        """Draw ``n`` documents whose depths go through the ten strata in turn."""
        config = self.config
        rng = random.Random(f"{self.split}/{config.filler}/{config.needle}/{config.words}/{seed}")
        return [self.sample(rng, min_tok, max_tok, i % N_DEPTHS) for i in range(n)]

    def bare(self, rng: random.Random) -> NeedleSample:
        """Draw a document that is the needle line alone: the easiest step of a curriculum."""
        answer = self._draw_answer(rng)
        needle = _needle_atoms(self._line, answer)
        ids = self._pieces.line(needle, first=True, last=True)
        return NeedleSample("".join(needle), self.question, answer, 0, len(ids), list(ids))

    def filler_ids(self, rng: random.Random, n_tok: int) -> list[int]:
        """Return about ``n_tok`` token ids (at least) of haystack without a needle."""
        blocks: list[Sequence[str]] = []
        length = 0
        while length < n_tok:
            blocks.append(_REPEAT_LINE if self.config.filler == "repeat" else prose_line(rng))
            length += len(self._pieces.line(blocks[-1], first=len(blocks) == 1, last=False))
        return self._pieces.document(blocks, "\n".join(["".join(line) for line in blocks]))

    def _draw_answer(self, rng: random.Random) -> str:
        if self._answers is None:
            return f"{int(rng.random() * 10_000):04d}"
        return self._answers[int(rng.random() * len(self._answers))]

    def _belongs(self, answer: str, place: int, n_blocks: int) -> bool:
        key = f"{answer}/{place}/{n_blocks}".encode()
        return (zlib.crc32(key) % _TEST_SHARE == 0) == (self.split == "test")

    def _fill_repeat(
        self, rng: random.Random, min_tok: int, max_tok: int, n_needle: int
    ) -> list[Sequence[str]]:
        """Draw a feasible number of noise blocks, uniformly."""
        assert self._lengths is not None
        per_block, newline = self._lengths
        fixed = n_needle - newline
        low = max(1, -(-(min_tok - fixed) // per_block))
        high = (max_tok - fixed) // per_block
        if high < low:
            feasible = sorted({fixed + max(1, n) * per_block for n in (high, low)})
            raise ValueError(
                f"no number of blocks gives {min_tok} to {max_tok} tokens; nearest lengths: "
                f"{', '.join(map(str, feasible))}"
            )
        return [_REPEAT_LINE] * (low + int(rng.random() * (high - low + 1)))

    def _fill_prose(
        self, rng: random.Random, min_tok: int, max_tok: int, n_needle: int
    ) -> list[Sequence[str]]:
        """Add lines of prose up to a length drawn from the bin, then short ones that still fit."""
        goal = min_tok + int(rng.random() * (max_tok - min_tok + 1)) - n_needle
        blocks: list[Sequence[str]] = []
        n_tok, line_ids = 0, self._pieces.line
        for make in (prose_line, shortest_prose_line):
            misses = 0
            while misses < 20 and n_tok < goal:
                line = make(rng)
                length = len(line_ids(line, first=False, last=False))
                if n_tok + length <= goal + 1:
                    n_tok += length
                    blocks.append(line)
                else:
                    misses += 1
        if blocks:
            return blocks
        shortest = len(line_ids(shortest_prose_line(rng), first=False, last=False))
        if shortest + n_needle - 1 > max_tok:
            raise ValueError(
                f"no document fits {min_tok} to {max_tok} tokens; "
                f"nearest length: {shortest + n_needle - 1}"
            )
        return [shortest_prose_line(rng)]


def needle_words(which: str) -> tuple[str, ...]:
    """List the word needles: ``seen`` and ``heldout`` are disjoint (every fourth is held out)."""
    step = len(words.NEEDLE_WORDS) // N_HELDOUT_WORDS
    heldout = words.NEEDLE_WORDS[::step]
    if which == "all":
        return words.NEEDLE_WORDS
    if which == "heldout":
        return heldout
    return tuple(word for word in words.NEEDLE_WORDS if word not in heldout)


def _place(rng: random.Random, n_blocks: int, depth: int) -> int:
    """Draw the boundary (0 = before the first block) of the ``depth``-th tenth."""
    low, high = (-(-d * (n_blocks + 1) // N_DEPTHS) for d in (depth, depth + 1))
    if low == high:
        return depth * (n_blocks + 1) // N_DEPTHS
    return low + int(rng.random() * (high - low))


class _Pieces:
    """Token ids of lines, each atom tokenized once behind a fixed anchor and then remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchors = {"": [], ".\n": self._encode(".\n"), "the": self._encode("the")}
        self._cache: dict[tuple[str, str], list[int]] = {}
        self.additive = True
        self.additive = self._check()

    def repeat_lengths(self) -> tuple[int, int]:
        """Tokens of one more noise block with its line break, and of the line break alone."""
        with_break = len(self.line(_REPEAT_LINE, first=False, last=False))
        return with_break, with_break - len(self.line(_REPEAT_LINE, first=False, last=True))

    def line(self, atoms: Sequence[str], first: bool, last: bool) -> list[int]:
        """Ids of one line, with its line break unless it is the last."""
        end = "" if last else "\n"
        if len(atoms) == 1:
            return self._atom("" if first else ".\n", atoms[0] + end)
        ids = list(self._atom("" if first else ".\n", atoms[0]))
        for atom in atoms[1:-1]:
            ids += self._atom("the", atom)
        return ids + self._atom("the", atoms[-1] + end)

    def document(self, lines: Sequence[Sequence[str]], text: str) -> list[int]:
        """Ids of the lines joined by line breaks; ``text`` is the same as one string."""
        if not self.additive:
            return self._encode(text)
        ids: list[int] = []
        for i, line in enumerate(lines):
            ids += self.line(line, first=i == 0, last=i == len(lines) - 1)
        return ids

    def _atom(self, anchor: str, atom: str) -> list[int]:
        ids = self._cache.get((anchor, atom))
        if ids is None:
            ids = self._encode(anchor + atom)[len(self._anchors[anchor]) :]
            self._cache[anchor, atom] = ids
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _check(self) -> bool:
        """Compare with tokenizing whole texts: every kind of line first, inside and last."""
        rng = random.Random(0)
        kinds = [*(_needle_atoms(line, answer) for line, answer in _CHECKED), _REPEAT_LINE]
        prose = [prose_line(rng) for _ in range(40)]
        documents = [[line, *prose, *kinds, _REPEAT_LINE, line] for line in kinds]
        documents.append([prose[0], *kinds, prose[1]])
        texts = ["\n".join(["".join(line) for line in lines]) for lines in documents]
        pairs = zip(documents, texts, strict=True)
        return all(self.document(lines, text) == self._encode(text) for lines, text in pairs)


def _needle_atoms(line: str, answer: str) -> list[str]:
    return [line.split(" {}")[0], f" {answer}."]


_REPEAT_LINE: Sequence[str] = (words.REPEAT_BLOCK,)
_NEEDLES = {
    "digits": (words.DIGITS_LINE, words.DIGITS_QUESTION),
    "word": (words.WORD_LINE, words.WORD_QUESTION),
}
_CHECKED = ((words.DIGITS_LINE, "0482"), (words.WORD_LINE, "anchor"), (words.DIGITS_LINE, "7310"))
