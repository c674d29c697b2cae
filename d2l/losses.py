"""Distillation and next-token losses with per-document averaging, and the L1 on generated LoRA.

Spec section 6.  A query's labelled token at packed position t is predicted by position t - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lora import LoraBatch

Averaging = Literal["per_ctx", "per_token"]


def average(
    loss: Float[Tensor, " label"],
    labels_per_query: Sequence[int],
    queries_per_doc: Sequence[int],
    averaging: Averaging,
    denominator: float | None = None,
) -> Float[Tensor, ""]:
    """Reduce per-token losses.

    ``per_ctx``: mean over a query's tokens, mean over a document's queries, sum over documents
    divided by ``denominator`` (documents of the whole accumulation window).  ``per_token``: sum
    over tokens divided by ``denominator`` (labelled tokens of the window).  None takes the counts
    of this batch.  A query without labels counts as a query with loss zero; a document without
    queries as a document with loss zero.

    Raises ValueError when the counts do not add up to the number of losses.
    """
    if sum(labels_per_query) != loss.numel() or sum(queries_per_doc) != len(labels_per_query):
        raise ValueError(
            f"{loss.numel()} losses, {sum(labels_per_query)} labels in {len(labels_per_query)} "
            f"queries, {sum(queries_per_doc)} queries in {len(queries_per_doc)} documents"
        )
    if averaging == "per_token":
        return loss.sum() / (loss.numel() if denominator is None else denominator)
    doc_size = [n for n in queries_per_doc for _ in range(n)]
    weight = [
        1.0 / (n_tok * n_query)
        for n_tok, n_query in zip(labels_per_query, doc_size, strict=True)
        for _ in range(n_tok)
    ]
    total = (loss * torch.tensor(weight, device=loss.device, dtype=loss.dtype)).sum()
    return total / (len(queries_per_doc) if denominator is None else denominator)


def lora_l1(loras: LoraBatch, *, padded: bool = False) -> Float[Tensor, ""]:
    """Compute the L1 of generated factors, summed over documents, averaged over the rest.

    ``mean_m [ mean_{layer,rank,d_in} sum_doc |A| + the same for B ]`` including the bias rows.
    Divide by the number of documents for training.  By default each document is averaged over its
    own rank; ``padded=True`` divides by the longest document's rank as the published code does,
    which makes a document's penalty depend on its neighbours (spec T5).
    """
    lengths = loras.rank.lengths
    widest = max(lengths)
    weight = torch.cat(
        [torch.full((n,), 1.0 / (widest if padded else n), dtype=torch.float64) for n in lengths]
    )
    total = next(iter(loras.A.values())).new_zeros(())
    for factors in (loras.A, loras.B):
        for t in factors.values():
            per_row = t.abs().mean(dim=(0, 2))
            total = total + (per_row * weight.to(t)).sum()
    return total / len(loras.A)


def shift(labels: Int[Tensor, "row seq"]) -> tuple[Tensor, Tensor]:
    """Return flat indices of the predicting positions and the labels they predict.

    Raises ValueError when a query's first token is labelled: nothing predicts it.
    """
    if (labels[:, 0] != -100).any():
        raise ValueError("the first token of a row is labelled, but nothing predicts it")
    rows, cols = (labels != -100).nonzero(as_tuple=True)
    return rows * labels.shape[1] + cols - 1, labels[rows, cols]
