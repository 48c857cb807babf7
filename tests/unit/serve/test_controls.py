"""Thinking controls: every spelling one by one, conflicts, and values that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.serve.controls import EFFORTS, SPELLINGS, Thinking, read_thinking
from twofold.serve.errors import ApiError

ON, OFF = Thinking(enabled=True), Thinking(enabled=False)
MEANINGS: list[tuple[dict[str, Any], Thinking]] = [
    ({}, Thinking()),
    ({"enable_thinking": None}, Thinking()),
    ({"enable_thinking": True}, ON),
    ({"enable_thinking": False}, OFF),
    ({"chat_template_kwargs": {"enable_thinking": False}}, OFF),
    ({"chat_template_kwargs": {"thinking": True}}, ON),
    ({"chat_template_kwargs": {}}, Thinking()),
    ({"open_thinking": True}, ON),
    ({"think": False}, OFF),
    ({"think": "low"}, Thinking(enabled=True, share=0.2)),
    ({"thinking": True}, ON),
    ({"thinking": {"type": "enabled"}}, ON),
    ({"thinking": {"type": "disabled"}}, OFF),
    ({"thinking": {"type": "adaptive"}}, Thinking()),
    ({"thinking": {"type": "auto"}}, Thinking()),
    ({"thinking": {"type": "enabled", "budget_tokens": 64}}, Thinking(enabled=True, budget=64)),
    ({"thinking_budget": 0}, Thinking(budget=0)),
    ({"thinking_budget": -1}, Thinking()),
    ({"thinking_token_budget": 12}, Thinking(budget=12)),
    ({"thinking_budget_tokens": 13}, Thinking(budget=13)),
    ({"reasoning_budget": 14}, Thinking(budget=14)),
    ({"chat_template_kwargs": {"thinking_budget": 15}}, Thinking(budget=15)),
    ({"reasoning_effort": "none"}, OFF),
    *[({"reasoning_effort": level}, Thinking(enabled=True, share=share)) for level, share in EFFORTS.items()],
    ({"chat_template_kwargs": {"reasoning_effort": "medium"}}, Thinking(enabled=True, share=0.5)),
    ({"reasoning": {"effort": "high"}}, Thinking(enabled=True, share=0.8)),
    ({"reasoning": {"max_tokens": 100}}, Thinking(budget=100)),
    ({"reasoning": {"enabled": False}}, OFF),
    ({"reasoning": {"exclude": True}}, Thinking(hidden=True)),
    ({"include_reasoning": False}, Thinking(hidden=True)),
    ({"include_reasoning": True}, Thinking()),
    ({"preserve_thinking": True}, Thinking(keep_history=True)),
    ({"chat_template_kwargs": {"preserve_thinking": False}}, Thinking(keep_history=False)),
    # the same thing said twice is no conflict
    ({"enable_thinking": True, "thinking": {"type": "enabled"}, "reasoning_effort": "low"}, Thinking(True, None, 0.2)),
    ({"enable_thinking": False, "thinking_budget": 0}, Thinking(enabled=False, budget=0)),
]


@pytest.mark.parametrize(("given", "meaning"), MEANINGS, ids=lambda value: str(value)[:60])
def test_spellings(given: dict[str, Any], meaning: Thinking) -> None:
    assert read_thinking(given) == meaning


def test_no_spelling_is_untested() -> None:
    tested = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for given, _ in MEANINGS
        for name, value in given.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert {spelling.path for spelling in SPELLINGS} <= tested


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"enable_thinking": True, "thinking": {"type": "disabled"}},
            "enable_thinking and thinking.type say",
        ),
        ({"reasoning_effort": "none", "think": True}, "say different things"),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, "thinking_budget and thinking_token_budget say different"),
        ({"enable_thinking": False, "thinking_budget": 5}, "thinking_budget has no effect because enable_thinking"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "thinking.budget_tokens has no effect"),
        ({"reasoning": {"effort": "low", "max_tokens": 9}}, "both limit thinking"),
        ({"include_reasoning": True, "reasoning": {"exclude": True}}, "say different things"),
    ],
)
def test_conflicts_are_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        read_thinking(given)
    assert caught.value.status == 400 and caught.value.code == "conflicting_controls"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enable_thinking": "yes"}, "enable_thinking is 'yes'; use true or false"),
        ({"enable_thinking": 1}, "use true or false"),
        ({"thinking_budget": 1.5}, "give a number of tokens"),
        ({"thinking_budget": True}, "give a number of tokens"),
        ({"thinking_budget": -2}, "give a number of tokens"),
        ({"reasoning_effort": "huge"}, "use none, minimal, low"),
        ({"reasoning_effort": ["low"]}, "use none, minimal, low"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type is 'perhaps'"),
        ({"thinking": {"kind": "enabled"}}, "thinking.kind is not supported; thinking takes type, budget_tokens"),
        ({"chat_template_kwargs": {"enable_thoughts": True}}, "chat_template_kwargs.enable_thoughts is not supported"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
        ({"enable_thinking": {}}, None),
        ({"enable_thinking": {"a": 1}}, "enable_thinking takes no object"),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert read_thinking(given) == Thinking()
        return
    with pytest.raises(ApiError, match=words) as caught:
        read_thinking(given)
    assert caught.value.status == 400 and caught.value.param is not None


def test_a_share_of_the_reply() -> None:
    assert Thinking(share=0.2).tokens(1000) == 200
    assert Thinking(share=0.1).tokens(3) == 1
    assert Thinking(budget=7).tokens(1000) == 7
    assert Thinking().tokens(1000) is None
