"""Public sets: every layout gives the same records, and what is wrong with a file is said."""

import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from d2l.data.public import SETS, choose_questions, load, split_titles
from d2l.data.record import Question, Record

REAL = os.environ.get("D2L_DATA_DIR")
needs_data = pytest.mark.skipif(not REAL, reason="D2L_DATA_DIR is not set")

SQUAD_ROWS = [
    {"title": "Ada", "context": "Ada wrote.", "question": "Who?", "answers": {"text": ["Ada"]}},
    {"title": "Ada", "context": "Ada wrote.", "question": "What?", "answers": {"text": ["a", "b"]}},
]
SQUAD_RELEASE = {
    "data": [
        {
            "title": "Ada",
            "paragraphs": [
                {
                    "context": "Ada wrote.",
                    "qas": [
                        {"question": "Who?", "answers": [{"text": "Ada"}]},
                        {"question": "What?", "answers": [{"text": "a"}, {"text": "b"}]},
                    ],
                }
            ],
        }
    ]
}
SQUAD = [
    Record(
        "Ada wrote.",
        (Question("Who?", ("Ada",), "squad"), Question("What?", ("a", "b"), "squad")),
        source="squad-validation",
        title="Ada",
    )
]
DROP_FILE = {
    "p1": {
        "passage": "It was 3 on May 5.",
        "qa_pairs": [
            {"question": "How many?", "answer": {"number": "3", "date": {}, "spans": []}},
            {
                "question": "When?",
                "answer": {"number": "", "date": {"day": "5", "month": "May"}, "spans": []},
                "validated_answers": [{"number": "", "date": {}, "spans": ["May 5", "May"]}],
            },
        ],
    }
}


def write(folder: Path, name: str, data) -> None:
    text = "\n".join(map(json.dumps, data)) if name.endswith("jsonl") else json.dumps(data)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def hub(monkeypatch):
    """Install a stand-in for the package datasets; return what it is asked and gives."""
    rows, asked = [], []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("D2L_DATA_DIR", raising=False)
    return SimpleNamespace(rows=rows, asked=asked)


def test_release_and_hub_give_the_same_records(hub, tmp_path):
    hub.rows += SQUAD_ROWS
    assert load("squad", "validation") == SQUAD
    assert hub.asked == [("rajpurkar/squad", "validation")]
    write(tmp_path, "dev-v1.1.json", SQUAD_RELEASE)
    assert load("squad", "validation", data_dir=tmp_path) == SQUAD
    assert len(hub.asked) == 1
    assert load("squad", "validation", data_dir=tmp_path, source="hub") == SQUAD
    assert len(hub.asked) == 2


def test_drop_answers_are_numbers_dates_and_spans(hub, tmp_path):
    write(tmp_path, "drop_dataset_dev.json", DROP_FILE)
    (record,) = load("drop", "validation", data_dir=tmp_path)
    assert [q.answers for q in record.questions] == [("3",), ("5 May", "May 5", "May")]
    hub.rows.append(
        {
            "section_id": "p1",
            "passage": "It was 3.",
            "question": "How many?",
            "answers_spans": {"spans": ["3"], "types": ["number"]},
        }
    )
    (record,) = load("drop", "validation")
    assert record.questions == (Question("How many?", ("3",), "drop"),)


def test_ropes_joins_background_and_situation(hub, tmp_path):
    row = {"background": "Growth is fast. ", "situation": " Jim grew."}
    asked = {"question": "Who?", "answers": [{"text": "Jim"}]}
    write(tmp_path, "ropes-dev-v1.0.json", {"data": [{"paragraphs": [{**row, "qas": [asked]}]}]})
    hub.rows.append({**row, "question": "Who?", "answers": {"text": ["Jim"]}})
    from_file, from_hub = (
        load("ropes", "validation", data_dir=tmp_path),
        load("ropes", "validation"),
    )
    assert from_file == from_hub
    assert from_file[0].document == "Growth is fast.\nJim grew."


def test_longbench_is_read_from_its_archive(monkeypatch, tmp_path):
    row = {"context": "Long.", "input": "Who?", "answers": ["Ada", "A."], "dataset": "2wikimqa"}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/2wikimqa_e.jsonl", json.dumps(row) + "\n")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: tmp_path / name
    )
    (from_hub,) = load("2wikimqa_e", "test", source="hub")
    write(tmp_path, "2wikimqa_e.jsonl", [row])
    assert load("2wikimqa_e", "test", data_dir=tmp_path) == [from_hub]
    assert from_hub.questions[0].answers == ("Ada", "A.")
    with pytest.raises(ValueError, match="no qasper_e"):
        load("qasper_e", "test", source="hub")


