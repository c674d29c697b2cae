"""How well a reply answers a question: the scores of the public SQuAD scorer, and their kin.

Texts are normalised (lower case, no punctuation, no articles, single spaces) and compared as bags
of words.  The paper prints this F1 as "ROUGE-L F1"; it is not (see the paper's folder).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class QaScore:
    """Scores from 0 to 1 of one reply, or their means over many."""

    f1: float
    precision: float
    recall: float
    exact: float


def normalize(text: str) -> str:
    """Normalise as SQuAD does (Rajpurkar et al. 2016): ASCII punctuation goes, other marks stay.

    >>> normalize("The  U.S. Army's tank!")
    'us armys tank'
    """
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def score_pair(reply: str, answer: str) -> QaScore:
    """Compare a reply with one answer.

    With ``c`` words in common (as bags): precision ``c / |reply|``, recall ``c / |answer|``, and F1
    their harmonic mean.  Where either side has no words, all are 1 if both have none, else 0.

    >>> score_pair("It is the red lamp.", "a red lamp")
    QaScore(f1=0.6666666666666666, precision=0.5, recall=1.0, exact=0.0)
    """
    got, wanted = normalize(reply).split(), normalize(answer).split()
    exact = float(got == wanted)
    if not got or not wanted:
        return QaScore(exact, exact, exact, exact)
    common = sum((Counter(got) & Counter(wanted)).values())
    precision, recall = common / len(got), common / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return QaScore(f1, precision, recall, exact)


def score(reply: str, answers: Sequence[str]) -> QaScore:
    """Compare a reply with every accepted answer and take the one with the best F1.

    Exact match implies F1 = 1, so it is the maximum over answers too; precision and recall are
    those of the best answer, as in the published evaluation: the first of equals, an exact one
    before others.  Raises ValueError without answers.

    >>> score("George Washington", ["Washington", "President Washington"]).recall
    1.0
    """
    if not answers:
        raise ValueError("a reply can be scored only against at least one answer")
    return max((score_pair(reply, a) for a in answers), key=lambda s: (s.f1, s.exact))


def mean_score(scores: Iterable[QaScore]) -> QaScore:
    """Average scores.  Raises ValueError for none."""
    listed = list(scores)
    if not listed:
        raise ValueError("there are no scores to average")
    columns = zip(*((s.f1, s.precision, s.recall, s.exact) for s in listed), strict=True)
    return QaScore(*(sum(column) / len(listed) for column in columns))
