"""Add a low-rank update to a frozen model's linears without touching the model's state.

Hooks are registered once when a model is loaded.  What they add comes from a context variable that
the call sets and resets, so threads, tasks and nested calls never see each other's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Delta = Callable[[int, str, Tensor], Tensor | None]

_ACTIVE: ContextVar[tuple[nn.Module, Delta] | None] = ContextVar("d2l_active_delta", default=None)


def decoder_of(model: Any) -> tuple[Any, str]:
    """Return the module that runs the decoder layers, and the name of its layer list.

    Raises ValueError when no module holds a list of ``config.num_hidden_layers`` layers.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and n_layers:
                return module, name
    raise ValueError(f"{type(model).__name__} has no list of {n_layers} decoder layers")


def linears_of(layer: nn.Module) -> dict[str, nn.Module]:
    """Name a decoder layer's linears: by the last part of the path where that is unique.

    Routed experts are left out: they see tokens, not rows, so nobody knows whose they are.
    """
    found = {
        path: m
        for path, m in layer.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        and m.weight.ndim == 2
        and "experts." not in path
    }
    last = [path.rpartition(".")[2] for path in found]
    return {
        (short if last.count(short) == 1 else path.replace(".", "-")): m
        for short, (path, m) in zip(last, found.items(), strict=True)
    }


def widths_of(linear: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out); transformers' Conv1D stores its weight the other way round."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    d_in, d_out = linear.get_parameter("weight").shape
    return d_in, d_out


@dataclass(frozen=True)
class Site:
    """A linear that can be adapted: layer, name there, path in the model, and widths."""

    layer: int
    module: str
    path: str
    d_in: int
    d_out: int


def sites_of(model: Any) -> list[Site]:
    """List the linears of all decoder layers, layer by layer."""
    decoder, name = decoder_of(model)
    path_of = {id(m): path for path, m in model.named_modules()}
    return [
        Site(index, module, path_of[id(linear)], *widths_of(linear))
        for index, layer in enumerate(getattr(decoder, name))
        for module, linear in linears_of(layer).items()
    ]


def instrument(model: Any) -> None:
    """Register the hooks on every linear of every decoder layer; a second call does nothing.

    The output embedding gets its rows contiguous: of a slice, as generation takes it of a batch of
    prompts, torch's bfloat16 product on CPUs copies the whole embedding for each row.
    """
    if getattr(model, "_d2l_instrumented", False):
        return
    decoder, name = decoder_of(model)
    for index, layer in enumerate(getattr(decoder, name)):
        for module, linear in linears_of(layer).items():
            linear.register_forward_hook(_hook(model, index, module))
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    model._d2l_instrumented = True


def is_merged(model: Any) -> bool:
    """Say whether an adapter has been added to the model's weights."""
    return getattr(model, "_d2l_merged", False)


@contextmanager
def applied(model: nn.Module, delta: Delta | None) -> Iterator[None]:
    """Let ``delta(layer, module, x)`` be added to the linears of ``model`` inside the block.

    None switches every update off, also one of an enclosing block.
    """
    token = _ACTIVE.set(None if delta is None else (model, delta))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _hook(model: nn.Module, layer: int, module: str) -> Callable[..., Tensor | None]:
    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        active = _ACTIVE.get()
        if active is None or active[0] is not model:
            return None
        update = active[1](layer, module, args[0])
        return None if update is None else out + update[..., : out.shape[-1]].to(out.dtype)

    return add
