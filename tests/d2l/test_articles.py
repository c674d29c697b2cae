"""Articles out of a wheel: what is prose in them, what is refused, and the real wheel."""

import bz2
import zipfile

import pytest

from d2l.data import articles as module
from d2l.data.articles import articles, paragraphs
from d2l.data.fact_training import titles_for
from d2l.lm import wheels

SENTENCE = "The '''heron''' of [[Port Ellery|the port]] was kept by [[Marta Quill]] until 1874."
PROSE = " ".join([SENTENCE] * 4)
PLAIN = " ".join(["The heron of the port was kept by Marta Quill until 1874."] * 4)
PAGE = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>{}</title><revision><text>{}</text></revision></page>
<page><title>Gone</title><revision><text>#REDIRECT [[Heron]]</text></revision></page>
</mediawiki>"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D2L_WHEEL_DIR", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    articles.cache_clear()
    yield tmp_path
    articles.cache_clear()


def write_wheel(home, monkeypatch, text):
    """Write a wheel with one article and make it the expected one."""
    dump = home / "dump.bz2"
    dump.write_bytes(bz2.compress(PAGE.format("Heron", text).encode()))
    with zipfile.ZipFile(home / "wheels" / module.WHEELS.replace("*", "any"), "w") as archive:
        archive.write(dump, f"gensim/test/test_data/{module._DUMP}")
    monkeypatch.setattr(module, "_SHA256", wheels.sha256_of(dump))


def test_only_prose_is_kept():
    hidden = "<ref name=a/> <ref>a book, 1901</ref> <!-- nobody --> {{Infobox|born=1700}}"
    picture = f"[[File:heron.jpg|thumb|{PROSE}]]"
    table = "{| class=x\n| " + PROSE + "\n|}"
    listed = "* Short.\n* A [[list]] of " + "words " * 60
    page = "\n\n".join([picture + PROSE + hidden, table, listed, "== Notes ==", PROSE])
    assert paragraphs(page) == [PLAIN]
    assert paragraphs(" ".join([SENTENCE] * 40)) == []  # longer than a chunk
    assert paragraphs("") == []


def test_an_article_comes_with_questions_in_its_own_words(home, monkeypatch):
    write_wheel(home, monkeypatch, f"{PROSE}\n\nÉmile and Ng\u1ecdc met. {PROSE}")
    found = articles()
    assert [r.document for r in found] == [PLAIN, f"Émile and Ng\u1ecdc met. {PLAIN}"]
    assert {(r.title, r.source) for r in found} == {("Heron", "wikipedia")}
    for record in found:
        assert record.questions
        assert all(q.answers[0] in record.document for q in record.questions)
    articles.cache_clear()
    (home / "wheels" / module.WHEELS.replace("*", "any")).unlink()
    assert articles() == found  # from the cache, and the same questions


def test_a_changed_wheel_and_a_missing_one_are_named(home, monkeypatch):
    monkeypatch.setattr(wheels.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"gensim==4\.4\.0.*D2L_WHEEL_DIR"):
        articles()
    assert list((home / "cache").iterdir()) == []
    write_wheel(home, monkeypatch, PROSE)
    monkeypatch.undo()
    monkeypatch.setenv("D2L_CACHE", str(home / "cache"))
    monkeypatch.setenv("D2L_WHEEL_DIR", str(home / "wheels"))
    with pytest.raises(ValueError, match=r"damaged .*delete .*gensim.*expected one"):
        articles()
    (home / "wheels" / module.WHEELS.replace("*", "any")).write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"gensim.* is damaged .*delete it"):
        articles()
    assert list((home / "cache").iterdir()) == []
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"d2l-core\[articles\]"):
        articles()


@pytest.mark.slow
def test_the_real_articles():
    articles.cache_clear()
    try:
        parts = {part: titles_for("wikipedia", part) for part in ("train", "watch", "test")}
    except OSError as error:
        pytest.skip(str(error))
    assert [len(p) for p in parts.values()] == [3191, 337, 509]
    titles = [{r.title for r in p} for p in parts.values()]
    assert [len(t) for t in titles] == [81, 5, 10]
    assert not titles[0] & (titles[1] | titles[2])
    markup = ("[[", "]]", "{{", "}}", "<ref", "thumb|", "==")
    for record in parts["train"]:
        assert not any(mark in record.document for mark in markup), record.document
