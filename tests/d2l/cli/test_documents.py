import io
import json
import re
import shutil
import sys
from pathlib import Path

import document_files as files
import naive
import published_files
import pytest

from d2l.cli import chat as chat_
from d2l.cli import common

QUESTION = "What is the special magic number? Reply with only the number."
WORD_QUESTION = "What is the special magic word? Reply with only the word."
PAGE = "The grass is green. The special magic number is {}. The sky is blue.\n"


@pytest.fixture(scope="module")
def tiny():
    from d2l import DocToLoRA

    return DocToLoRA.from_pretrained("fig2/tiny")


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny):
    """A folder with documents to stand in, a cache of its own, and a model that loads at once."""
    (tmp_path / "page.md").write_text(PAGE.format("4821"))
    (tmp_path / "page.pdf").write_bytes(files.pdf(PAGE.format("7305")))
    (tmp_path / "word.txt").write_text("The special magic word is lake. The sun is yellow.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D2L_MODEL", "fig2/tiny")
    monkeypatch.setattr("d2l.model.DocToLoRA.from_pretrained", lambda *_, **__: tiny)
    return tmp_path


def test_ask_reads_once_and_answers(desk, call, monkeypatch):
    assert call("ask", "page.md", QUESTION) == (0, "4821\n")
    kept = list(common.store_dir().glob("*/*.safetensors"))
    assert len(kept) == 1
    monkeypatch.setattr("d2l.model.DocToLoRA.read", lambda *_, **__: pytest.fail("read again"))
    assert call("ask", "page.md", QUESTION) == (0, "4821\n")


def of_both(tiny, question, *names):
    """Answer as the library does; that the answer is right is not the command line's business."""
    one, other = (tiny.internalize(Path(name)) for name in names)
    return tiny.ask(question, one + other)


def test_ask_of_several_documents_of_any_format(desk, call, tiny):
    code, said = call("ask", "page.pdf", "word.txt", WORD_QUESTION, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["answer"] == of_both(tiny, WORD_QUESTION, "page.pdf", "word.txt")
    assert [d["title"] for d in found["documents"]] == ["page.pdf", "word.txt"]
    assert call("ask", "page.pdf", QUESTION) == (0, "7305\n")


def test_ask_by_sentence_reads_sentences_apart(desk, call, tiny):
    colours = ("green", "blue", "red", "white", "old")
    named = "The {} village slept and the sun is yellow and so on."
    (desk / "two.txt").write_text("\n".join(map(named.format, colours)))
    asked = "Where is the red village?"
    code, said = call("ask", "two.txt", asked, "--by-sentence", "--json")
    assert code == 0
    assert [d["title"] for d in json.loads(said)["documents"]] == [named.format("red")]
    assert json.loads(said)["answer"] == tiny.ask(asked, tiny.internalize(named.format("red")))
    assert call("ask", "page.md", QUESTION, "--by-sentence")[0] == 0


def test_ask_without_a_document_asks_the_base(desk, call, tiny):
    assert call("ask", QUESTION) == (0, tiny.ask(QUESTION) + "\n")
    assert call("ask", "page.md", QUESTION, "--strength", "0") == (0, tiny.ask(QUESTION) + "\n")


def test_ask_compares_three_ways(desk, call, tiny):
    code, said = call("ask", "page.md", QUESTION, "--compare", "--json")
    assert code == 0
    answers = {a["name"]: a for a in json.loads(said)}
    assert {name: a["text"] for name, a in answers.items()} == {
        "D2L": "4821",
        "base": tiny.ask(QUESTION),
        "in context": "4821",
    }
    for a in answers.values():
        assert 0 < a["first_token_s"] <= a["total_s"]
        assert a["mib"] > 0
    code, said = call("ask", "page.md", QUESTION, "--compare")
    assert re.search(r"│ in context │ 4821 +│ \d\.\d\d s +│ \d\.\d MiB", said)


def test_ask_reads_standard_input(desk, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PAGE.format("1234")))
    assert call("ask", "-", QUESTION) == (0, "1234\n")


def test_internalize_export_and_info_agree(desk, call, tiny):
    code, said = call("internalize", "page.md", "word.txt", "--out", "both.safetensors", "--json")
    assert code == 0
    made = json.loads(said)
    assert made["file"] == "both.safetensors"
    assert [d["chunks"] for d in made["documents"]] == [1, 1]
    code, said = call("info", "both.safetensors", "--json")
    described = json.loads(said)
    assert described == {k: made[k] for k in described}
    expected = of_both(tiny, QUESTION, "page.md", "word.txt")
    assert call("ask", "both.safetensors", QUESTION) == (0, f"{expected}\n")

    code, said = call("export", "both.safetensors", "peft")
    assert (code, said) == (0, "peft: rank 32, nothing lost\n")
    assert call("ask", "peft", QUESTION) == (0, f"{expected}\n")
    code, said = call("export", "both.safetensors", "small", "--rank", "2", "--json")
    assert json.loads(said)["rank"] == 2
    assert 0 < json.loads(said)["error"] < 1

    code, said = call("info")
    assert code == 0
    assert re.findall(r"│ (\S+) +│ +\d+ +│ 1 ", said) == ["word.txt", "page.md"] or (
        re.findall(r"│ (\S+) +│ +\d+ +│ 1 ", said) == ["page.md", "word.txt"]
    )
    code, said = call("internalize", "page.md")
    assert 'Ask it: d2l ask page.md "..."' in said
    assert re.search(r"document +page\.md: \d+ tokens in 1 chunks", said)


