"""Rows set apart, against least squares in float64."""

import numpy as np
import pytest
import torch
from ridge_reference import regressed

from d2l.ridge import apart, sum_apart


@pytest.mark.parametrize("n_rows", [1, 3, 12])
def test_rows_set_apart_are_a_ridge_regression(n_rows):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(3, n_rows, 9)) + 2 * rng.normal(size=(3, 1, 9))
    B = rng.normal(size=(3, n_rows, 5))
    penalty = torch.tensor([0.02, 0.3, 2.0], dtype=torch.float64)
    found = torch.tensor(B).mT @ apart(torch.tensor(A), penalty)
    sums = torch.tensor(B).mT @ torch.tensor(A), torch.tensor(A).mT @ torch.tensor(A)
    for delta in (found, sum_apart(*sums, penalty, n_rows)):
        for layer in range(3):
            expected = regressed(A[layer], B[layer], penalty[layer].item())
            np.testing.assert_allclose(delta[layer].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_rows_apart_stay_and_equal_rows_share():
    lone = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][None]
    penalty = torch.tensor([0.1], dtype=torch.float64)
    torch.testing.assert_close(apart(lone[:, :4] * 3, penalty), lone[:, :4] * 3)
    twice = lone[:, :1].expand(-1, 2, -1) * 3
    torch.testing.assert_close(apart(twice, penalty), twice * 1.1 / 2.1)


def test_equal_rows_are_told_apart_in_float32_whatever_the_penalty():
    torch.manual_seed(0)
    A = torch.randn(1, 1, 50).expand(-1, 64, -1)
    found = apart(A, torch.tensor([1e-9]))
    torch.testing.assert_close(found, A * 1.01 / 64.01, rtol=0.05, atol=2e-3)


def test_rows_of_half_precision_are_set_apart_in_float32():
    torch.manual_seed(0)
    A = torch.randn(2, 20, 30).bfloat16()
    penalty = torch.tensor([0.01, 1.0])
    found = apart(A, penalty)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, apart(A.float(), penalty).bfloat16())


def test_rows_of_zeros_stay_zeros_with_finite_gradients():
    A = torch.zeros(2, 3, 4, requires_grad=True)
    found = apart(A, torch.full((2,), 0.03))
    found.square().sum().backward()
    assert not found.any()
    assert A.grad is not None
    assert A.grad.isfinite().all()
    assert not sum_apart(torch.zeros(1, 5, 4), torch.zeros(1, 4, 4), torch.ones(1), 3).any()
