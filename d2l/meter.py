"""Seconds and peak memory of a piece of work, with the device's queue waited for on both sides."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1024.0**2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Meter:
    """Wall time, and the peak of tensor memory above what was there at the start.

    NaN is what was not measured.  Meters of steps that follow each other add up: times are summed,
    and the peak is the larger one.
    """

    seconds: float = 0.0
    peak_mib: float = 0.0

    def __add__(self, other: Meter) -> Meter:
        return Meter(self.seconds + other.seconds, max(self.peak_mib, other.peak_mib))


def measured(
    work: Callable[[], Result], device: torch.device, *, count_memory: bool = False
) -> tuple[Result, Meter]:
    """Do ``work`` and return its result and what it took.

    On CUDA both are measured at once, from the allocator's counters.  Elsewhere every tensor is
    watched when ``count_memory`` asks for it, which is exact but slow, so that the seconds are NaN
    then; without it the memory is NaN.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        began = time.perf_counter()
        result = work()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        return result, Meter(seconds, (torch.cuda.max_memory_allocated(device) - start) / MIB)
    if count_memory:
        with LiveTensors() as live:
            result = work()
        return result, Meter(math.nan, live.peak / MIB)
    began = time.perf_counter()
    result = work()
    return result, Meter(time.perf_counter() - began, math.nan)


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors that come to life inside the block and are still alive.

    Views share their storage and count once.  What an operation allocates and frees within itself
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if _is_plain(t):
                self._see(t.untyped_storage(), before)
        return out

    def _see(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._known:
            return
        self._known[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
