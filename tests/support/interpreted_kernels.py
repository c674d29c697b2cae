"""Triton's interpreter on CPU tensors; `tests/kernels/test_triton.py` runs this in its own process.

Every tensor that a kernel gets lies between bands of NaN, and every tensor that a backend makes
starts as NaN, so reading past an end, writing past it and leaving a number unset are all seen.
What the interpreter cannot show: races, and bfloat16, whose arithmetic in it is wrong.
"""

import os

import pytest
import torch
from bands import banded_launches
from d2l_kernels import topk_distill, use_backend
from d2l_kernels.dispatch import load
from kernel_cases import OPS, RAGGED, WIDE, WIDE_LENGTHS, case, run

assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture(autouse=True)
def launched():
    """Fill what is allocated and not set with NaN, and say that kernels ran."""
    torch.use_deterministic_algorithms(True)
    with banded_launches() as seen, use_backend("triton"):
        yield seen
    torch.use_deterministic_algorithms(False)


def in_double(op, lengths, dtype):
    one = case(op, lengths, dtype)
    one.tensors = [t.double() for t in one.tensors]
    return one


# for many latents latent_attention is cross_attention, which is tested for itself
ABSORBED = [op for op in OPS if op != "latent_attention, many"]
SHORT = {name: lengths for name, lengths in RAGGED.items() if name != "long"}


@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("op", ABSORBED)
def test_value_and_gradients_equal_the_reference(op, lengths, launched):
    one = case(op, lengths)
    with use_backend("reference"):
        expected = run(one)
    found = run(one)
    assert launched
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", WIDE)
def test_no_worse_than_twice_the_reference_in_the_same_dtype(op, dtype):
    """Both against float64 on the same rounded inputs; half an ulp of the result is free."""
    lengths = WIDE_LENGTHS[op]
    with use_backend("reference"):
        plain = run(case(op, lengths, dtype))
        exact = run(in_double(op, lengths, dtype))
    found = run(case(op, lengths, dtype))
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        free = torch.finfo(ours.dtype).eps / 2 * truth.norm()
        error, allowed = ((t.double() - truth).norm() for t in (ours, theirs))
        assert error <= 2 * allowed + free
    again = run(case(op, lengths, dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("op", ABSORBED)
def test_gradcheck(op):
    one = case(op, (3, 1))
    tensors = [t.requires_grad_() for t in one.tensors]
    assert torch.autograd.gradcheck(one.fn, tensors, fast_mode=True)


@pytest.mark.parametrize("op", ABSORBED)
def test_no_token_at_all(op):
    out, *grads = run(case(op, (0, 0)))
    assert not out.any()
    assert not any(t.any() for t in grads)


def test_topk_distill_counts_a_target_that_is_named_twice():
    hidden, head = torch.eye(3, requires_grad=True), torch.eye(3)
    logprob, idx = torch.full((3, 2), -1.0), torch.tensor([[1, 1], [0, 2], [2, 2]])
    both = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            loss, best = topk_distill(hidden, head, logprob, idx)
        both.append((loss, *torch.autograd.grad(loss.sum(), hidden)))
        assert best.tolist() == [0, 1, 2]
    torch.testing.assert_close(*both)


def test_topk_distill_finds_the_argmax_in_any_block_of_columns():
    g = torch.Generator().manual_seed(0)
    head = torch.nn.functional.normalize(torch.randn(4300, 8, generator=g))
    wanted = [5, 4095, 4096, 4299]
    hidden, logprob, idx = 9 * head[wanted], torch.zeros(4, 1), torch.zeros(4, 1).long()
    loss, best = topk_distill(hidden, head, logprob, idx)
    assert best.tolist() == wanted
    with use_backend("reference"):
        torch.testing.assert_close(loss, topk_distill(hidden, head, logprob, idx)[0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_topk_distill_of_one_target_is_ligers_fused_cross_entropy(backend):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 24, generator=g) for n in (7, 300))
    labels = torch.randint(300, (7,), generator=g)
    hidden.requires_grad_()
    theirs = LigerFusedLinearCrossEntropyFunction.apply(hidden, head, labels)[0]
    with use_backend(backend):
        loss, _ = topk_distill(hidden, head, torch.zeros(7, 1), labels[:, None])
    (found,), (expected,) = (torch.autograd.grad(t, hidden) for t in (loss.mean(), theirs))
    torch.testing.assert_close(loss.mean(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_segmented_lora_shows_that_bands_and_poison_are_seen():
    """Work on one token too many, and on one too few, on purpose."""
    forward = load("segmented_lora", "triton").forward
    x, A = torch.ones(3, 20), torch.ones(2, 20)
    assert forward(x, A, A, (3,), (2,), 1.0).isfinite().all()
    unset = forward(x, A, A, (2,), (2,), 1.0)
    assert unset[:2].isfinite().all()
    assert unset[2:].isnan().all()
    with pytest.raises(AssertionError, match="shrink wrote outside a tensor of"):
        forward(x, A, A, (4,), (2,), 1.0)
