"""Averages over tokens, queries and documents, against plain loops."""

import pytest
import torch
from d2l_kernels import Segments

from d2l.lora import LoraBatch
from d2l.losses import average, lora_l1, shift

LOSS = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)


def test_per_context_weighs_documents_alike():
    # document 0: queries (1, 2) and (4); document 1: query (8, 16, 32)
    expected = (((1 + 2) / 2 + 4) / 2 + (8 + 16 + 32) / 3) / 2
    assert average(LOSS, [2, 1, 3], [2, 1], "per_ctx").item() == pytest.approx(expected)
    assert average(LOSS, [2, 1, 3], [2, 1], "per_ctx", 10).item() == pytest.approx(
        expected * 2 / 10
    )


def test_per_token_weighs_tokens_alike():
    assert average(LOSS, [2, 1, 3], [2, 1], "per_token").item() == pytest.approx(63 / 6)
    assert average(LOSS, [2, 1, 3], [2, 1], "per_token", 9).item() == pytest.approx(7.0)


def test_queries_without_labels_and_documents_without_queries_count_as_zero():
    expected = (((1 + 2) / 2 + 0) / 2 + 0 + (4 + 8 + 16 + 32) / 4) / 3
    assert average(LOSS, [2, 0, 4], [2, 0, 1], "per_ctx").item() == pytest.approx(expected)


@pytest.mark.parametrize(("labels", "queries"), [([2, 1], [2]), ([2, 1, 3], [2]), ([7], [1])])
def test_counts_that_do_not_add_up_are_refused(labels, queries):
    with pytest.raises(ValueError, match="6 losses"):
        average(LOSS, labels, queries, "per_ctx")


def test_windows_add_up():
    """Summing micro-batches with the window's denominator equals one batch."""
    whole = average(LOSS, [2, 1, 3], [2, 1], "per_ctx")
    first = average(LOSS[:3], [2, 1], [2], "per_ctx", 2)
    assert (first + average(LOSS[3:], [3], [1], "per_ctx", 2)).item() == pytest.approx(whole.item())


def factors(d, rank):
    g = torch.Generator().manual_seed(d)
    return {m: torch.randn(2, rank, d, generator=g, dtype=torch.float64) for m in ("k", "q")}


@pytest.mark.parametrize("padded", [False, True])
def test_l1_of_merged_factors(padded):
    loras = LoraBatch(factors(3, 7), factors(5, 7), Segments((2, 5)), (0, 1), 1.0)
    expected = 0.0
    for kind in (loras.A, loras.B):
        for t in kind.values():
            for start, n in ((0, 2), (2, 5)):
                width = 5 if padded else n
                expected += t[:, start : start + n].abs().sum().item() / (2 * width * t.shape[2])
    assert lora_l1(loras, padded=padded).item() == pytest.approx(expected / 2)


def test_own_rank_makes_the_penalty_independent_of_neighbours():
    loras = LoraBatch(factors(3, 7), factors(5, 7), Segments((2, 5)), (0, 1), 1.0)
    apart = lora_l1(loras[0]) + lora_l1(loras[1])
    assert lora_l1(loras).item() == pytest.approx(apart.item())
    assert lora_l1(loras, padded=True).item() != pytest.approx(apart.item())


def test_shift_points_at_the_predicting_position():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, 5]])
    at, target = shift(labels)
    assert at.tolist() == [1, 2, 4, 6]
    assert target.tolist() == [7, 8, 9, 5]
    with pytest.raises(ValueError, match="first token"):
        shift(torch.tensor([[3, 4]]))