def test_info_of_a_checkpoint_and_of_nothing(desk, call):
    code, said = call("info", "fig2/tiny", "--json")
    about = json.loads(said)
    assert (about["base"], about["rank_per_chunk"], about["chunk_tokens"]) == ("tiny", 8, 256)
    code, said = call("info")
    assert (code, said.replace("\n", "")[:14]) == (0, "No adapters in")


def test_progress_counts_chunks(desk, tiny, capfd):
    long = tiny.read("The grass is green. " * 200, chunks_at_once=1)
    assert list(common.progress(long))[-1] == sum(long.adapter.sources[0].chunk_tok)
    assert long.n_chunks == long.total_chunks > 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("ask", "none.txt", "x"), 1, "error: there is no file none.txt"),
        (("ask", "page.md"), 2, "a question is wanted last, got 'page.md'"),
        (("ask", "page.md", " "), 2, "a question is wanted last"),
        (("ask", "page.md", "word.txt", "x", "--compare"), 2, "--compare takes one document"),
        (("ask", "x y", "--by-sentence"), 2, "--by-sentence takes a document at least"),
        (("ask", "folder", "x", "--by-sentence"), 2, "but folder is an adapter"),
        (("ask", "binary.bin", "x"), 2, "is a binary file"),
        (("ask", "scan.pdf", "x"), 2, "no text, as scans do"),
        (("ask", "latin.txt", "x"), 2, "is not UTF-8 text: byte 3"),
        (("ask", "empty.txt", "x"), 2, "is empty"),
        (("ask", "other.safetensors", "x"), 2, "is no adapter of ours"),
        (("ask", "folder", "x"), 1, "adapter_config.json does not exist"),
        (("internalize",), 2, "Missing argument"),
        (("internalize", "page.md", "--out", "x.bin"), 2, "--out must end in .safetensors"),
        (("internalize", "page.md", "--out", "page.md/x.safetensors"), 1, "cannot write"),
        (("internalize", "page.md", "page.md"), 2, "is in both adapters"),
        (("export", "page.md", "word.txt"), 2, "word.txt is a file; give a folder"),
        (("export", "page.md", "out", "--rank", "0"), 2, "--rank"),
        (("info", "nothing/here"), 1, "cannot fetch 'nothing/here' from the hub"),
        (("info", "nothing"), 2, "'nothing' is no checkpoint: give one of"),
        (("import", "fig2/tiny"), 2, "is in our format already"),
        (("import", "binary.bin"), 2, "cannot be read as a released checkpoint"),
    ],
)
def test_mistakes_are_one_message(desk, call, arguments, code, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (desk / "binary.bin").write_bytes(b"\x00\x01\x02")
    (desk / "scan.pdf").write_bytes(files.pdf(""))
    (desk / "latin.txt").write_bytes(b"caf\xe9")
    (desk / "empty.txt").write_bytes(b"")
    (desk / "other.safetensors").write_bytes(b"junk")
    (desk / "folder").mkdir()
    found, said = call(*arguments)
    assert message in said
    assert found == code
    assert "Traceback" not in said


def test_a_missing_source_is_named_before_a_model_is_loaded(desk, call, monkeypatch):
    monkeypatch.setattr("d2l.model.DocToLoRA.from_pretrained", lambda *_, **__: pytest.fail("load"))
    assert call("ask", "none.txt", "x")[0] == 1


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(desk, call, tiny, monkeypatch):
    monkeypatch.setattr(tiny, "trained_chunks", 1)
    (desk / "long.txt").write_text("The grass is green. " * 200)
    code, said = call("internalize", "long.txt")
    assert code == 0
    assert "warning: the document has more than the 1 chunks" in said
    assert "UserWarning" not in said


def test_import_turns_a_published_checkpoint_into_ours(desk, call, tmp_path):
    config = naive.options()
    (tmp_path / "run").mkdir()
    source = published_files.write(tmp_path / "run/pytorch_model.bin", config, naive.state(config))
    code, said = call("import", source, "--json")
    assert code == 0, said
    folder = tmp_path / "cache/models/run"
    assert json.loads(said)["folder"] == str(folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    code, said = call("info", folder, "--json")
    assert json.loads(said)["base"] == published_files.BASE
    shutil.rmtree(folder)
    code, said = call("import", source.parent, "--out", tmp_path / "mine")
    assert code == 0
    assert f"d2l ask --model {tmp_path}/mine FILE" in said


def talk(call, monkeypatch, *lines, options=()):
    """Type lines into the chat; return what it says."""
    typed = iter(lines)

    def next_line(_prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    code, said = call("chat", "page.md", *options)
    assert code == 0
    return said


def test_chat_adds_forgets_and_answers(desk, call, monkeypatch, tiny):
    base = tiny.ask(QUESTION)
    said = talk(
        call,
        monkeypatch,
        QUESTION,
        "/add word.txt 'no such file'",
        "/add word.txt",
        WORD_QUESTION,
        "/forget page.md",
        "/forget page.md",
        "/forget",
        QUESTION,
        "/forget",
        "",
        "/quit",
        "never reached",
    )
    lines = said.splitlines()
    assert lines[0].startswith("Holding page.md (")
    assert lines[1] == "4821"
    assert lines[2] == "there is no file no such file"
    assert "'word.txt'" in lines[3]
    assert "in both" in lines[3]
    assert lines[4] == "lake"
    assert lines[5].startswith("Holding word.txt")
    assert "no document is 'page.md'" in lines[6]
    assert lines[7] == "No document: the base answers."
    assert lines[8] == base
    assert lines[9] == "there is no document to forget"
    assert len(lines) == 10


def test_chat_by_sentence_asks_the_best_one(desk, call, monkeypatch, tiny):
    sentence = "The red village slept and the sun is yellow and so on."
    (desk / "two.txt").write_text(f"The blue village slept, and so on.\n{sentence}")
    (desk / "folder").mkdir(exist_ok=True)
    asked, read = "Where is the red village?", []
    internalize = tiny.internalize
    monkeypatch.setattr(tiny, "internalize", lambda text: read.append(text) or internalize(text))
    said = talk(
        call,
        monkeypatch,
        "/add two.txt",
        asked,
        "/add two.txt",
        "/add folder",
        "/forget page.md",
        "/forget page.md",
        "/strength 0",
        asked,
        "/forget",
        QUESTION,
        "/forget",
        "/quit",
        options=["--by-sentence"],
    )
    lines = said.splitlines()
    assert lines[0].startswith("Holding page.md (")
    assert lines[1].startswith("Holding page.md, two.txt (")
    assert lines[2] == tiny.ask(asked, internalize(sentence))
    assert read == [sentence, sentence]
    assert lines[3] == lines[1].partition(" /help")[0]
    assert "but folder is an adapter" in lines[4]
    assert lines[5] == "Holding two.txt (2 sentences, of which each question asks one)."
    assert lines[6] == "no document is 'page.md'; held: two.txt"
    assert lines[7:9] == ["Strength 0.", tiny.ask(asked)]
    assert lines[9:11] == ["No document: the base answers.", tiny.ask(QUESTION)]
    assert lines[11] == "there is no document to forget"
    assert len(lines) == 12


@pytest.mark.parametrize("options", [(), ("--by-sentence",)])
def test_chat_holds_files_of_one_name(desk, call, monkeypatch, options):
    for folder in ("one", "two"):
        (desk / folder).mkdir(exist_ok=True)
        (desk / folder / "same.txt").write_text(f"The {folder} village slept, and so on.")
    said = talk(call, monkeypatch, "/add one/same.txt two/same.txt", "/quit", options=options)
    assert said.splitlines()[1].count("same.txt") == 2


def test_chat_changes_the_strength(desk, call, monkeypatch, tiny):
    said = talk(call, monkeypatch, "/strength 0", QUESTION, "/strength 1", QUESTION, "/strength")
    assert said.splitlines()[1:6] == [
        "Strength 0.", tiny.ask(QUESTION), "Strength 1.", "4821", "Strength 1.",
    ]  # fmt: skip


def test_chat_survives_mistakes(desk, call, monkeypatch):
    said = talk(call, monkeypatch, "/strength much", "/strength nan", "/dance", "/add '", "/help")
    lines = said.splitlines()
    assert "could not convert string to float: 'much'" in lines[1]
    assert "nan" in lines[2]
    assert "'/dance' is no command" in lines[3]
    assert "No closing quotation" in lines[4]
    for command in ("/add", "/forget", "/strength", "/help", "/quit"):
        assert f"{command} " in said or f"{command}\n" in said


def test_an_interrupted_answer_leaves_the_chat_open(desk, call, monkeypatch, tiny):
    def interrupted(*_):
        yield "48"
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "stream", interrupted)
    said = talk(call, monkeypatch, QUESTION, "/strength")
    assert said.split("\n")[1:3] == ["48(stopped)", "Strength 1."]
    assert chat_.HELP
