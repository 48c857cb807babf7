"""Bodies that no part of the server could hold are refused before any part sees them."""

from __future__ import annotations

import json

import pytest

from twofold.serve.errors import ApiError
from twofold.serve.wire import MAX_DEPTH, read_object


def test_what_json_may_be_is_read() -> None:
    body = {"a": [{"b": "é😀"}], "c": "\\ud800 as text", "d": 10**30}
    for data in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False).encode("utf-8-sig")):
        assert read_object(data) == body
    assert read_object(json.dumps(body).encode("utf-16")) == body


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"a": "\\ud800"}', "a"),
        (b'{"a": [{"b": "x\\uDFFF"}]}', "a[0].b"),
        (b'{"a": {"\\ud83d": 1}}', "a"),
        (b'{"\\ud83d": 1}', None),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "a"),
        (b'{"a": "\xed\xa0\x80"}', None),
        (b"[]", None),
        (b"null", None),
        (b"", None),
        (b"1" * 5000, None),
    ],
)
def test_what_it_may_not_be(data: bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read_object(data)
    assert (caught.value.status, caught.value.param) == (400, param) and caught.value.code


def test_many_brackets_are_not_deep() -> None:
    assert len(read_object(json.dumps({"a": [[1]] * 5000}).encode())["a"]) == 5000
