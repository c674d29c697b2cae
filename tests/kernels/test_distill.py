"""`topk_distill` against torch's own losses and against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from d2l_kernels import topk_distill

ROWS, WIDTH, VOCAB = 5, 4, 11


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    return hidden, torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64)


def test_one_certain_token_is_cross_entropy():
    hidden, head = inputs()
    labels = torch.tensor([0, 3, 10, 3, 7])
    loss, best = topk_distill(
        hidden, head, torch.zeros(ROWS, 1, dtype=torch.float64), labels[:, None]
    )
    expected = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert best.tolist() == (hidden @ head.T).argmax(1).tolist()


def test_a_whole_distribution_is_the_kl_plus_its_entropy():
    hidden, head = inputs()
    teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64).log_softmax(1)
    every = torch.arange(VOCAB).expand(ROWS, -1)
    loss, _ = topk_distill(hidden, head, teacher, every)
    kl = F.kl_div((hidden @ head.T).log_softmax(1), teacher, log_target=True, reduction="none").sum(
        1
    )
    entropy = -(teacher.exp() * teacher).sum(1)
    torch.testing.assert_close(loss, kl + entropy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_top_k_is_the_kl_to_the_scattered_probabilities_plus_their_entropy(softcap):
    """The KL divergence of unnormalised p: ``sum p log p - sum p log softmax(z)``."""
    hidden, head = inputs()
    teacher = (torch.randn(ROWS, 3, dtype=torch.float64) - 1).log_softmax(1) - 0.3
    index = torch.rand(ROWS, VOCAB).argsort(1)[:, :3]
    z = hidden @ head.T
    z = softcap * (z / softcap).tanh() if softcap else z
    scattered = torch.zeros_like(z).scatter_(1, index, teacher.exp())
    kl = F.kl_div(z.log_softmax(1), scattered, reduction="none").sum(1)
    loss, _ = topk_distill(hidden, head, teacher, index, softcap)
    torch.testing.assert_close(loss, kl - (teacher.exp() * teacher).sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_top_k_is_not_renormalised(softcap):
    hidden, head = inputs()
    teacher = torch.tensor([[-0.5, -1.5, -4.0]] * ROWS, dtype=torch.float64)
    index = torch.tensor([[1, 0, 9], [2, 3, 4], [10, 9, 8], [5, 6, 7], [0, 10, 5]])
    loss, _ = topk_distill(hidden, head, teacher, index, softcap)
    for t in range(ROWS):
        z = [float(hidden[t] @ row) for row in head]
        z = [softcap * math.tanh(v / softcap) for v in z] if softcap else z
        log_sum = math.log(sum(math.exp(v) for v in z))
        expected = -sum(
            math.exp(lp) * (z[i] - log_sum)
            for lp, i in zip(teacher[t].tolist(), index[t].tolist(), strict=True)
        )
        assert loss[t].item() == pytest.approx(expected, abs=1e-12)


def test_weights_of_topk_distill_multiply_loss_and_gradient():
    hidden, head = inputs()
    logprob, index = torch.full((ROWS, 1), -0.2).double(), torch.tensor([[4]] * ROWS)
    weight = torch.tensor([0.0, 1.0, 2.5, -1.0, 0.5], dtype=torch.float64)
    hidden.requires_grad_()
    plain, _ = topk_distill(hidden, head, logprob, index)
    weighed, _ = topk_distill(hidden, head, logprob, index, weight=weight)
    torch.testing.assert_close(weighed, plain * weight, rtol=0, atol=0)
    (one,), (other,) = (torch.autograd.grad(t.sum(), hidden) for t in (plain, weighed))
    torch.testing.assert_close(other, one * weight[:, None])


def test_gradients_and_precision():
    hidden, head = inputs()
    teacher, index = torch.full((ROWS, 2), -0.9, dtype=torch.float64), torch.tensor([[1, 2]] * ROWS)
    assert torch.autograd.gradcheck(
        lambda h: topk_distill(h, head, teacher, index, 5.0)[0], hidden.requires_grad_()
    )
    loss, _ = topk_distill(hidden.bfloat16(), head.bfloat16(), teacher, index)
    assert loss.dtype == torch.float32


def test_a_k_beyond_the_vocabulary_is_refused():
    hidden, head = inputs()
    wide = torch.zeros(ROWS, VOCAB + 1)
    with pytest.raises(ValueError, match="k = 12, which exceeds the vocabulary of 11"):
        topk_distill(hidden, head, wide, wide.long())
