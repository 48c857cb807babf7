"""Errors of lower layers become errors of the API from their facts, never from their words."""

from __future__ import annotations

from twofold.base.records import InputError
from twofold.serve.errors import bad_request, from_input_error


def test_facts_become_param_and_code() -> None:
    error = from_input_error(InputError.overflow("the prompt", 9, 5), "prompt")
    assert (error.status, error.param, error.code) == (400, "prompt", "context_length_exceeded")
    assert error.body()["error"]["type"] == "invalid_request_error"
    error = from_input_error(InputError("x", field="grammar"), "messages", {"grammar": "guided_regex"})
    assert (error.param, error.code) == ("guided_regex", "invalid_value")


def test_words_decide_nothing() -> None:
    error = from_input_error(InputError("messages[0] and the model's context are words here"))
    assert (error.param, error.code) == (None, "invalid_value")
    assert bad_request("x").code == "invalid_value"
