"""Every way to answer questions about a document, as functions of one signature.

A `Method` takes the setting, a document and questions, and returns one `Reply` a question, with
time and memory of the update (everything from the document to being ready to answer) and of
generation apart.  Some methods have parameters: ``compressed(0.4)`` is a method.
"""

from .distilled import DistillConfig, distilled
from .internalized import (
    d2l_batched,
    d2l_iterative,
    d2l_routed,
    d2l_swapped,
    d2l_with_truncated_context,
    document_alone,
    peft_adapter,
)
from .prompted import compressed, in_context, retrieved, truncated_context, without_context
from .setting import Method, Reply, Setting

__all__ = [
    "DistillConfig",
    "Method",
    "Reply",
    "Setting",
    "compressed",
    "d2l_batched",
    "d2l_iterative",
    "d2l_routed",
    "d2l_swapped",
    "d2l_with_truncated_context",
    "distilled",
    "document_alone",
    "in_context",
    "peft_adapter",
    "retrieved",
    "truncated_context",
    "without_context",
]
