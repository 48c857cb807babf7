"""Corpora of the running Python: what is in, what is out, how they are split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from twofold.base.records import InputError
from twofold.base.split import held_out
from twofold.data.corpus import (
    Document,
    docstring_documents,
    pydoc_topic_documents,
    python_stdlib_documents,
    split_documents,
)


def test_standard_library() -> None:
    documents = python_stdlib_documents()
    ids = [document.id for document in documents]
    assert ids == sorted(set(ids)) and "stdlib/argparse.py" in ids
    assert documents == python_stdlib_documents()
    for part in ("site-packages", "/test/", "/tests/", "idlelib", "pydoc_data", "_sysconfigdata", "encodings/cp1252"):
        assert not [name for name in ids if part in name]
    assert sum(len(document.text) for document in documents) > 4_000_000
    assert {(d.licence, d.source[:8]) for d in documents} == {("PSF-2.0", "cpython-")}


def test_a_given_folder(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "b.py").write_text("x = 1\r\n" * 50, newline="")
    (tmp_path / "a.py").write_text("y = 2\n" * 50)
    (tmp_path / "tests" / "c.py").write_text("z = 3\n" * 50)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 100)
    (tmp_path / "short.py").write_text("pass\n")
    documents = python_stdlib_documents(tmp_path)
    assert [d.id for d in documents] == ["stdlib/a.py", "stdlib/b.py"]
    assert "\r" not in documents[1].text
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no Python sources"):
        python_stdlib_documents(empty)


def test_docstrings_follow_their_file_into_the_split() -> None:
    source = 'def f():\n    """' + "Say what f does. " * 20 + '"""\n\ndef _g():\n    """hidden"""\n'
    source += 'class A:\n    """About A."""\n    def m(self):\n        """About m."""\n'
    files = [Document(f"stdlib/{i}.py", source, "s", "l") for i in range(100)] + [Document("bad", "def (", "s", "l")]
    docs = docstring_documents(files)
    assert len(docs) == 100 and "f\nSay what f does." in docs[0].text
    assert "A.m\nAbout m." in docs[0].text and "hidden" not in docs[0].text
    train, test = split_documents([*files, *docs])
    stems = [{d.id.split("#")[0] for d in part} for part in (train, test)]
    assert stems[0].isdisjoint(stems[1]) and test and len(train) > 5 * len(test)


def test_another_salt_holds_out_other_documents() -> None:
    documents = [Document(f"stdlib/{i}.py{part}", "", "s", "l") for i in range(1000) for part in ("", "#docs")]
    held = {}
    for salt in ("", "0", "1"):
        train, test = split_documents(documents, salt)
        stems = [{d.id.split("#")[0] for d in part} for part in (train, test)]
        assert stems[0].isdisjoint(stems[1]) and len(train) + len(test) == 2000 and 60 < len(stems[1]) < 145
        held[salt] = stems[1]
    assert held[""] == {d.id.split("#")[0] for d in split_documents(documents)[1]}
    for one, other in (("", "0"), ("0", "1")):
        assert len(held[one] & held[other]) < 0.3 * len(held[one])


def test_pydoc_topics() -> None:
    topics = pydoc_topic_documents()
    assert len(topics) > 50 and all(document.id.startswith("pydoc/") for document in topics)


def test_documents_and_items_are_split_by_one_rule() -> None:
    keys = [f"key {i}" for i in range(2000)]
    assert [held_out(key) for key in keys] == [hashlib.md5(key.encode()).digest()[0] < 26 for key in keys]
