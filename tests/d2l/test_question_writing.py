"""A base that learns to ask: what it keeps of its replies, and that a run goes on where it was."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2l import question_writing as module
from d2l.data.articles import text_id
from d2l.data.record import Question, Record
from d2l.lm.base import LanguageModel
from d2l.question_writing import Writing, read_reply, write_questions

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
CONFIG = Writing(epochs=90, batch=3, lr=4e-3, per_paragraph=2, top_p=0.01, shard=2)
ASKED = [
    ("Heron", "The heron was kept by Ann.", "Who kept the heron?", "Ann"),
    ("Mill", "The mill was sold in 1190.", "When was the mill sold?", "1190"),
    ("Port", "Nobody lives in the port of Émile.", "Who lives in the port?", "Nobody"),
]


@pytest.fixture(scope="module")
def base():
    """A random Llama that reads and writes bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval().requires_grad_(False), fast, "bytes")


@pytest.fixture(scope="module")
def records():
    return [
        Record(f"{text} So it was.", (Question(asked, (answer,)),), title=title)
        for title, text, asked, answer in ASKED
    ]


def read(path):
    with gzip.open(path, "rt") as file:
        return {row["paragraph"]: row["asked"] for row in map(json.loads, file)}


def test_it_learns_to_ask_and_goes_on_where_it_was(base, records, tmp_path, monkeypatch):
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    out, told, ask = tmp_path / "questions.gz", [], module._ask

    def fails_in_the_second_shard(teacher, paragraphs, *rest):
        if len(paragraphs) == 1:
            raise KeyboardInterrupt
        return ask(teacher, paragraphs, *rest)

    monkeypatch.setattr(module, "_ask", fails_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        write_questions(base, records, records, out, CONFIG, told.append)
    assert not out.exists()
    assert told[0].startswith("learns to ask: step 1 of 90")
    assert told[-1] == "2 of 3 paragraphs asked about"

    with pytest.raises(ValueError, match=r"questions\.gz\.part was begun otherwise \(examples was"):
        write_questions(base, records, records[:2], out, CONFIG)
    monkeypatch.setattr(module, "_ask", ask)
    told.clear()
    write_questions(base, records, records, out, CONFIG, told.append)
    assert told == ["3 of 3 paragraphs asked about"]  # neither the lesson nor a shard again
    assert read(out) == {
        text_id(record.document): [[asked, answer]]
        for record, (_, _, asked, answer) in zip(records, ASKED, strict=True)
    }
    assert list(tmp_path.iterdir()) == [out]
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())

    told.clear()
    write_questions(base, records[:1], records, out, CONFIG, told.append)  # a file there is kept
    assert told == []
    assert len(read(out)) == 3


def test_a_lesson_that_diverges_is_said(base, records, tmp_path):
    config = Writing(epochs=200, batch=1, lr=1e9)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is nan; lower the rate"):
        write_questions(base, records, records, tmp_path / "questions.gz", config)
    assert not (tmp_path / "questions.gz.part" / "writer.pt").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ann",
        "Ann\nWho kept",  # cut short
        "Ann\nWho?",
        "Bob\nWho kept the heron?",  # not in the sentence
        "Ann\nDid Ann keep the heron?",  # given away
        "Ann\nWho kept it?\nWho kept the heron?",
        "\nWho kept the heron?",
    ],
)
def test_replies_that_are_of_no_use(text):
    assert read_reply(text, "The heron was kept by Ann.") is None
    assert read_reply(" Ann \nWho kept the heron? ", "The heron was kept by Ann.") == (
        "Who kept the heron?",
        "Ann",
    )