def test_pwc(hub):
    hub.rows.append({"input": "Text.", "prompt": "Sum it up.", "answer": "A text."})
    (record,) = load("pwc", "test")
    assert record.questions == (Question("Sum it up.", ("A text.",), "pwc"),)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("D2L_DATA_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="unknown set 'squat', known: squad"):
        load("squat", "train")
    with pytest.raises(ValueError, match="not 'test'"):
        load("squad", "test")
    with pytest.raises(ValueError, match="source"):
        load("squad", "train", source="web")
    with pytest.raises(FileNotFoundError, match=r"train-v1.1.json"):
        load("squad", "train", source="files", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="not set"):
        load("squad", "train", source="files")
    with pytest.raises(ImportError, match=r"d2l-core\[hub\].*train-v1.1.json"):
        load("squad", "train")


def test_an_unreachable_hub_is_named(hub, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(OSError, match="rajpurkar/squad cannot be fetched"):
        load("squad", "train")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"answers": {"text": []}}, "'Who\\?' has no answer"),
        ({"answers": {"text": [" "]}}, "'Who\\?' has no answer"),
        ({"answers": {"text": ["a b c d e f"]}}, "6 words, more than 5"),
        ({"context": " "}, "no document"),
        ({"question": ""}, "is empty"),
    ],
)
def test_bad_questions_are_refused_or_dropped(hub, change, match):
    hub.rows += [{**SQUAD_ROWS[0], **change}, SQUAD_ROWS[1]]
    with pytest.raises(ValueError, match=match):
        load("squad", "validation", max_answer_words=5)
    with pytest.warns(UserWarning, match="1 questions left out"):
        (record,) = load("squad", "validation", max_answer_words=5, drop_bad=True)
    assert [q.text for q in record.questions] == ["What?"]


def test_a_set_without_questions_is_refused(hub):
    with pytest.raises(ValueError, match="no questions"):
        load("squad", "validation")


def test_files_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "dev-v1.1.json").write_text('{"data": [{"title"')
    with pytest.raises(ValueError, match="not the JSON"):
        load("squad", "validation", data_dir=tmp_path)
    write(tmp_path, "dev-v1.1.json", {"data": [{"title": "Ada"}]})
    with pytest.raises(ValueError, match="laid out as squad"):
        load("squad", "validation", data_dir=tmp_path)


def numbered(n_titles, per_title=3, source="squad-validation"):
    return [
        Record(f"d{t}.{i}", (Question(f"q{t}.{i}", ("a",)),), source=source, title=f"t{t}")
        for t in range(n_titles)
        for i in range(per_title)
    ]


def test_titles_are_held_out_whole_and_last():
    train, test = split_titles(numbered(48))
    assert len({r.title for r in train}) == 38
    assert [r.title for r in test][::3] == [f"t{i}" for i in range(38, 48)]
    assert not {r.document for r in train} & {r.document for r in test}
    with pytest.raises(ValueError, match="10 titles"):
        split_titles(numbered(10))


def test_chosen_questions_depend_on_set_and_seed_alone():
    records = numbered(48)
    chosen = choose_questions(records, 20, seed=1)
    choose_questions(numbered(5, source="other"), 3)
    assert chosen == choose_questions(records, 20, seed=1)
    assert chosen != choose_questions(records, 20, seed=2)
    assert len({q.text for _, q in chosen}) == 20
    assert len(choose_questions(records, 10**6)) == 144


@needs_data
@pytest.mark.parametrize(
    ("name", "n_docs", "n_questions"),
    [("squad", 2067, 10570), ("ropes", None, 974), ("drop", 75, 947)],
)
def test_real_files(name, n_docs, n_questions):
    records = load(name, "validation", source="files", data_dir=REAL, drop_bad=True)
    assert n_docs in (None, len(records))
    assert sum(len(r.questions) for r in records) == n_questions


@needs_data
def test_real_squad_titles():
    train, test = split_titles(load("squad", "validation", source="files", data_dir=REAL))
    assert len({r.title for r in train}) == 38
    assert test[0].title == "Intergovernmental Panel on Climate Change"
    assert test[-1].title == "Force"


def test_every_set_says_its_licence():
    assert all(known.licence for known in SETS.values())
