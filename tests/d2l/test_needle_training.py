"""The training stream is a pure function of seed and step, and holds what it says."""

from __future__ import annotations

import random

import pytest

from d2l.config import ChunkConfig
from d2l.data.example import Batch, Example, Query
from d2l.data.needle_training import NeedleStream, NeedleTraining
from d2l.lm.base import chat_affixes
from d2l.lm.tiny import build_tokenizer

TOKENIZER = build_tokenizer()
CHUNK = ChunkConfig(max_tok=128, min_tok=25)
STREAM = NeedleStream(
    max_tok=128, compose_share=0.5, max_chunks=40, prose_share=0.5, word_share=0.5
)


def stream(seed: int = 0, **changes: object) -> NeedleTraining:
    import dataclasses

    return NeedleTraining(TOKENIZER, dataclasses.replace(STREAM, **changes), CHUNK, seed)


def test_batch_depends_on_seed_and_step_alone() -> None:
    assert stream().batch(70, 8) == stream().batch(70, 8)
    assert stream().batch(70, 8) != stream().batch(71, 8)
    assert stream(1).batch(70, 8) != stream().batch(70, 8)


def test_first_n_documents_do_not_depend_on_the_batch_size() -> None:
    assert stream().batch(70, 8)[:3] == stream().batch(70, 3)


def test_curriculum_starts_with_the_bare_needle() -> None:
    examples = stream().batch(0, 16, level=0.0)
    frame = sum(map(len, chat_affixes(TOKENIZER)))
    assert all(len(e.chunks) == 1 and len(e.chunks[0]) < frame + 16 for e in examples)


def test_grown_documents_are_cut_and_composed_within_bounds() -> None:
    examples = [e for step in range(60, 80) for e in stream().batch(step, 8)]
    frame = sum(map(len, chat_affixes(TOKENIZER)))
    assert max(len(c) for e in examples for c in e.chunks) <= CHUNK.max_tok + frame
    composed = [e for e in examples if e.weights]
    assert 0.35 < len(composed) / len(examples) < 0.65
    totals = [sum(e.weights or ()) for e in composed]
    assert max(totals) <= STREAM.max_chunks + 5
    assert max(totals) > STREAM.max_chunks / 2
    assert any(len(e.chunks) > 1 for e in examples if not e.weights)


def test_answer_stands_in_the_document_and_filler_chunks_hold_no_needle() -> None:
    for e in stream(cut_share=0.0).batch(90, 32):
        answer = TOKENIZER.decode(list(e.queries[0].answer[:-1])).strip()
        assert answer in TOKENIZER.decode(list(e.chunks[0]))
        for filler in e.chunks[1:]:
            assert "special" not in TOKENIZER.decode(list(filler))


def test_distinct_chunks_are_listed_once_and_expand_back() -> None:
    a, b, c = (1, 2), (3,), (4, 5)
    query = Query((1,), (2,))
    batch = Batch.of([Example((a, b), (query,)), Example((b, c), (query, query), (1.0, 7.0))])
    assert batch.distinct == [[1, 2], [3], [4, 5]]
    assert [batch.distinct[i] for i in batch.chunk_of] == [[1, 2], [3], [3], [4, 5]]
    assert batch.weights == [1.0, 1.0, 1.0, 7.0]
    assert (batch.n_chunks, batch.queries_per_doc) == ([2, 2], [1, 2])


@pytest.mark.parametrize(("prompt", "answer"), [((), (1,)), ((1,), ())])
def test_query_without_tokens_is_refused(prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Query(prompt, answer)


def test_bare_needle_is_the_line_alone() -> None:
    from d2l.data.needle import NeedleGenerator

    sample = NeedleGenerator(TOKENIZER).bare(random.Random(3))
    assert sample.document == f"The special magic number is {sample.answer}."
    assert sample.document_ids == TOKENIZER(sample.document, add_special_tokens=False).input_ids
