"""`cross_attention` and `latent_attention` against loops and against torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from d2l_kernels import Segments, cross_attention, latent_attention


def inputs(lengths, latents=3, heads=4, kv=2, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((len(lengths), latents, heads, d), (sum(lengths), kv, d), (sum(lengths), kv, d))
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def naive(q, k, v, lengths):
    out, start = torch.zeros_like(q), 0
    repeat = q.shape[2] // k.shape[1]
    for i, n in enumerate(lengths):
        for h in range(q.shape[2]):
            keys, values = k[start : start + n, h // repeat], v[start : start + n, h // repeat]
            for latent in range(q.shape[1] if n else 0):
                score = keys @ q[i, latent, h] / math.sqrt(q.shape[3])
                weight = (score - score.max()).exp()
                out[i, latent, h] = (weight / weight.sum()) @ values
        start += n
    return out


@pytest.mark.parametrize("lengths", [(4, 4), (3, 1, 6), (2, 0, 3), (5,), (1, 1), (0, 0)])
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (4, 4), (4, 1)])
def test_equals_a_loop_over_heads(lengths, heads, kv):
    q, k, v = inputs(lengths, heads=heads, kv=kv)
    out = cross_attention(q, k, v, Segments(lengths))
    torch.testing.assert_close(out, naive(q, k, v, lengths), rtol=0, atol=1e-12)


def of_torch(q, k, v, lengths):
    """Attend by `F.scaled_dot_product_attention`, which repeats the KV heads itself."""
    parts = zip(q.unbind(0), k.split(lengths), v.split(lengths), strict=True)
    heads_first = ([t.transpose(0, 1)[None] for t in part] for part in parts)
    out = [F.scaled_dot_product_attention(*part, enable_gqa=True)[0] for part in heads_first]
    return torch.stack(out).transpose(1, 2)


def test_equals_torch_attention_with_grouped_heads():
    lengths = [3, 1, 6]
    tensors = [t.requires_grad_() for t in inputs(lengths)]
    ours = cross_attention(*tensors, Segments.of(lengths))
    theirs = of_torch(*tensors, lengths)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(theirs.square().sum(), tensors)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_latents", [3, 32, 33])
def test_latent_attention_equals_torch_attention_on_projected_tokens(n_latents):
    """32 latents are the last that are absorbed."""
    lengths = [4, 2]
    g = torch.Generator().manual_seed(0)
    shapes = (2, n_latents, 4, 5), (6, 7), (7,), (10, 7), (10, 7)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    q, x, w, W_k, W_v = tensors
    ours = latent_attention(*tensors, Segments.of(lengths), 1e-5)
    normed = F.rms_norm(x, (7,), w, 1e-5)
    k, v = ((normed @ W.T).unflatten(1, (2, 5)) for W in (W_k, W_v))
    theirs = of_torch(q, k, v, lengths)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(theirs.square().sum(), tensors)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_segments_do_not_see_each_other():
    q, k, v = inputs((3, 4))
    before = cross_attention(q, k, v, Segments((3, 4)))
    k[3:], v[3:] = 7.0, -3.0
    after = cross_attention(q, k, v, Segments((3, 4)))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("lengths", [(2, 2), (1, 3)])
def test_gradients(lengths):
    tensors = [t.requires_grad_() for t in inputs(lengths, latents=2, heads=2, kv=1, d=2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: cross_attention(q, k, v, Segments(lengths)), tensors
    )


def test_mismatches_are_refused():
    q, k, v = inputs((2, 2))
    with pytest.raises(ValueError, match="segments describe 2 x 5"):
        cross_attention(q, k, v, Segments((2, 3)))
    with pytest.raises(ValueError, match="segments describe 1 x 4"):
        cross_attention(q, k, v, Segments((4,)))
    q, k, v = inputs((2, 2), heads=3, kv=2)
    with pytest.raises(ValueError, match="3 query heads"):
        cross_attention(q, k, v, Segments((2, 2)))
