"""Which backend computes an op: automatic, explained, or forced.

Every op lies in a folder of its own; a backend is a module there, ``<name>_backend.py``, with
``forward``, ``backward`` and ``why_not``, the one place for its rules on hardware, dtype and shape.
``reference.py`` states the maths in plain differentiable torch and runs only when it is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

PREFERENCE = ("flash", "triton", "torch")
OPS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "segmented_lora": ("lora", ("triton", "torch", "reference")),
        "cross_attention": ("cross", ("flash", "triton", "torch", "reference")),
        "latent_attention": ("latent", ("triton", "torch", "reference")),
        "topk_distill": ("distill", ("triton", "torch", "reference")),
    }
)
_FORCED: ContextVar[Mapping[str, str]] = ContextVar(
    "d2l_kernels_backend", default=MappingProxyType({})
)


@contextmanager
def use_backend(backend: str | None = None, /, **of_op: str) -> Iterator[None]:
    """Force a backend for all ops, or for those named, inside a ``with`` block of this thread.

    An op that lacks the backend given for all ops keeps its own choice.  An op that has it and
    cannot run it raises RuntimeError with the reason when it is called.  The backward pass follows
    its forward pass, wherever it runs; a compiled function keeps the choice it was traced with.

    Raises ValueError for an unknown backend or op, or a backend that a named op does not have.

    >>> with use_backend("torch"), use_backend(segmented_lora="reference"):
    ...     forced("segmented_lora"), forced("topk_distill")
    ('reference', 'torch')
    """
    known = {name for _, backends in OPS.values() for name in backends}
    if backend is not None and backend not in known:
        raise ValueError(f"backend must be one of {', '.join(sorted(known))}, got {backend!r}")
    for op, name in of_op.items():
        if name not in _backends(op):
            raise ValueError(f"{op} has the backends {', '.join(_backends(op))}, not {name!r}")
    all_ops = {op: backend for op, (_, names) in OPS.items() if backend in names}
    token = _FORCED.set({**_FORCED.get(), **all_ops, **of_op})
    try:
        yield
    finally:
        _FORCED.reset(token)


def forced(op: str) -> str:
    """Return the backend forced for ``op`` here, or an empty string."""
    return _FORCED.get().get(op, "")


# what torch.compiler.assume_constant_result sets, without importing all of torch.compile for it
forced.__dict__["_dynamo_marked_constant"] = True


def explain(op: str | None = None, *args: object) -> dict:
    """Say why each backend of ``op`` would not run these arguments; None means that it would.

    Without arguments only what holds on this machine for every input counts; without an op, all.

    Raises ValueError for an unknown op.

    >>> explain("segmented_lora")["torch"] is None
    True
    """
    if op is None:
        return {name: explain(name) for name in OPS}
    return {name: why_not(op, name, *args) for name in _backends(op)}


def why_not(op: str, backend: str, *args: object) -> str | None:
    """Return the reason why ``backend`` cannot run ``op`` on ``args``, or None."""
    if backend in ("triton", "flash") and (reason := _no_gpu(backend, args)):
        return reason
    module = load(op, backend)
    if isinstance(module, str):
        return module
    return None if backend == "reference" else module.why_not(*args)


def choose(op: str, backend: str, *args: object) -> ModuleType:
    """Return the forced backend, or the first in order of preference that can run ``args``.

    Raises RuntimeError when the forced backend cannot.
    """
    if backend:
        reason = why_not(op, backend, *args)
        if reason:
            raise RuntimeError(f"{op} cannot run on the {backend} backend: {reason}")
    else:
        backend = next(
            name
            for name in PREFERENCE
            if name in _backends(op) and why_not(op, name, *args) is None
        )
    module = load(op, backend)
    assert isinstance(module, ModuleType)
    return module


@cache
def load(op: str, backend: str) -> ModuleType | str:
    """Import a backend of an op; return the reason where its library is missing."""
    name = backend if backend == "reference" else f"{backend}_backend"
    try:
        return importlib.import_module(f"{__package__}.{OPS[op][0]}.{name}")
    except ImportError as error:
        return f"{error.name} is not installed"


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which an op's own dtypes hold."""
    return torch.autocast(x.device.type, enabled=False)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on for the device of the first tensor."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_alike(**tensors: tuple[Tensor, int]) -> None:
    """Raise ValueError unless all tensors are floating point, of one dtype and on one device.

    Each comes with the number of its dimensions, which is checked as well.
    """
    (name, (first, _)), *_ = tensors.items()
    require(first.is_floating_point(), f"{name} must be floating point, got {first.dtype}")
    for other, (t, n) in tensors.items():
        require(t.ndim == n, f"{other} must have {n} dimensions, got the shape {tuple(t.shape)}")
        require(t.dtype == first.dtype, f"{other} is {t.dtype} but {name} is {first.dtype}")
        require(t.device == first.device, f"{other} is on {t.device}, {name} on {first.device}")


def _no_gpu(backend: str, args: tuple[object, ...]) -> str | None:
    """Say why a GPU backend is out before its library is imported; Triton's interpreter is in."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    off = next((t.device for t in args if isinstance(t, Tensor) and not t.is_cuda), None)
    return f"a tensor is on {off}, not on a CUDA device" if off else None


def _backends(op: str) -> tuple[str, ...]:
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return OPS[op][1]
