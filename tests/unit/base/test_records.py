"""Records: what cannot be honoured is refused with a line that names the field."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest

from twofold.base.records import AnswerSampling, Completion, Grammar, InputError, Request, SamplingParams

BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature must be in [0, 1e+30]"),
    ({"temperature": float("nan")}, "temperature must be in [0, 1e+30]"),
    ({"temperature": float("inf")}, "temperature must be in [0, 1e+30]"),
    ({"top_p": 0.0}, "top_p must be in"),
    ({"top_p": 1.1}, "top_p must be in"),
    ({"top_k": -1}, "top_k must be >= 0"),
    ({"min_p": -0.1}, "min_p must be in"),
    ({"min_p": 1.1}, "min_p must be in"),
    ({"max_tokens": 0}, "max_tokens must be >= 1, whole"),
    ({"n": 0}, "n must be >= 1, whole"),
    ({"logit_bias": 5}, "logit_bias must be a tuple of (token id, bias) pairs, got 5"),
    ({"logit_bias": ((3, "x"),)}, "logit_bias must be a tuple of (token id, bias) pairs"),
    ({"stop": 5}, "stop must be a tuple of non-empty strings"),
    ({"temperature": "hot"}, "temperature must be in [0, 1e+30], got 'hot'"),
    ({"temperature": 1e300}, "temperature must be in [0, 1e+30]"),
    ({"repetition_penalty": 1e-50}, "repetition_penalty must be in [0.01, 100]"),
    ({"max_tokens": "lots"}, "max_tokens must be >= 1, whole and at most 4294967296, got 'lots'"),
    ({"top_k": 10**20}, "top_k must be >= 0, whole and at most 4294967296"),
    ({"thinking_budget": 10**20}, "thinking_budget must be >= 0, whole"),
    ({"seed": "x"}, "seed must be >="),
    ({"seed": 10**30}, "seed must be >="),
    ({"stop_token_ids": 5}, "stop_token_ids must be a tuple of token ids, got 5"),
    ({"grammar": "x"}, "grammar must be Grammar or None, got 'x'"),
    ({"post_thinking": {"temperature": 0.5}}, "post_thinking must be AnswerSampling or None"),
    ({"thinking_budget": -1}, "thinking_budget must be >= 0"),
    ({"presence_penalty": 2.1}, "presence_penalty must be in"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty must be in"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be in [0.01, 100]"),
    ({"min_tokens": -1}, "min_tokens must be >= 0"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, more than max_tokens, 8"),
    ({"top_logprobs": -1}, "top_logprobs must be >= 0"),
    ({"speculate": -1}, "speculate must be >= 0"),
    ({"logit_bias": ((3, 101.0),)}, "logit_bias 101.0 of token 3"),
    ({"logit_bias": ((-1, 1.0),)}, "logit_bias 1.0 of token -1"),
    ({"logit_bias": ((3, 1.0), (3, 2.0))}, "names a token twice"),
    ({"stop": "word"}, "stop must be"),
    ({"stop": ("",)}, "stop must be"),
    ({"grammar": Grammar("json"), "min_tokens": 1}, "a grammar decides where the answer ends"),
    ({"grammar": Grammar("json"), "ignore_eos": True}, "a grammar decides where the answer ends"),
]


def test_numbers_of_numpy_and_lists_do_as_well() -> None:
    SamplingParams(np.float32(0.5), top_k=np.int64(3), stop_token_ids=[4], stop=["x"], logit_bias=[(3, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_impossible_sampling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        SamplingParams(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": 2.0}, {"top_k": -1}, {"min_p": 2.0}])
def test_the_answers_own_sampling_is_checked_the_same_way(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        AnswerSampling(**fields)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [("yaml", "x", "use one of json_schema"), ("regex", "", "needs its text"), ("json", "{}", "takes no text")],
)
def test_grammars_need_a_kind_and_their_text(kind: Any, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grammar(kind, text)


def test_parameters_are_values() -> None:
    params = SamplingParams(
        0.7,
        top_p=0.8,
        min_p=1.0,
        logit_bias=((3, -100.0), (4, 100.0)),
        post_thinking=AnswerSampling(0.0),
        grammar=Grammar("regex", "a+"),
        stop=("\n\n",),
    )
    assert pickle.loads(pickle.dumps(params)) == params and len({params, params}) == 1
    request = Request((1, 2), params)
    assert not request.in_think and not request.after_think
    assert Completion(0, 0).top_logprobs == [] and not Completion(0, 0).looped
