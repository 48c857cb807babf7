"""Sampling defaults of a checkpoint: what is honoured, what each mode gets, and what is warned about."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.engine.generation import ANSWERING, THINKING, config_warnings, sampling_defaults

OFFICIAL = {**THINKING, "do_sample": True, "eos_token_id": [5, 6], "pad_token_id": 6, "transformers_version": "4.51.0"}


@pytest.mark.parametrize(
    ("config", "thinking", "wanted"),
    [
        (OFFICIAL, True, THINKING),
        (OFFICIAL, None, THINKING),
        (OFFICIAL, False, ANSWERING),
        ({}, True, THINKING),
        ({}, False, ANSWERING),
        ({}, None, {}),
        ({"temperature": 1.0}, False, {"temperature": 1.0}),  # the checkpoint's own word holds in both modes
        ({**OFFICIAL, "repetition_penalty": 1.05}, False, {**ANSWERING, "repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.6, "max_new_tokens": 9}, True, {"temperature": 0.0, "max_tokens": 9}),
        ({"stop_strings": "END", "min_new_tokens": 2}, None, {"stop": ("END",), "min_tokens": 2}),
        ({"min_p": 0.1}, True, {**THINKING, "min_p": 0.1}),
        ({"stop_strings": ["a", "b"]}, None, {"stop": ("a", "b")}),
        ({"top_k": None}, None, {}),
    ],
)  # fmt: skip
def test_defaults(config: dict[str, Any], thinking: bool | None, wanted: dict[str, Any]) -> None:
    assert sampling_defaults(config, thinking) == wanted


def test_nothing_is_dropped_silently() -> None:
    assert config_warnings(OFFICIAL) == []
    assert config_warnings({"num_beams": 1, "typical_p": 1.0, "bad_words_ids": None}) == []
    assert config_warnings({"num_beams": 4, "bad_words_ids": [[3]]}) == [
        "num_beams of generation_config.json is not supported and has no effect",
        "bad_words_ids of generation_config.json is not supported and has no effect",
    ]
    [line] = config_warnings({"temperature": -1})
    assert "cannot be used (temperature must be in [0, 1e+30]" in line
