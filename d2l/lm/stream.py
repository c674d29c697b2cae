"""Text while it is being generated: `generate` runs in a thread, its pieces come out here."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def stream_text(tokenizer: Any, run: Callable[..., Any]) -> Iterator[str]:
    """Yield the pieces of text that ``run(streamer=..., stopping_criteria=...)`` generates.

    ``run`` sees the caller's context variables.  Its error is raised here, after the text that it
    gave; a consumer that stops early stops the generation.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pieces: queue.Queue[Any] = streamer.text_queue
    stop, failed = _Stop(), []

    def work() -> None:
        try:
            run(streamer=streamer, stopping_criteria=StoppingCriteriaList([stop]))
        except BaseException as error:
            failed.append(error)
            pieces.put(streamer.stop_signal)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.asked.set()
        thread.join()
    if failed:
        raise failed[0]
