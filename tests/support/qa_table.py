"""A results table of question answering with known numbers."""

import itertools

import pandas as pd

from d2l.artifacts import QA_COLUMNS

METHODS = {
    ("base_with_context", ""): 1.0,
    ("d2l", "batched"): 0.9,
    ("wrong_document", ""): 0.1,
    ("cd_oracle", ""): 1.0,
    ("cd_generated", "20"): 0.6,
}


def qa_table(methods=METHODS, n_facts=(1, 8), seeds=(0, 1)):
    """Give every method its number, less a hundredth for each further seed."""
    rows = [
        {"series": series, "part": part, "n_facts": n, "n_docs": 4, "n": 4 * min(4, n)}
        | dict.fromkeys(QA_COLUMNS[5:-1], 1.0)
        | {"recall": value - 0.01 * seed, "relative": value - 0.01 * seed, "seed": seed}
        | {"update_s": 0.02 if series == "d2l" else 4.0 * (series[:2] == "cd")}
        for (series, part), value in methods.items()
        for n, seed in itertools.product(n_facts, seeds)
    ]
    return pd.DataFrame(rows, columns=list(QA_COLUMNS))
