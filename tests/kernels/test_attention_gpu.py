"""Attention's kernels on a GPU, at the published widths: errors, repeat runs, memory, time."""

import pytest
import torch
from d2l_kernels import Segments, cross_attention, explain, latent_attention, use_backend
from kernel_cases import Case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MIB = 1 << 20
LENGTHS = {"many": (512,) * 64, "few and long": (20000, 1, 0, 700)}


def make(shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to("cuda", dtype)


def cross(lengths, dtype, n_latents=8):
    tok = Segments(lengths)
    shapes = (len(lengths), n_latents, 16, 128), (tok.total, 4, 128), (tok.total, 4, 128)
    tensors = [make(shape, dtype, i) for i, shape in enumerate(shapes)]
    return Case(tensors, lambda *t: cross_attention(*t, tok))


def latent(lengths, dtype, n_latents=8):
    tok = Segments(lengths)
    shapes = (len(lengths), n_latents, 16, 128), (tok.total, 512), (512,), (512, 512), (512, 512)
    tensors = [make(shape, dtype, i) for i, shape in enumerate(shapes)]
    tensors[3:] = [t * 512**-0.5 for t in tensors[3:]]
    return Case(tensors, lambda *t: latent_attention(*t, tok))


OPS = {"cross_attention": cross, "latent_attention": latent}
FAST = [("cross_attention", "triton"), ("cross_attention", "flash"), ("latent_attention", "triton")]


def force(op, backend, one):
    if reason := explain(op, *one.tensors[:2])[backend]:
        pytest.skip(f"{backend}: {reason}")
    return use_backend(**{op: backend})


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("op", "backend"), FAST)
def test_no_worse_than_twice_the_reference_and_the_same_again(op, backend, dtype, lengths):
    one = OPS[op](lengths, dtype)
    with use_backend("reference"):
        plain = run(one)
        exact = run(Case([t.double() for t in one.tensors], one.fn))
    with force(op, backend, one):
        found, again = run(one), run(one)
    for i, (ours, theirs, truth) in enumerate(zip(found, plain, exact, strict=True)):
        free = torch.finfo(dtype).eps / 2 * truth.norm()
        error, allowed = ((t.double() - truth).norm() for t in (ours, theirs))
        assert error <= (3 if i else 2) * allowed + free
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(("op", "backend"), FAST)
def test_memory_beside_inputs_and_outputs_is_small(op, backend):
    """Neither K, V nor scores: at 106,496 tokens each of those is 100 MiB or more.

    `latent_attention` keeps queries and results as wide as x, and a float32 result of each split:
    88 MiB on an H200.
    """
    one = OPS[op]((1024,) * 104, torch.bfloat16)
    with force(op, backend, one), torch.no_grad():
        one.fn(*one.tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = one.fn(*one.tensors)
        beside = torch.cuda.max_memory_allocated() - before - out.nbytes
    rows = (
        torch.finfo(torch.float32).bits // 8 * out.numel() * (4 if op == "latent_attention" else 1)
    )
    assert beside <= 16 * MIB + (3 if op == "latent_attention" else 2) * rows
