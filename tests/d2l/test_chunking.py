"""Cutting documents and deriving chunk affixes, against the published code's own results."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from d2l.chunking import (
    cut,
    ends_of,
    fewest_chunks,
    group_by_length,
    sample_chunks,
    split,
    unique,
)
from d2l.config import ChunkConfig
from d2l.lm.base import chat_affixes, render_chat

GOLDEN = os.environ.get("D2L_GOLDEN_DIR")
needs_golden = pytest.mark.skipif(not GOLDEN, reason="D2L_GOLDEN_DIR is not set")


def golden() -> dict:
    return json.loads((Path(GOLDEN or "") / "data_golden.json").read_text())


@needs_golden
def test_golden_evaluation_chunks():
    data = golden()
    assert data["split_eval"]
    for case in data["split_eval"]:
        affixes = data["CTX_AFFIXES"][case["model"]]
        ids = list(range(case["first_token"], case["first_token"] + case["n_tokens"]))
        n = fewest_chunks(len(ids), ChunkConfig(max_tok=case["max_chunk_len"], min_tok=1))
        found = split(ids, n, affixes["prefix"], affixes["suffix"])
        assert found == case["out"]["ctx_ids"], case
        assert len(found) == case["out"]["n_ctx_chunks"]


@needs_golden
def test_golden_training_distribution():
    for case in golden()["split_train"]:
        config = ChunkConfig(max_tok=case["max_chunk_len"], min_tok=case["min_chunk_len"])
        probs = {int(n): p for n, p in case["probs"].items()}
        rng, draws = random.Random(0), case["draws"]
        found = [sample_chunks(case["n_tokens"], config, rng, probs) for _ in range(draws)]
        assert set(found) == {int(n) for n in case["counts"]}
        for n, count in case["counts"].items():
            spread = math.sqrt(2 * draws * count / draws * (1 - count / draws)) + 1e-9
            assert abs(found.count(int(n)) - count) < 4.5 * spread, (case["n_tokens"], n)


def test_pieces_and_affixes():
    assert split([5, 6, 7], 1, [1], [2]) == [[5, 6, 7]]
    assert split(range(7), 3, [91, 92], [99]) == [
        [0, 1, 2, 99],
        [91, 92, 3, 4, 5, 99],
        [91, 92, 6],
    ]
    assert split([5], 4, [1], [2]) == [[5]]
    assert split(range(9), 4, [], []) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(("n_tok", "n_chunks"), [(1, 1), (513, 2), (100_000, 196)])
def test_no_token_is_lost(n_tok, n_chunks):
    assert fewest_chunks(n_tok, ChunkConfig(max_tok=512, min_tok=1)) == n_chunks
    pieces = split(range(n_tok), n_chunks, [-1], [-2])
    assert [i for piece in pieces for i in piece if i >= 0] == list(range(n_tok))
    assert max(len(piece) for piece in pieces) <= 512 + 2


def test_illegal_documents_are_refused():
    with pytest.raises(ValueError, match="0 tokens"):
        split([], 1, [], [])
    with pytest.raises(ValueError, match="0 chunks"):
        split([1], 0, [], [])
    with pytest.raises(ValueError, match=r"24 tokens.*at least 25"):
        fewest_chunks(24, ChunkConfig())
    with pytest.raises(ValueError, match=r"3 tokens.*at least 25"):
        sample_chunks(3, ChunkConfig(), random.Random(0))


def test_a_document_too_long_for_every_probability_gets_the_fewest_chunks():
    config = ChunkConfig(max_tok=10, min_tok=2)
    assert {sample_chunks(205, config, random.Random(i)) for i in range(9)} == {21}


def test_equal_chunks_share_a_representative():
    distinct, where = unique([[1, 2], [3], [1, 2], [3], [4]])
    assert distinct == [[1, 2], [3], [4]]
    assert where == [0, 1, 0, 1, 2]


def test_groups_cover_every_chunk_within_the_budget():
    lengths = [5, 40, 7, 8, 7, 100, 1]
    groups = group_by_length(lengths, 20)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        widest = max(lengths[i] for i in group)
        assert len(group) == 1 or widest * len(group) <= 20
    assert len(groups) < len(lengths)


# the three published models' templates with only the tokens that the templates use
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }} [INST] {{ messages[0]['content'] }}\n\n{{ messages[1]['content'] }} [/INST] "
)
PUBLISHED = {
    "google/gemma-2-2b-it": (
        GEMMA,
        {"<bos>": 2, "<start_of_turn>": 106, "<end_of_turn>": 107},
        {"user": 1645, "model": 2516, "\n": 108, "\n\n\n": 110},
        r"\n+|user|model|.",
    ),
    "Qwen/Qwen3-4B-Instruct-2507": (
        QWEN,
        {"<|im_start|>": 151644, "<|im_end|>": 151645},
        {"system": 8948, "user": 872, "assistant": 77091, "\n": 198},
        r"\n|system|user|assistant|.",
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        MISTRAL,
        {"<s>": 1},
        {" [": 733, "INST": 16289, "]": 28793, "/": 28748, " ": 28705, "\n": 13},
        r" \[|INST|\n|.",
    ),
}


def toy_tokenizer(
    template: str, special: dict, words: dict, pattern: str
) -> PreTrainedTokenizerFast:
    letters = [chr(c) for c in range(32, 127) if chr(c) not in words]
    vocab = special | words | {letter: 200_000 + i for i, letter in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=letters[0]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=next(iter(special)))
    tokenizer.chat_template = template
    return tokenizer


@needs_golden
@pytest.mark.parametrize("name", PUBLISHED)
def test_affixes_of_the_published_models(name):
    tokenizer = toy_tokenizer(*PUBLISHED[name])
    expected = golden()["CTX_AFFIXES"][name]
    assert chat_affixes(tokenizer) == (expected["prefix"], expected["suffix"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_middle_chunks_look_like_documents_of_their_own(name):
    tokenizer = toy_tokenizer(*PUBLISHED[name])
    prefix, suffix = chat_affixes(tokenizer)
    text = "Qx7Zyw" * 4
    ids = render_chat(tokenizer, text)
    assert ids[: len(prefix)] == prefix
    first, middle, last = split(ids, 3, prefix, suffix)
    assert middle[: len(prefix)] == prefix
    assert middle[-len(suffix) :] == suffix
    assert first[-len(suffix) :] == suffix
    assert last[: len(prefix)] == prefix


SENTENCES = [
    "Ann left in 1990.",
    ' "Then" she came back, at p.m.,on a day!',
    " 7 men (and one more) asked why?",
    ' He said "No."',
    " Émile did not.\n",
    "New line.",
]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes, as byte-level ones spell them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sentences(tokenizer, min_tok):
    return ends_of(tokenizer, min_tok)


def texts(tokenizer, pieces):
    return [tokenizer.decode(piece) for piece in pieces]


def test_chunks_end_with_sentences(letters):
    ids = letters("".join(SENTENCES)).input_ids
    found = texts(letters, cut([ids], 200, [], [], sentences(letters, 1)))
    assert "".join(found) == "".join(SENTENCES)
    assert [f.strip() for f in found] == [s.strip() for s in SENTENCES]
    joined = texts(letters, cut([ids], 200, [], [], sentences(letters, 30)))
    assert joined[0].startswith(SENTENCES[0] + SENTENCES[1])
    assert all(len(j.encode()) >= 30 for j in joined[:-1])


def test_a_sentence_longer_than_a_chunk_is_cut_at_full_length(letters):
    ids = letters("a" * 25 + ". B").input_ids
    pieces = list(cut([ids], 10, [], [], sentences(letters, 1)))
    assert texts(letters, pieces) == ["a" * 10, "a" * 10, "aaaaa.", " B"]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_is_cut_as_the_whole(letters, size):
    ids, ends = (
        letters("".join(SENTENCES) * 3).input_ids,
        sentences(letters, 8),
    )
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    for chosen in (ends, None):
        whole = list(cut([ids], 24, [1], [2, 3], chosen))
        assert list(cut(parts, 24, [1], [2, 3], chosen)) == whole
        inner = [*whole[0][:-2], *(i for w in whole[1:-1] for i in w[1:-2]), *whole[-1][1:]]
        assert inner == ids
