"""Cost of internalising a long document, and of asking about it.

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
from functools import partial
from typing import Any

import psutil
import torch

from .chunking import group_by_length
from .data.needle import NeedleGenerator
from .evaluate import MIB
from .model import DocToLoRA

Work = Callable[[], Any]


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


QUERY = "What is the special magic number? Reply with only the number."


def query_cost(model: DocToLoRA, context_tok: int, *, repeats: int = 5) -> list[dict[str, Any]]:
    """Time queries with and without adapters; one row per measurement, times are medians.

    ``ratio`` is seconds over those of ``against``, both measured in turn: an answer of 32 tokens
    merged and unmerged against the bare base, the first token from an adapter against one with the
    document of about ``context_tok`` tokens in the prompt, and 16 rows with 16 adapters in one call
    against 16 calls.
    """
    generator = NeedleGenerator(model.reader.tokenizer, filler="prose", split="test")
    rng = random.Random(0)

    def document(n_tok: int) -> str:
        return generator.sample(rng, int(0.97 * n_tok), n_tok).document

    long = document(context_tok)
    whole = model.internalize(long)
    short = [model.internalize(document(model.chunk.max_tok // 2)) for _ in range(16)]
    many = whole
    while len(many.chunks) < 32:
        many = many + model.internalize(document(context_tok))
    answer = {"max_new_tokens": 32, "min_new_tokens": 32}
    first = {"max_new_tokens": 1}
    rows: list[dict[str, Any]] = []

    def compare(
        measure: str, against: str, n_chunks: int, ours: Work, theirs: Work, n: int
    ) -> None:
        ours(), theirs() if n > 1 else None
        pairs = [(_seconds(model, theirs), _seconds(model, ours)) for _ in range(n)]
        base_s, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        found = {"measure": measure, "n_chunks": n_chunks, "seconds": seconds, "against": against}
        rows.append(found | {"against_s": base_s, "ratio": seconds / base_s})

    def bare() -> Any:
        return model.ask(QUERY, **answer)

    for adapter in (short[0], whole, many):
        n = len(adapter.chunks)
        unmerged = partial(model.ask, QUERY, adapter, **answer)
        compare("answer, unmerged", "answer, base", n, unmerged, bare, repeats)
    timed = []
    for _ in range(repeats):
        model.ask(QUERY, **first)
        before = _seconds(model, bare)
        with whole.merge_into(model):
            model.ask(QUERY, **first)
            timed.append((before, _seconds(model, bare)))
    base_s, seconds = (statistics.median(column) for column in zip(*timed, strict=True))
    rows.append(
        {"measure": "answer, merged", "n_chunks": len(whole.chunks), "seconds": seconds}
        | {"against": "answer, base", "against_s": base_s, "ratio": seconds / base_s}
    )
    compare(
        "first token, adapter", f"first token, {context_tok} tokens in context", len(whole.chunks),
        partial(model.ask, QUERY, whole, **first),
        partial(model.ask, f"{long}\n\n{QUERY}", **first), 1,
    )  # fmt: skip
    compare(
        "16 rows, 16 adapters, one call", "16 calls", 1,
        partial(model.generate, [QUERY] * 16, short, **answer),
        lambda: [model.ask(QUERY, a, **answer) for a in short], max(1, repeats // 2),
    )  # fmt: skip
    return rows


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
