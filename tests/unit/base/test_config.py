from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from twofold.base.config import Config, ConfigError, digest


class Inner(Config):
    tokens: int = 1000
    rate: float = 0.1
    name: str = "adam"


class Outer(Config):
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    table: dict[str, int] = Field(default={"a": 1})
    limit: int | None = None


def test_override_sets_dotted_leaves_and_leaves_the_original_alone() -> None:
    base = Outer()
    changed = base.override(["inner.tokens=2e6", "inner.rate=1e-3", "sizes=[3,4]", "table.a=5", "limit=7"])
    assert changed.inner == Inner(tokens=2_000_000, rate=1e-3)
    assert changed.sizes == (3, 4) and changed.table == {"a": 5} and changed.limit == 7
    assert base == Outer()
    assert changed.override(["limit=null"]).limit is None
    assert base.override(["inner.name=a=b"]).inner.name == "a=b"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inner.token=1", "did you mean 'tokens'"),
        ("zzz=1", "known: inner, limit, sizes, table"),
        ("inner=3", "is a group"),
        ("inner.tokens", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("inner.tokens=many", "inner.tokens"),
        ("inner.tokens.x=1", "inner.tokens has no 'x'"),
        ("inner.tokens=1.5", "inner.tokens"),
    ],
)
def test_bad_overrides_name_the_key(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer().override([assignment])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_configurations_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Outer(unknown=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Outer().limit = 3  # type: ignore[misc]


def test_digest_depends_on_values_alone() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert Outer().digest() == Outer(limit=None, inner=Inner(tokens=1000)).digest()
    assert Outer().digest() != Outer(limit=1).digest()
    code = "from twofold.base.config import digest; print(digest({'a': 1.5, 'ü': [None, True]}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest({"ü": [None, True], "a": 1.5})


class Named(Config):
    """Fields that take text, alone and beside other things."""

    text: str = ""
    maybe: str | None = None
    either: str | tuple[int, ...] = ""
    kind: Literal["full", "lora"] = "full"
    count: int = 0
    words: tuple[str, ...] = ()
    table: dict[str, str] = Field(default_factory=dict)


@pytest.mark.parametrize(
    "text",
    [
        "2024",
        "1e5",
        "2e6",
        "true",
        "null",
        "[1, 2]",
        '{"x": 1}',
        "-1.50",
        "NaN",
        "Infinity",
        "~name",
        "a=b",
        "1" * 5000,
    ],
)
def test_what_looks_like_a_number_is_text_where_text_is_wanted(text: str) -> None:
    assert Named().override([f"text={text}"]).text == text


def test_text_beside_other_kinds() -> None:
    assert Named().override(["maybe=null"]).maybe is None and Named().override(["maybe=2024"]).maybe == "2024"
    assert Named().override(["either=[1, 2]"]).either == (1, 2) and Named().override(["either=2024"]).either == "2024"
    assert Named().override(['text="2024"', "count=2e3"]) == Named(text="2024", count=2000)
    assert Named().override(["text=1", "text=2024", "count=3"]) == Named(text="2024", count=3)
    assert Named().override(["text=" + "[" * 100_000]).text == "[" * 100_000
    nested = Outer().override(["inner.tokens=1e5"])
    assert nested.inner.tokens == 100_000


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["text=2024", "count=many"], "count: "),
        (["count=many", "text=2024"], "count: "),
        (["kind=2024"], "kind: "),
        (["words=[1]"], "words.0: "),
        (['table={"a": 1}'], "table.a: "),
        (["count=" + "1" * 5000], "count: "),
    ],
)
def test_what_is_wrong_besides_is_still_said(assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Named().override(assignments)
