"""Scores against torchmetrics' SQuAD, which follows the public scorer, and by hand."""

import random

import pytest
from torchmetrics.functional.text import squad

from d2l.qa_metrics import QaScore, mean_score, normalize, score, score_pair

N_PAIRS = 10_000
PIECES = [
    *"a an the A The AN of in and Paris paris PARIS 1912 3,000 3000 x".split(),
    *("U.S.", "it's", "its", "red-brown", "redbrown", "(the)", "«the»", "naïve", "Straße", "an,"),
    *("theatre", "a.", "don’t", "—", "...", "東京", "東京。", "İstanbul", "%", "$5", "5", "İ"),
]
SPACES = (" ", " ", " ", "  ", "\t", "\n", "\u00a0", "")


def text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(rng.randint(0, 5)))


def reference(cases: list[tuple[str, list[str]]]) -> tuple[float, float]:
    """Return the sums of F1 and exact match by torchmetrics."""
    out = squad(
        [{"prediction_text": reply, "id": str(i)} for i, (reply, _) in enumerate(cases)],
        [
            {"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": str(i)}
            for i, (_, answers) in enumerate(cases)
        ],
    )
    scale = len(cases) / 100
    return out["f1"].item() * scale, out["exact_match"].item() * scale


def test_equals_the_public_scorer_on_10000_pairs():
    rng = random.Random(0)
    partial = exact = 0
    for _ in range(N_PAIRS // 10):
        cases = []
        for _ in range(10):
            reply = text(rng)
            answers = [text(rng) for _ in range(rng.randint(1, 3))]
            if rng.random() < 0.2:
                answers[-1] = reply.upper()
            cases.append((reply, answers))
        ours = [score(*case) for case in cases]
        f1, exact_match = reference(cases)
        assert sum(s.f1 for s in ours) == pytest.approx(f1, abs=1e-5), cases
        assert sum(s.exact for s in ours) == pytest.approx(exact_match, abs=1e-5), cases
        partial += sum(0 < s.f1 < 1 for s in ours)
        exact += exact_match
    assert partial > N_PAIRS / 20
    assert exact > N_PAIRS / 20


@pytest.mark.parametrize(
    ("reply", "answer", "f1", "precision", "recall"),
    [
        ("the red lamp", "Red lamp!", 1, 1, 1),
        ("It is the red lamp of Ada", "red lamp", 0.5, 1 / 3, 1),
        ("lamp lamp lamp", "lamp", 0.5, 1 / 3, 1),
        ("lamp", "lamp lamp", 2 / 3, 1, 0.5),
        ("blue", "red", 0, 0, 0),
        ("the", "", 1, 1, 1),
        ("", "red", 0, 0, 0),
        ("red", "the", 0, 0, 0),
    ],
)
def test_by_hand(reply, answer, f1, precision, recall):
    expected = pytest.approx((f1, precision, recall))
    got = score_pair(reply, answer)
    assert (got.f1, got.precision, got.recall) == expected


def test_precision_and_recall_are_those_of_the_best_answer():
    got = score("the city of Paris", ["Paris France Europe Earth", "Paris"])
    assert (got.recall, got.precision) == (1.0, pytest.approx(1 / 3))


def test_normalising_twice_changes_nothing():
    rng = random.Random(1)
    for _ in range(1000):
        once = normalize(text(rng))
        assert normalize(once) == once


def test_means_and_errors():
    assert mean_score([QaScore(1, 1, 1, 1), QaScore(0, 0.5, 1, 0)]) == QaScore(0.5, 0.75, 1, 0.5)
    with pytest.raises(ValueError, match="no scores"):
        mean_score([])
    with pytest.raises(ValueError, match="at least one answer"):
        score("red", [])
