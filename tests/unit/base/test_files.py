from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.files import (
    atomic_path,
    named_path,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_replacing_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "one")
    write_text(path, "zwei: ü")
    assert path.read_text(encoding="utf-8") == "zwei: ü"
    assert len(list(tmp_path.iterdir())) == 1


@given(rows=st.lists(JSON, max_size=5))
@settings(deadline=None, max_examples=30)
def test_json_and_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[object]) -> None:
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "a.json", rows)
    assert read_json(folder / "a.json") == rows
    write_jsonl(folder / "a.jsonl", rows)
    assert read_jsonl(folder / "a.jsonl") == rows


def test_json_lines_keep_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x1cd"}, {"text": "second"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_text_that_is_no_utf8_is_written_and_json_of_it_comes_back(tmp_path: Path) -> None:
    """A path in a locale that cannot read its bytes, and half of a pair of surrogates from somebody's JSON."""
    name = "modèle 客".encode().decode("ascii", "surrogateescape")
    row = {"path": name, "half": "\ud83d", "whole": "é 客 😀"}
    write_json(tmp_path / "a.json", row)
    write_jsonl(tmp_path / "a.jsonl", [row, {}])
    assert read_json(tmp_path / "a.json") == row and read_jsonl(tmp_path / "a.jsonl") == [row, {}]
    assert "é 客 😀" in (tmp_path / "a.json").read_text(encoding="utf-8")
    write_text(tmp_path / "a.md", f"{name} \ud83d \udcff é")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "modèle 客 \ufffd \ufffd é"


def test_a_typed_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert named_path("~/data.jsonl") == tmp_path / "home" / "data.jsonl"
    assert named_path("~nobody-of-that-name.jsonl") == tmp_path / "~nobody-of-that-name.jsonl"
    (tmp_path / "~root").touch()
    assert named_path("~root") == tmp_path / "~root"  # what lies there comes first
    assert named_path("2024") == tmp_path / "2024"
