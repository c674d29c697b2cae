"""Muon: against a singular value decomposition, torch's own for plain matrices, and AdamW."""

import pytest
import torch
import train_tiny
from tiny_models import doc_to_lora

from d2l.muon import Muon, orthogonal
from d2l.train import TrainConfig, train


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4), (4, 1)])
def test_singular_values_become_one_and_vectors_stay(shape):
    x = 100 * drawn(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonal(x) @ v.mT
    assert (s > 1e-3 * s.max()).all()
    assert ((found.diagonal() > 0.5) & (found.diagonal() < 1.3)).all()
    assert (found - found.diagonal().diag_embed()).abs().max() < 1e-9


def test_a_stack_is_each_of_its_matrices():
    x = drawn(3, 2, 4, 6)
    each = torch.stack([orthogonal(m) for m in x.flatten(0, 1)]).unflatten(0, (3, 2))
    torch.testing.assert_close(orthogonal(x), each, rtol=0, atol=1e-12)


def test_nothing_comes_of_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def steps(optimizer: torch.optim.Optimizer, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Take five steps on gradients that are drawn, and return the parameters."""
    for step in range(5):
        for i, p in enumerate(parameters):
            p.grad = drawn(*p.shape, seed=10 * step + i).to(p)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_plain_matrices_move_as_with_torch():
    ours, theirs = (torch.nn.Parameter(drawn(8, 20).float()) for _ in range(2))
    (found,) = steps(Muon([{"params": [ours], "matrices": True}], lr=0.1, weight_decay=0.1), ours)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    (expected,) = steps(torchs, theirs)
    begin = drawn(8, 20).float()
    assert (found - begin).norm() > 0.5
    assert (found - expected).norm() < 0.03 * (expected - begin).norm()  # theirs is in bfloat16


def test_everything_else_moves_as_with_adamw():
    make = lambda: [torch.nn.Parameter(drawn(6)), torch.nn.Parameter(drawn(2, 3))]  # noqa: E731
    ours, theirs = make(), make()
    kept = {"params": ours, "weight_decay": 0.02}
    matrix = {"params": [torch.nn.Parameter(drawn(4, 4))], "matrices": True}
    found = steps(Muon([matrix, kept], lr=0.01, betas=(0.8, 0.9)), *ours)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), weight_decay=0.02)
    expected = steps(adamw, *theirs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_closure_is_called_once_before_anything_moves():
    matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (2,)))
    optimizer = Muon([{"params": [matrix], "matrices": True}, {"params": [vector]}], lr=0.1)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (matrix @ vector).sum()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    assert optimizer.step(closure) == 4.0
    assert losses == [4.0]
    assert not torch.equal(matrix, torch.ones(2, 2))
    assert not torch.equal(vector, torch.ones(2))


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    config = TrainConfig(
        steps=4, docs_per_step=4, optimizer="muon", lr=1e-2, warmup=1, checkpoint_every=2
    )

    def until(last: int):
        def examples(step: int, level: float):
            if step == last:
                raise KeyboardInterrupt
            return train_tiny.examples(step, level)

        return examples

    whole, cut, begin = doc_to_lora(), doc_to_lora(), doc_to_lora()
    train(whole, until(9), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(cut, until(3), config, tmp_path / "cut")
    again = doc_to_lora()
    train(again, until(9), config, tmp_path / "cut")
    expected, found, old = (m.hypernet.state_dict() for m in (whole, again, begin))
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert not torch.equal(found["head"], old["head"])
