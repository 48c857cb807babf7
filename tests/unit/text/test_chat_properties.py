"""Properties of the renderer over arbitrary conversations, in every family: structure, views as served, weights."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import Message, ToolCall
from twofold.text.chat import FAMILIES, ChatPolicy, Renderer, TurnWeights
from twofold.text.families import compile_template
from twofold.text.messages import messages_to_openai
from twofold.text.tokenizer import ADDED_TOKENS, Tokenizer

POLICIES = [ChatPolicy(family=family) for family in FAMILIES] + [ChatPolicy(history_thinking="keep")]
NAMES = [f"{policy.family}-{policy.history_thinking}" for policy in POLICIES]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "<|im_end|><tool_call>"}}

spellings = st.sampled_from([token for token, _ in ADDED_TOKENS] + ["<|im_start|>system\n", "\n", "</think>\n\n", ""])
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.one_of(spellings, plain), max_size=4).map("".join)
calls = st.lists(st.builds(ToolCall, st.just("f"), st.dictionaries(plain, texts, max_size=2)), max_size=2).map(tuple)
asks = st.builds(Message, st.just("user"), texts)
weights = st.one_of(st.none(), st.sampled_from([0.0, 0.5]), st.builds(TurnWeights, *[st.sampled_from([0.0, 2.0])] * 3))


@st.composite
def conversations(draw: Any, policy: ChatPolicy, thoughts: bool = True) -> list[Message]:
    """A conversation that the family has a place for."""
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(draw(asks))
        thought = draw(st.one_of(st.none(), texts)) if thoughts else None
        made = draw(calls) if policy.spec.tools else ()
        messages.append(Message("assistant", draw(texts), thought, made))
        messages += [Message("tool", draw(texts)) for _ in made]
    return messages


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat\n\n" * 9, str(TOOL), ChatPolicy().template], 400)


def tools_of(policy: ChatPolicy) -> list[dict[str, Any]] | None:
    return [TOOL] if policy.spec.tools else None


def some(policy: ChatPolicy, examples: int = 40) -> Any:
    """Settings: fewer examples for the relatives of the hybrid family."""
    return settings(max_examples=examples if policy == ChatPolicy() else examples // 3)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_content_cannot_forge_structure(policy: ChatPolicy) -> None:
    renderer, tok = Renderer(tokenizer(), policy), tokenizer()
    controls = {tok.control_id(token) for token, _ in ADDED_TOKENS}
    template = compile_template(policy.template)

    @some(policy)
    @given(conversations(policy), st.booleans())
    def check(messages: list[Message], thinking: bool) -> None:
        thinking = thinking or policy.spec.prompt == "open"
        got = renderer.render(messages, tools_of(policy), thinking=thinking, add_generation_prompt=True)
        # The same conversation with all its text left out has the same control tokens in the same order.
        bare = [
            Message(
                m.role,
                "" if not m.content else "x",
                None if m.reasoning is None else ("x" if m.reasoning.strip("\n") else m.reasoning),
                tuple(ToolCall("f", {}) for _ in m.tool_calls),
            )
            for m in messages
        ]
        wrapped = [m.content.startswith("<tool_response>") and m.content.endswith("</tool_response>") for m in messages]
        if not any(wrapped):
            want = renderer.render(bare, tools_of(policy), thinking=thinking, add_generation_prompt=True)
            assert [i for i in got.token_ids if i in controls] == [i for i in want.token_ids if i in controls]
        flags = {} if thinking else {"enable_thinking": False}
        rows = messages_to_openai(messages)
        assert got.text == template(messages=rows, tools=tools_of(policy), add_generation_prompt=True, **flags)
        assert "".join(tok.decode([i]) for i in got.token_ids if i in controls).count("<|im_end|>") == sum(
            part == "eot" for part in got.parts
        )

    check()


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_views_are_what_a_server_sees_and_weights_what_was_asked(policy: ChatPolicy) -> None:
    renderer, tok = Renderer(tokenizer(), policy), tokenizer()

    @some(policy)
    @given(
        conversations(policy, policy.spec.prompt in ("switch", "open")), st.booleans(), st.lists(weights, max_size=3)
    )
    def check(messages: list[Message], empty_trained: bool, asked: list[float | TurnWeights | None]) -> None:
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        spread = {index: weight for index, weight in zip(turns, asked, strict=False) if weight is not None}
        views = renderer.views(messages, tools_of(policy), empty_think_trained=empty_trained, weights=spread)
        left = list(views)
        for index in turns:
            weight = spread.get(index, 1.0)
            turn = weight if isinstance(weight, TurnWeights) else TurnWeights(weight, weight, weight)
            if turn.end(messages[index]) == 0:
                continue
            view = left.pop(0)
            writes = (
                bool((messages[index].reasoning or "").strip("\n")) or empty_trained or policy.spec.prompt == "open"
            )
            prompt = renderer.prompt_ids(messages[:index], tools_of(policy), thinking=writes)
            assert view.token_ids[: len(prompt)] == prompt
            assert not any(view.weights[: len(prompt)])
            rest = list(zip(view.token_ids, view.weights, view.parts, strict=True))[len(prompt) :]
            assert rest[-1] == (tok.im_end, turn.end(messages[index]), "eot")
            assert [part for _, _, part in rest].count("eot") == 1
            allowed = {"content": turn.content, "call": turn.calls, "reasoning": turn.reasoning}
            allowed["empty_think"] = turn.reasoning if empty_trained else 0.0
            assert all(weight == allowed[part] for _, weight, part in rest[:-1])
        assert left == []

    check()


@some(POLICIES[-1])
@given(conversations(POLICIES[-1]))
def test_views_that_keep_thinking_share_prefixes(messages: list[Message]) -> None:
    views = Renderer(tokenizer(), POLICIES[-1]).views(messages, empty_think_trained=True)
    for earlier, later in pairwise(views):
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
