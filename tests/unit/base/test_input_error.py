"""An InputError carries its facts as data: field, code and hint never have to be read from its words."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import twofold
from twofold.base.records import CONTEXT_OVERFLOW, Grammar, InputError, SamplingParams


def test_facts_and_another_hint() -> None:
    error = InputError("a is wrong", hint="use b", field="a", code="c")
    assert (str(error), error.problem, error.hint, error.field, error.code) == (
        "a is wrong; use b",
        "a is wrong",
        "use b",
        "a",
        "c",
    )
    other = error.with_hint("press c")
    assert (str(other), other.field, other.code) == ("a is wrong; press c", "a", "c")
    plain = InputError("only words")
    assert (str(plain), plain.field, plain.code) == ("only words", None, None)


def test_it_crosses_processes() -> None:
    got = pickle.loads(pickle.dumps(InputError("m", hint="h", field="f", code="c")))
    assert (str(got), got.hint, got.field, got.code) == ("m; h", "h", "f", "c")


def test_overflow_has_the_words_that_gateways_know() -> None:
    error = InputError.overflow("the prompt", 300, 256)
    assert error.code == CONTEXT_OVERFLOW == "context_length_exceeded"
    assert "this model's maximum context length is 256 tokens" in str(error) and "300" in str(error)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"), ({"n": 0}, "n"), ({"seed": 2**70}, "seed"), ({"stop": ("",)}, "stop"),
        ({"thinking_budget": -1}, "thinking_budget"), ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"logit_bias": ((1, 200.0),)}, "logit_bias"), ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"), ({"grammar": "x"}, "grammar"),
        ({"grammar": Grammar("json"), "ignore_eos": True}, "ignore_eos"), ({"presence_penalty": 3}, "presence_penalty"),
    ],
)  # fmt: skip
def test_sampling_parameters_name_their_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**values)
    assert caught.value.field == field


def test_the_server_reads_no_facts_from_words() -> None:
    """Neither ``... in str(error)`` nor ``str(error).replace`` decides what a client is told."""
    for path in sorted((Path(twofold.__file__).parent / "serve").glob("*.py")):
        assert not re.search(r"in str\(error\)|str\(error\)\.(replace|split|startswith)", path.read_text()), path
