"""Time every op against its written form: ``python -m d2l_kernels.bench [op ...]``.

Forms of one op run interleaved in one process on the same inputs; an op whose tests fail is not
timed.  Rows are appended to ``kernels/bench/results.csv``; nothing here is imported by the package.
"""

import argparse
import csv
import ctypes
import datetime
import gc
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Segments, cross_attention, latent_attention, segmented_lora, topk_distill, use_backend
from .dispatch import OPS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "kernels/bench/results.csv"
MIB = 1 << 20
MOST_S = 6
Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """One size of an op: the tensors that receive gradients and the forms to compare."""

    op: str
    size: str
    tensors: list[Tensor]
    forms: dict[str, Form]


def lora_tasks(device: torch.device) -> Iterator[Task]:
    """Yield sizes of `segmented_lora`: 9216 -> 2304 with rank 40 is gemma-2-2b's down_proj."""
    for n_tok, d_in, d_out, rank, n_seg in (
        (64, 1536, 576, 8, 2),
        (256, 1536, 576, 48, 4),
        (1024, 9216, 2304, 40, 4),
    ):
        tok, ranks = Segments((n_tok // n_seg,) * n_seg), Segments((rank,) * n_seg)
        x, A, B = _leaves(device, (n_tok, d_in), (n_seg * rank, d_in), (n_seg * rank, d_out))
        ours = partial(segmented_lora, x, A, B, tok, ranks, 2.0)
        forms: dict[str, Form] = {
            "ours": ours,
            "reference": partial(_forced, "reference", ours),
            "naive": partial(_lora_by_token, x, A, B, n_tok // n_seg, rank),
        }
        yield Task(
            "segmented_lora", f"{d_in}->{d_out} r{rank} x{n_seg} tok{n_tok}", [x, A, B], forms
        )


def cross_tasks(device: torch.device) -> Iterator[Task]:
    """Yield sizes of `cross_attention` at the published widths: 16 heads and 4 KV heads of 128."""
    for latents, lengths in ((8, (512,) * 4), (8, _ragged(9114, 16)), (208, _ragged(9114, 16))):
        segments = Segments(lengths)
        kv = (segments.total, 4, 128)
        q, k, v = _leaves(device, (len(lengths), latents, 16, 128), kv, kv)
        ours = partial(cross_attention, q, k, v, segments)
        forms: dict[str, Form] = {
            "ours": ours,
            "reference": partial(_forced, "reference", ours),
            "naive": partial(_repeated_heads, q, k, v, lengths),
        }
        yield Task(
            "cross_attention", f"L{latents} x{len(lengths)} tok{segments.total}", [q, k, v], forms
        )


def latent_tasks(device: torch.device) -> Iterator[Task]:
    """Yield sizes of `latent_attention` at the published widths, d_latent 512."""
    for latents, lengths in (
        (8, (512,) * 4),
        (8, _ragged(9114, 16)),
        (32, _ragged(9114, 16)),
        (208, _ragged(9114, 16)),
    ):
        segments = Segments(lengths)
        q, x, W_k, W_v = _leaves(
            device, (len(lengths), latents, 16, 128), (segments.total, 512), (512, 512), (512, 512)
        )
        with torch.no_grad():
            W_k *= 512**-0.5
            W_v *= 512**-0.5
        norm = torch.ones(512, device=device, requires_grad=True)
        ours = partial(latent_attention, q, x, norm, W_k, W_v, segments)
        forms: dict[str, Form] = {
            "ours": ours,
            "reference": partial(_projected, q, x, norm, W_k, W_v, segments, repeat=False),
            "naive": partial(_projected, q, x, norm, W_k, W_v, segments, repeat=True),
        }
        size = f"L{latents} x{len(lengths)} tok{segments.total}"
        yield Task("latent_attention", size, [q, x, norm, W_k, W_v], forms)


def distill_tasks(device: torch.device) -> Iterator[Task]:
    """Yield sizes of `topk_distill`; the reference forms the logits of unlabelled tokens too."""
    for n_tok, n_labels, d_model, vocab, softcap in (
        (128, 64, 576, 49152, None),
        (2048, 1024, 576, 49152, None),
        (256, 128, 2304, 256000, 30.0),
    ):
        (hidden,) = _leaves(device, (n_tok, d_model))
        head = torch.randn(vocab, d_model, device=device) * d_model**-0.5
        logprob = torch.randn(n_tok, 16, device=device, dtype=torch.float32).log_softmax(-1)
        idx = torch.rand(n_tok, vocab, device=device, dtype=torch.float32).topk(16).indices
        at = torch.arange(0, n_tok, n_tok // n_labels, device=device)

        all_rows = partial(topk_distill, hidden, head, logprob, idx, softcap)
        forms: dict[str, Form] = {
            "ours": partial(_labelled, hidden, head, logprob, idx, softcap, at),
            "reference": partial(_of_all, partial(_forced, "reference", all_rows), at),
        }
        if vocab < 100_000:  # one row at a time reads the whole head for each
            forms["naive"] = partial(_row_by_row, hidden, head, logprob, idx, softcap, at)
        size = f"V{vocab} d{d_model} labels{n_labels}/{n_tok}"
        yield Task("topk_distill", size, [hidden], forms)


TASKS = {
    "segmented_lora": lora_tasks,
    "cross_attention": cross_tasks,
    "latent_attention": latent_tasks,
    "topk_distill": distill_tasks,
}


def measure(task: Task, repeats: int) -> Iterator[dict[str, object]]:
    """Time all forms of a task in turn, forward alone and with backward, and their peak memory.

    A first round warms up and measures memory; a form that has taken ``MOST_S`` is not repeated.
    An untimed call precedes each timed one of less than a second, so that no form pays for what
    another left behind in caches and the allocator.
    """
    for direction in ("forward", "forward+backward"):
        work = {
            form: partial(_run, fn, task.tensors, backward=direction != "forward")
            for form, fn in task.forms.items()
        }
        times: dict[str, list[float]] = {form: [] for form in work}
        work["ours"]()  # the first call of all imports backends
        peaks = {form: _peak_mib(fn, task.tensors[0].device) for form, fn in work.items()}
        for _ in range(repeats):
            for form, fn in work.items():
                if sum(times[form]) < MOST_S:
                    if not times[form] or times[form][-1] < 1:
                        fn()
                    times[form].append(_seconds(fn, task.tensors[0].device))
        base = _quantile(times["reference"], 0.5)
        for form, seconds in times.items():
            p20, p50, p80 = (_quantile(seconds, q) for q in (0.2, 0.5, 0.8))
            yield {
                "op": task.op,
                "size": task.size,
                "direction": direction,
                "form": form,
                "dtype": str(task.tensors[0].dtype).removeprefix("torch."),
                "p20_ms": f"{1e3 * p20:.3f}",
                "p50_ms": f"{1e3 * p50:.3f}",
                "p80_ms": f"{1e3 * p80:.3f}",
                "peak_mib": f"{peaks[form]:.1f}",
                "speedup": f"{base / p50:.2f}",
                "repeats": len(seconds),
            }


def tests_pass(op: str) -> bool:
    """Run the tests of an op; True as well where the tests are not installed."""
    tests = ROOT / "tests/kernels/test_backends.py"
    if not tests.exists():
        return True
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(tests), "-k", f"{op} and equal"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def main() -> None:
    """Measure the ops named on the command line, all by default, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help=f"kernels (all) or some of {', '.join(OPS)}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    unknown = set(asked.op) - {"kernels", *OPS}
    if unknown:
        parser.error(f"unknown op {min(unknown)!r}, choose from {', '.join(OPS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(getattr(torch, asked.dtype))
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for op in [name for name in asked.op if name != "kernels"] or list(OPS):
        if not tests_pass(op):
            sys.exit(f"{op} is not timed: its tests fail")
        for task in TASKS[op](device):
            for row in measure(task, asked.repeats):
                _append(asked.out, about | row)
                print(
                    "{op:17} {size:32} {direction:17} {form:10} {p50_ms:>10} ms "
                    "{peak_mib:>8} MiB {speedup:>7}x".format(**row),
                    flush=True,
                )


def _leaves(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(device).requires_grad_() for s in shapes]


def _ragged(total: int, n: int) -> tuple[int, ...]:
    """Return n unequal lengths with this sum."""
    step = total // (n * n)
    lengths = [step * (2 * i + 1) for i in range(n)]
    return (*lengths[:-1], lengths[-1] + total - sum(lengths))


def _forced(backend: str, fn: Callable[[], Any]) -> Any:
    with use_backend(backend):
        return fn()


def _labelled(
    hidden: Tensor, head: Tensor, logprob: Tensor, idx: Tensor, softcap: float | None, at: Tensor
) -> Tensor:
    return topk_distill(hidden[at], head, logprob[at], idx[at], softcap)[0]


def _row_by_row(
    hidden: Tensor, head: Tensor, logprob: Tensor, idx: Tensor, softcap: float | None, at: Tensor
) -> Tensor:
    with use_backend("reference"):
        rows = at.split(1)
        return torch.cat([_labelled(hidden, head, logprob, idx, softcap, r) for r in rows])


def _of_all(fn: Callable[[], tuple[Tensor, Tensor]], at: Tensor) -> Tensor:
    return fn()[0][at]


def _lora_by_token(x: Tensor, A: Tensor, B: Tensor, per_seg: int, rank: int) -> Tensor:
    starts = [t // per_seg * rank for t in range(x.shape[0])]
    rows = [
        2.0 * ((A[s : s + rank] @ row) @ B[s : s + rank])
        for s, row in zip(starts, x.unbind(0), strict=True)
    ]
    return torch.stack(rows)


def _repeated_heads(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attend as the published code does: K and V repeated to all query heads."""
    group = q.shape[2] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    segments = zip(q.unbind(0), k.split(list(lengths)), v.split(list(lengths)), strict=True)
    out = []
    for parts in segments:
        q_i, k_i, v_i = (t.transpose(0, 1)[None] for t in parts)
        out.append(F.scaled_dot_product_attention(q_i, k_i, v_i)[0])
    return torch.stack(out).transpose(1, 2)


def _projected(
    q: Tensor, x: Tensor, norm: Tensor, W_k: Tensor, W_v: Tensor, segments: Segments, repeat: bool
) -> Tensor:
    normed = F.rms_norm(x, (x.shape[1],), norm, 1e-6)
    k, v = ((normed @ W.mT).unflatten(1, (-1, q.shape[3])) for W in (W_k, W_v))
    if repeat:
        return _repeated_heads(q, k, v, segments.lengths)
    return cross_attention(q, k, v, segments)


def _run(fn: Form, tensors: list[Tensor], *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            fn()
        return
    torch.autograd.grad(fn().sum(), tensors)


def _seconds(fn: Callable[[], None], device: torch.device) -> float:
    """Time one call; on a GPU ten that are queued one behind another, of which it sees the mean."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e4
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def _peak_mib(fn: Callable[[], None], device: torch.device) -> float:
    """Return the peak above the start; on Linux from the kernel's own high-water mark."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        fn()
        return (torch.cuda.max_memory_allocated() - start) / MIB
    if sys.platform != "linux":
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fn()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = _status("VmRSS")
    fn()
    return max(0, _status("VmHWM") - start) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def _append(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
