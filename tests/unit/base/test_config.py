from __future__ import annotations

import os
import subprocess
import sys

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
