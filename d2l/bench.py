"""Cost of internalising a long document: time against the bare encoder, and peak memory.

A benchmark, not a test: run it on an idle machine with ``just bench``.
"""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from .chunking import group_by_length
from .data.needle import NeedleGenerator
from .evaluate import MIB
from .model import DocToLoRA


def internalize_cost(model: DocToLoRA, n_tok: int, *, repeats: int = 3) -> dict[str, float]:
    """Internalise a prose document of about ``n_tok`` tokens and run the encoder alone.

    Both go over the same chunks in the same groups, in turn; times are medians.  ``peak_mib`` is
    the peak above the loaded model, the adapter included; ``beyond_adapter_mib`` leaves it out.
    """
    generator = NeedleGenerator(model.reader.tokenizer, filler="prose", split="test")
    sample = generator.sample(random.Random(0), int(0.99 * n_tok), n_tok)
    chunks = model.chunks(sample.document)
    groups = group_by_length([len(c) for c in chunks], model.tok_budget)
    tensors = [[torch.tensor(chunks[i]) for i in group] for group in groups]
    model.internalize(" ".join(sample.document.split()[:600]))
    gc.collect()
    with _peak_mib(model.base.device) as peak:
        adapter = model.internalize(sample.document)
    adapter_mib = adapter.nbytes / MIB
    whole, bare = [], []
    for _ in range(repeats):
        whole.append(_seconds(model, lambda: model.internalize(sample.document)))
        bare.append(
            _seconds(model, lambda: [model.encoder(group, lambda _: None) for group in tensors])
        )
    internalize_s, encoder_s = statistics.median(whole), statistics.median(bare)
    return {
        "haystack_tok": sample.n_tok,
        "n_chunks": len(chunks),
        "internalize_s": internalize_s,
        "encoder_s": encoder_s,
        "ratio": internalize_s / encoder_s,
        "adapter_mib": adapter_mib,
        "peak_mib": peak[0],
        "beyond_adapter_mib": peak[0] - adapter_mib,
    }


def _seconds(model: DocToLoRA, work: Callable[[], Any]) -> float:
    cuda = model.base.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def _peak_mib(device: torch.device) -> Iterator[list[float]]:
    """Yield a one-element list that holds the peak above the start once the block has ended.

    CUDA counts allocated memory; elsewhere the process's resident memory is sampled every 2 ms.
    """
    out = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield out
        out[0] = (torch.cuda.max_memory_allocated(device) - start) / MIB
        return
    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    peak = [start]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield out
    finally:
        done.set()
        watcher.join()
    out[0] = (max(peak[0], process.memory_info().rss) - start) / MIB
