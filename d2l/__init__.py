"""Doc-to-LoRA: internalise a document into a LoRA adapter of a frozen language model.

>>> import d2l
>>> model = d2l.DocToLoRA.from_pretrained("fig2/tiny")
>>> adapter = model.internalize("The sky is blue. The special magic number is 5 0 3 1.")
>>> model.ask("What is the special magic number? Reply with only the number.", adapter)
'5031'

Importing this package loads nothing heavy: a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter, Source
    from .export import from_peft
    from .lm.base import LanguageModel, load_base
    from .model import DocToLoRA
    from .routing import Routed
    from .store import AdapterStore

__all__ = [
    "Adapter", "AdapterStore", "DocToLoRA", "LanguageModel", "Routed", "Source", "from_peft",
    "load_base",
]  # fmt: skip

_HOME = {
    "Adapter": "adapter",
    "AdapterStore": "store",
    "DocToLoRA": "model",
    "LanguageModel": "lm.base",
    "Routed": "routing",
    "Source": "adapter",
    "from_peft": "export",
    "load_base": "lm.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'd2l' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
