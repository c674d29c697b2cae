"""`segmented_lora` against a loop over tokens and against PEFT's own layer."""

import pytest
import torch
from d2l_kernels import Segments, segmented_lora


def inputs(tok, rank, d_in=5, d_out=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((sum(tok), d_in), (sum(rank), d_in), (sum(rank), d_out))
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def naive(x, A, B, tok, rank, scale):
    """One token at a time, one rank at a time."""
    y = torch.zeros(x.shape[0], B.shape[1], dtype=torch.float64)
    at_tok = at_rank = 0
    for n_tok, n_rank in zip(tok, rank, strict=True):
        for t in range(at_tok, at_tok + n_tok):
            for r in range(at_rank, at_rank + n_rank):
                y[t] += scale * sum(a * b for a, b in zip(A[r], x[t], strict=True)) * B[r]
        at_tok, at_rank = at_tok + n_tok, at_rank + n_rank
    return y


@pytest.mark.parametrize(
    ("tok", "rank"),
    [((4, 4), (2, 2)), ((3, 1, 2), (2, 4, 1)), ((0, 3), (2, 2)), ((2, 3), (0, 3)), ((5,), (2,)),
     ((3, 3), (1, 2)), ((0, 0), (1, 1)), ((2, 2), (0, 0))],
)  # fmt: skip
def test_equals_a_loop_over_tokens(tok, rank):
    x, A, B = inputs(tok, rank)
    y = segmented_lora(x, A, B, Segments(tok), Segments(rank), 1.7)
    torch.testing.assert_close(y, naive(x, A, B, tok, rank, 1.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tok", "rank"), [((2, 2), (2, 2)), ((3, 1), (1, 2))])
def test_gradients(tok, rank):
    tensors = [t.requires_grad_() for t in inputs(tok, rank)]
    assert torch.autograd.gradcheck(
        lambda x, A, B: segmented_lora(x, A, B, Segments(tok), Segments(rank), 0.5), tensors
    )


def test_equals_peft_with_alpha_over_r_undone():
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    x, A, B = (t.float() for t in inputs((6,), (4,)))
    base = torch.nn.Linear(5, 3, bias=False)
    layer = Linear(base, "one", config=LoraConfig(), r=4, lora_alpha=8)
    layer.lora_A["one"].weight.data, layer.lora_B["one"].weight.data = A, B.mT.contiguous()
    with torch.no_grad():
        expected = layer(x) - base(x)
    y = segmented_lora(x, A, B, Segments((6,)), Segments((4,)), scale=8 / 4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_runs_in_the_dtype_of_the_factors_and_returns_that_of_x():
    x, A, B = inputs((2,), (1,))
    y = segmented_lora(x.half(), A.float(), B.float(), Segments((2,)), Segments((1,)))
    assert y.dtype == torch.float16
    expected = naive(x.half().double(), A.float().double(), B.float().double(), (2,), (1,), 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tok", "rank", "message"),
    [
        ((4,), (1, 1), "tok has 1"),
        ((3, 2), (1, 1), "tok covers 5"),
        ((2, 2), (1, 2), "rank covers 3"),
    ],
)
def test_mismatches_are_refused(tok, rank, message):
    x, A, B = inputs((2, 2), (1, 1))
    with pytest.raises(ValueError, match=message):
        segmented_lora(x, A, B, Segments(tok), Segments(rank))
