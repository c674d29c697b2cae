"""What the Triton backends share: when they run, ragged tiles as small device tables, launches.

Kernels are launched through `launch` alone, where tests put bands around their tensors or compile
them for a GPU that is not there.  They carry ``@no_type_check`` under ``@triton.jit``: the tests'
run-time shape checks would wrap what Triton must read.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(*args: object) -> str | None:
    """Say why no Triton kernel runs on these tensors: their device, their dtype, their GPU."""
    for t in args:
        if not isinstance(t, Tensor):
            continue
        if t.is_floating_point() and t.dtype not in DTYPES and not INTERPRETED:
            return f"{t.dtype} is not one of {', '.join(map(str, DTYPES))}"
        if t.is_cuda and torch.cuda.get_device_capability(t.device) < (8, 0):
            return f"{torch.cuda.get_device_name(t.device)} is older than sm_80"
    return None


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the type to accumulate in: float32, and float64 for itself in the interpreter."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(n: int, least: int = 16, most: int = 1 << 30) -> int:
    """Round up to a power of two within bounds; the sides of a tile of a dot are at least 16."""
    return min(most, max(least, 1 << max(0, n - 1).bit_length()))


def cdiv(n: int, by: int) -> int:
    """Divide, rounding up."""
    return -(-n // by)


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the (segment + 1,) int32 starts of segments, cached on the device."""
    return _table("offsets", tuple(lengths), 1, device)


def tiles(lengths: Sequence[int], block: int, device: torch.device) -> Tensor:
    """Return (tile, 2) int32: segment and first row of every tile of at most ``block`` rows."""
    return _table("tiles", tuple(lengths), block, device)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Launch a kernel; an empty grid does nothing."""
    if 0 not in grid:
        kernel[grid](*args, **options)


@lru_cache(maxsize=1024)
def _table(kind: str, lengths: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    if kind == "tiles":
        rows = [
            (i, row)
            for i, n in enumerate(lengths)
            for row in range(starts[i], starts[i] + n, block)
        ]
        table = torch.tensor(rows, dtype=torch.int32).view(-1, 2)
    else:
        table = torch.tensor(starts, dtype=torch.int32)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
