"""Every op: backends against the written maths, gradients, dtypes, edges, torch machinery."""

import inspect
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import d2l_kernels
import kernel_cases
import pytest
import torch
from d2l_kernels import Segments, explain, segmented_lora, topk_distill, use_backend
from d2l_kernels.dispatch import OPS as REGISTERED
from d2l_kernels.dispatch import load
from kernel_cases import OPS, RAGGED, case, run
from torch.utils.checkpoint import checkpoint

OURS = "torch"


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("op", OPS)
def test_value_and_gradients_equal_the_reference(op, lengths):
    one = case(op, lengths)
    with use_backend("reference"):
        expected = run(one)
    with use_backend(OURS):
        found = run(one)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert a.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    one = case(op, (3, 1))
    tensors = [t.requires_grad_() for t in one.tensors]
    assert torch.autograd.gradcheck(one.fn, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_no_worse_than_twice_the_reference_in_the_same_dtype(op, dtype):
    """Both against float64 on the same rounded inputs; half an ulp of the result is free."""
    one = case(op, (300, 410), dtype)
    with use_backend("reference"):
        plain = run(one)
        exact = run(case_in_double(op, (300, 410), dtype))
    with use_backend(OURS):
        found = run(one)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        free = torch.finfo(ours.dtype).eps / 2 * truth.abs().max()
        error, allowed = ((t.double() - truth).norm() for t in (ours, theirs))
        assert error <= 2 * allowed + free


def case_in_double(op, lengths, dtype):
    one = case(op, lengths, dtype)
    one.tensors = [t.double() for t in one.tensors]
    return one


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            if fn.namespace == "d2l_kernels":
                seen.append((fn, args))
            return fn(*args, **(kwargs or {}))

    with Spy():
        run(case(op, (3, 2)))
    assert seen
    for fn, args in seen:
        forward = not fn._opname.endswith("_backward")
        inputs = [
            a.detach().clone().requires_grad_(
                forward and a.is_floating_point() and not (i and "distill" in fn._opname)
            )
            if isinstance(a, torch.Tensor)
            else a
            for i, a in enumerate(args)
        ]  # fmt: skip
        torch.library.opcheck(fn, inputs)


@pytest.mark.parametrize("op", OPS)
def test_survives_activation_checkpointing(op):
    one = case(op, (3, 2))
    expected = run(one)
    plain, one.fn = one.fn, None
    one.fn = lambda *t: checkpoint(plain, *t, use_reentrant=False)
    for a, b in zip(run(one), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_autocast_runs_in_its_dtype(op):
    one = case(op, (30, 20), torch.float32)
    expected = one.fn(*one.tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = one.fn(*one.tensors)
    error = (found.float() - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2


def test_traces_whole_under_compile():
    """In a process of its own: run-time shape checks and torch.compile exclude each other."""
    script = Path(__file__).parents[1] / "support" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name.replace(", ", "-") for name in OPS]


@pytest.mark.parametrize("op", REGISTERED)
def test_explain_gives_a_reason_or_none(op):
    reasons = explain(op)
    assert reasons["torch"] is None
    assert reasons["reference"] is None
    assert explain()[op] == reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_backends_say_so_and_are_not_imported():
    code = """
import sys, torch
from d2l_kernels import explain, segmented_lora, Segments, use_backend
x = torch.ones(2, 3)
segmented_lora(x, x, x, Segments((2,)), Segments((2,)))
assert explain("segmented_lora", x)["triton"] == "there is no CUDA device"
assert "d2l_kernels.triton_support" not in sys.modules
try:
    with use_backend("triton"):
        segmented_lora(x, x, x, Segments((2,)), Segments((2,)))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("on the triton backend: there is no CUDA device"), done


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(load("segmented_lora", "torch"), "why_not", lambda *_: "it is Monday")
    x, A = torch.ones(2, 3), torch.ones(1, 3)
    assert explain("segmented_lora", x, A, A)["torch"] == "it is Monday"
    with use_backend("torch"), pytest.raises(RuntimeError, match=r"torch backend: it is Monday"):
        segmented_lora(x, A, A, Segments((2,)), Segments((1,)))


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        (("cuda",), {}, "backend must be one of .*'cuda'"),
        ((), {"segmented_lora": "cuda"}, "has the backends .*not 'cuda'"),
        ((), {"softmax": "torch"}, "op must be one of .*'softmax'"),
    ],
)
def test_unknown_backends_and_ops_are_refused(positional, named, message):
    with pytest.raises(ValueError, match=message), use_backend(*positional, **named):
        pass


def test_backward_follows_its_forward_and_threads_keep_their_own_choice():
    one = case("segmented_lora", (3, 2))
    tensors = [t.requires_grad_() for t in one.tensors]
    with use_backend(segmented_lora="torch"):
        out = one.fn(*tensors)
        seen = []
        other = threading.Thread(target=lambda: seen.append(explain_forced()))
        other.start()
        other.join()
    with use_backend(segmented_lora="reference"):
        torch.autograd.grad(out.sum(), tensors)
    assert seen == [""]


def explain_forced():
    from d2l_kernels.dispatch import forced

    return forced("segmented_lora")


def test_no_label_at_all_gives_no_loss_and_a_zero_gradient():
    hidden = torch.zeros(0, 6, requires_grad=True)
    loss, best = topk_distill(
        hidden, torch.ones(4, 6), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.long)
    )
    assert loss.shape == best.shape == (0,)
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 6)


@pytest.mark.parametrize("op", OPS)
def test_no_segment_at_all(op):
    one = case(op, (0, 0))
    out, *grads = run(one)
    assert all(t.isfinite().all() for t in (out, *grads))
    assert not out.any()


def test_huge_scores_stay_finite():
    for op in OPS:
        one = case(op, (5, 3), torch.float32)
        one.tensors = [t * 1e4 for t in one.tensors]
        assert all(t.isfinite().all() for t in run(one))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("segmented_lora", lambda x, A, B: (x[1:], A, B), "tok covers 5 tokens but x has 4"),
        ("segmented_lora", lambda x, A, B: (x, A[1:], B), "rank covers"),
        ("segmented_lora", lambda x, A, B: (x[:, 1:], A, B), "A has width 6 but x has 5"),
        ("segmented_lora", lambda x, A, B: (x, A, B.float()), "B is torch.float32"),
        ("segmented_lora", lambda x, A, B: (x.to("meta"), A, B), "x is on meta, A on cpu"),
        ("segmented_lora", lambda x, A, B: (x.long(), A, B), "x must be floating point"),
        ("segmented_lora", lambda x, A, B: (x[0], A, B), r"x must have 2 dimensions.*\(6,\)"),
        ("cross_attention", lambda q, k, v: (q[:1], k, v), "segments describe 2 x 5"),
        ("cross_attention", lambda q, k, v: (q[:, :, :3], k, v), "3 query heads do not divide"),
        ("cross_attention", lambda q, k, v: (q, k, v.float()), "v is torch.float32"),
        ("cross_attention", lambda q, k, v: (q, k, v.to("meta")), "v is on meta, q on cpu"),
        ("cross_attention", lambda q, k, v: (q[0], k, v), "q must have 4 dimensions"),
        ("latent_attention", lambda q, x, n, k, v: (q, x[1:], n, k, v), "segments describe"),
        ("latent_attention", lambda q, x, n, k, v: (q, x, n, k[1:], v), "W_k has 15 rows"),
        ("latent_attention", lambda q, x, n, k, v: (q, x, n[1:], k, v), "do not fit"),
        ("latent_attention", lambda q, x, n, k, v: (q, x, n[None], k, v), "norm_weight must have"),
        ("latent_attention", lambda q, x, n, k, v: (q, x.half(), n, k, v), "x is torch.float16"),
        ("topk_distill", lambda h: (h[1:],), "must both have one row for each of 4 tokens"),
        ("topk_distill", lambda h: (h[:, 1:],), "head has width 6, hidden 5"),
        ("topk_distill", lambda h: (h[0],), "hidden must have 2 dimensions"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(op, change, message, unchecked):
    one = case(op, (3, 2))
    with pytest.raises(ValueError, match=message):
        one.fn(*change(*one.tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_idx": torch.zeros(3, 2)}, "teacher_idx is torch.float32, not integer"),
        ({"weight": torch.ones(2)}, "weight must have one number for each of 3 tokens"),
        ({"teacher_logprob": torch.zeros(3, 2, device="meta")}, "teacher_logprob is on meta"),
        ({"softcap": -1.0}, "softcap must be positive, got -1"),
        ({"head": torch.ones(4, 6, requires_grad=True)}, "head must not require a gradient"),
    ],
)
def test_topk_distill_refuses(change, message, unchecked):
    good = {"hidden": torch.ones(3, 6), "head": torch.ones(4, 6)}
    good |= {"teacher_logprob": torch.zeros(3, 2), "teacher_idx": torch.zeros(3, 2).long()}
    unchecked.topk_distill(**good)
    with pytest.raises(ValueError, match=message):
        unchecked.topk_distill(**good | change)


def test_a_rank_that_no_adapter_has_is_refused():
    x, A = torch.ones(1, 1), torch.ones(20000, 1)
    with pytest.raises(ValueError, match="rank holds 20000, at most 16384"):
        segmented_lora(x, A, A, Segments((1,)), Segments((20000,)))


@pytest.fixture
def unchecked(monkeypatch):
    """Take the run-time shape checks off the public functions: users do not have them."""
    plain = {op: inspect.unwrap(getattr(d2l_kernels, op)) for op in REGISTERED}
    for op, fn in plain.items():
        monkeypatch.setattr(kernel_cases, op, fn)
    return SimpleNamespace(**plain)
