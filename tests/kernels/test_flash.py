"""`cross_attention` through flash-attention's function, the library replaced by a stand-in.

The stand-in has the library's signature, refuses what the library would, and computes on the CPU.
"""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from d2l_kernels import dispatch, explain, use_backend
from d2l_kernels.dispatch import load
from kernel_cases import RAGGED, case, run


class Attend(torch.autograd.Function):
    """Like the library's: one autograd function, whose inside autograd does not see."""

    @staticmethod
    def forward(ctx, q, k, v, at_q, at_k, scale):
        ctx.save_for_backward(q, k, v)
        ctx.pieces, ctx.scale = list(zip(pieces(at_q), pieces(at_k), strict=True)), scale
        out = torch.full_like(q, torch.nan)
        for i, j in ctx.pieces:
            p = torch.einsum("qhd,khd->hqk", scale * q[i], k[j]).softmax(-1)
            out[i] = torch.einsum("hqk,khd->qhd", p, v[j])
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
        for i, j in ctx.pieces:
            p = torch.einsum("qhd,khd->hqk", ctx.scale * q[i], k[j]).softmax(-1)
            dp = torch.einsum("qhd,khd->hqk", d_out[i], v[j])
            ds = ctx.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
            dq[i] = torch.einsum("hqk,khd->qhd", ds, k[j])
            dk[j] = torch.einsum("hqk,qhd->khd", ds, q[i])
            dv[j] = torch.einsum("hqk,qhd->khd", p, d_out[i])
        return dq, dk, dv, None, None, None


def pieces(offsets):
    at = offsets.tolist()
    return [slice(*pair) for pair in itertools.pairwise(at)]


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert k.shape == v.shape
    assert q.shape[2] == k.shape[2]
    assert q.shape[1] % k.shape[1] == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    for tokens, offsets, longest in (
        (q, cu_seqlens_q, max_seqlen_q),
        (k, cu_seqlens_k, max_seqlen_k),
    ):
        assert offsets.dtype == torch.int32
        assert offsets.device == tokens.device
        assert offsets[0] == 0
        assert offsets[-1] == len(tokens)
        assert offsets.diff().min() > 0
        assert offsets.diff().max() == longest
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    assert deterministic, "the gradient of q would be added up in any order"
    return Attend.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@pytest.fixture
def flash(monkeypatch):
    """Put the stand-in where the library would be, on a machine with a GPU that it supports."""
    module = ModuleType("flash_attn")
    monkeypatch.setattr(module, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(dispatch, "_no_gpu", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    load.cache_clear()
    yield load("cross_attention", "flash")
    load.cache_clear()
    sys.modules.pop("d2l_kernels.cross.flash_backend")


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_value_and_gradients_equal_the_reference(flash, lengths, monkeypatch):
    monkeypatch.setattr(flash, "why_not", lambda *_: None)
    one = case("cross_attention", lengths)
    with use_backend("reference"):
        expected = run(one)
    with use_backend(cross_attention="flash"):
        found = run(one)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_runs_by_itself_in_half_precision_and_steps_aside_otherwise(flash, monkeypatch):
    seen = []
    forward = flash.forward
    monkeypatch.setattr(flash, "forward", lambda *a: seen.append(a[0].dtype) or forward(*a))
    with use_backend(latent_attention="torch"):
        for dtype in (torch.bfloat16, torch.float16):
            run(case("cross_attention", (5, 0, 7), dtype))
    assert seen == [torch.bfloat16, torch.float16]
    reasons = explain("cross_attention", *case("cross_attention", (5,), torch.float32).tensors)
    assert reasons["flash"] == "torch.float32 is neither float16 nor bfloat16"


def test_says_why_not(flash, monkeypatch):
    q, k = torch.ones(1, 2, 3, 8).half(), torch.ones(4, 2, 8).half()
    assert flash.why_not() is None
    assert flash.why_not(q, k, k) is None
    assert flash.why_not(q, k[:0], k[:0]) == "there is no token"
    wide = torch.ones(1, 2, 3, 264).half()
    assert flash.why_not(wide, k, k) == "heads of 264 are wider than 256"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert flash.why_not(q, k, k) == "a GPU is older than sm_80"


def test_without_the_library_or_a_gpu_the_reason_is_given(monkeypatch):
    if not torch.cuda.is_available():
        assert explain("cross_attention")["flash"] == "there is no CUDA device"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(dispatch, "_no_gpu", lambda *_: None)
    load.cache_clear()
    assert explain("cross_attention")["flash"] == "flash_attn is not installed"
    load.cache_clear()
