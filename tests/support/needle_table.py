"""A synthetic results table of the needle experiment, shaped as the claims say."""

import pandas as pd

from d2l.artifacts import COLUMNS
from d2l.intervals import wilson

WINDOW, TRAIN_TOK = 512, 256
CONTEXT = {"window": WINDOW, "train_tok": TRAIN_TOK}
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def needle_table(seeds=(0,), n=100, fall_tok=32_768) -> pd.DataFrame:
    """D2L is perfect up to `fall_tok` and useless from there on; the base up to its window."""
    rows = []
    for seed in seeds:
        for tok in LENGTHS:
            chunks = -(-tok // 256)
            hits = {
                "d2l": n if tok < fall_tok else 0,
                "base_with_context": n if tok <= WINDOW else 0,
                "base_without_context": 0,
                "wrong_document": 0,
            }
            for series, k in hits.items():
                kv_tok = 20 + (tok if series == "base_with_context" else 0)
                adapter = 0.0 if series.startswith("base") else 0.05 * chunks
                own_chunks = 0 if series.startswith("base") else chunks
                rows.append(
                    (series, tok, own_chunks, n, k / n, *wilson(k, n), kv_tok * 0.004, adapter,
                     0.01 * chunks, seed)
                )  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))
