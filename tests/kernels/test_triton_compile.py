"""Every Triton kernel compiled for sm_80 and sm_90 at the sizes that it is made for.

What the interpreter accepts a compiler may refuse; what compiles may spill or miss the tensor
cores.  Each launch of a backend's forward and backward is compiled as it would be launched.
"""

from functools import cache

import pytest
import torch
from d2l_kernels.dispatch import OPS, load

ahead = pytest.importorskip("ahead", reason="triton is not installed")

# products whose tile has fewer than the 64 rows of a warp group's instruction stay with HMMA
NARROW = {
    "outer": {"BLOCK_R": 16},
    "gradient_q": {"M": 32},
    "gradient_kv": {"N": 32},
}


def lora(backend, make):
    """gemma-2-2b's down_proj at one, a few and many chunks a document, and a narrow model."""
    tok = (1024, 300, 1)
    gemma, narrow = (9216, 2304), (70, 50)
    for ranks, (d_in, d_out) in (((8,) * 3, gemma), ((72, 8, 200), gemma), ((9,) * 3, narrow)):
        x, dy = make(sum(tok), d_in), make(sum(tok), d_out)
        A, B = make(sum(ranks), d_in), make(sum(ranks), d_out)
        backend.forward(x, A, B, tok, ranks, 2.0)
        backend.backward(dy, x, A, B, tok, ranks, 2.0)


def distill(backend, make):
    """gemma-2-2b with a teacher's top 16, SmolLM2 with labels, and a tiny vocabulary."""
    gemma, smollm, tiny = (256000, 2304, 16, 30.0), (49152, 576, 1, 0.0), (300, 8, 50, 0.0)
    for vocab, d_model, k, softcap in (gemma, smollm, tiny):
        hidden, head = make(64, d_model), make(vocab, d_model)
        logprob, idx = make(64, k).float(), make(64, k).long()
        for need_grad in (True, False):
            backend.forward(hidden, head, logprob, idx, softcap, need_grad)


PIECES, WHOLE = (4000, 1), (200,) * 3


def cross(backend, make):
    """Heads of every width in the table, in pieces; and one between, each segment whole."""
    for d_head, lengths in ((64, PIECES), (128, PIECES), (256, PIECES), (80, WHOLE)):
        q, k = make(len(lengths), 4, 32, d_head), make(sum(lengths), 4, d_head)
        out, lse = backend.forward(q, k, k, lengths, 0.1)
        backend.backward(q, q, k, k, out, lse, lengths, 0.1)


def latent(backend, make):
    """Contexts of every width in the table, in pieces; and one between, each segment whole."""
    for d_latent, lengths in (*((2**i, PIECES) for i in range(6, 10)), (320, WHOLE)):
        q, x = make(len(lengths), 128, d_latent), make(sum(lengths), d_latent)
        if backend.why_not(q, x) is None:
            out, lse = backend.forward(q, x, lengths, 1e-6, 0.1)
            backend.backward(q, q, x, out, lse, lengths, 1e-6, 0.1)


SIZES = {
    "segmented_lora": lora,
    "cross_attention": cross,
    "latent_attention": latent,
    "topk_distill": distill,
}


@cache
def compiled(op, capability, dtype):
    def make(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    with ahead.compiling(capability) as found:
        SIZES[op](load(op, "triton"), make)
    return list({one.binary.hash: one for one in found}.values())


def test_every_op_with_kernels_is_compiled():
    assert {op for op, (_, backends) in OPS.items() if "triton" in backends} == set(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", SIZES)
def test_nothing_spills_and_shared_memory_suffices(op, capability, dtype):
    found = compiled(op, capability, dtype)
    assert found
    for one in found:
        assert one.usage["STACK"] == one.usage["LOCAL"] == 0, f"{one} spills: {one.usage}"
        assert one.shared <= ahead.SHARED[capability], f"{one}: {one.shared} bytes shared"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", SIZES)
def test_products_run_on_tensor_cores(op, capability):
    for one in compiled(op, capability, torch.bfloat16):
        assert one.dots <= {"bf16"}, f"{one} multiplies {one.dots}"
        narrow = NARROW.get(one.name, {}).items() & one.options.items()
        best = "HGMMA" if capability == 90 and not narrow else "HMMA"
        assert one.tensor_core == (best if one.dots else "none"), f"{one}: {one.tensor_core}"


def test_a_spill_and_a_missed_tensor_core_are_seen():
    """One warp cannot hold a tile of ``expand``; float32 products run elsewhere."""
    backend = load("segmented_lora", "triton")
    with ahead.compiling(80) as found:
        launch = ahead.triton_support.launch
        ahead.triton_support.launch = lambda *a, **o: launch(*a, **o | {"num_warps": 1})
        for dtype in (torch.bfloat16, torch.float32):
            u, B = (torch.empty(64, n, dtype=dtype, device="meta") for n in (64, 2304))
            backend._expand(u, B, (64,), (64,))
    assert found[0].usage["LOCAL"] + found[0].usage["STACK"] > 0
    assert [one.tensor_core for one in found] == ["HMMA", "none"]
