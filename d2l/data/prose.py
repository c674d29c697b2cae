"""Open-ended ordinary prose of our own: a seeded grammar over the closed vocabulary.

``prose_line`` draws one line of one or two sentences.  No digits and no needle words occur, so a
needle cannot appear by accident.  A line comes as atoms: strings that, joined, give the line,
and that any tokenizer splitting at spaces encodes independently of each other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..lm import vocabulary as words


def prose_line(rng: random.Random) -> list[str]:
    """Draw a line of one or two sentences as a list of atoms (words with their leading space).

    >>> "".join(prose_line(random.Random(1)))[-1]
    '.'
    """
    atoms = _sentence(rng)
    if rng.random() < 0.6:
        second = _sentence(rng)
        second[0] = " " + second[0]
        atoms += second
    return atoms


def shortest_prose_line(rng: random.Random) -> list[str]:
    """Draw a line of the shortest form, ``The baker slept.``, to fill what a budget leaves."""
    person, verb = _pick(rng, words.PEOPLE), _pick(rng, words.INTRANSITIVE)
    return [_pick(rng, words.DETERMINERS).capitalize(), " " + person, f" {verb}."]


def _sentence(rng: random.Random) -> list[str]:
    opener = rng.random() < 0.3
    out = [_pick(rng, words.OPENERS) + ","] if opener else []
    _clause(rng, out)
    if not opener:
        out[0] = out[0][1:].capitalize()
    if rng.random() < 0.3:
        out[-1] += ","
        out.append(" " + _pick(rng, words.CONJUNCTIONS))
        _clause(rng, out)
    out[-1] += "."
    return out


def _clause(rng: random.Random, out: list[str]) -> None:
    _noun_phrase(rng, words.PEOPLE, out)
    if rng.random() < 0.6:
        out.append(" " + _pick(rng, words.TRANSITIVE))
        _noun_phrase(rng, words.THINGS, out)
    else:
        out.append(" " + _pick(rng, words.INTRANSITIVE))
        if rng.random() < 0.4:
            out.append(" " + _pick(rng, words.ADVERBS))
    if rng.random() < 0.5:
        out.append(" " + _pick(rng, words.PREPOSITIONS))
        _noun_phrase(rng, words.PLACES, out)


def _noun_phrase(rng: random.Random, nouns: Sequence[str], out: list[str]) -> None:
    out.append(" " + _pick(rng, words.DETERMINERS))
    if rng.random() < 0.5:
        out.append(" " + _pick(rng, words.ADJECTIVES))
    out.append(" " + _pick(rng, nouns))


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]
