"""Templates whose tools have the XML form: recognised, rendered, read back, offered and trained as they write it.

The template below is written for this test, with a switch for each thing in which Qwen3-Coder's and its successors'
differ. Nothing of theirs is copied.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.chat import ChatPolicy, Renderer, messages_to_openai
from twofold.text.families import Recognition, grade
from twofold.text.parse import ParseOptions, parse
from twofold.text.policy import FAMILIES, read_chat_policy, write_chat_policy
from twofold.text.probes import compile_template
from twofold.text.tokenizer import Tokenizer
from twofold.text.xml_form import CODER, XmlTools, tool_text

Conversation = Callable[..., tuple[list[Message], list[dict[str, Any]] | None]]

TEMPLATE = """\
{%- set first = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools %}<|im_start|>system
{{ (first if first is not none else 'You use tools.') + '\\n\\n# Functions\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{ '\\n</tools>\\n\\nAnswer with <tool_call>\\n<function=NAME>\\n</function>\\n</tool_call><|im_end|>\\n' }}
{%- elif first is not none %}{{ '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {{- '<|im_start|>assistant\\n' + ((m.content | trim) + GAP if m.content | trim else '') }}
        {%- for call in m.tool_calls %}
            {{- ('' if loop.first else '\\n') + '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<parameter=' + key + '>\\n' + (value if value is string else SPELLED) + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '' if loop.previtem.role == 'tool' else '<|im_start|>user' }}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {{- '' if not loop.last and loop.nextitem.role == 'tool' else END + '<|im_end|>\\n' }}
    {%- elif m.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def written(gap: str, spelled: str, end: str) -> str:
    text = TEMPLATE.replace("GAP", repr(gap)).replace("SPELLED", spelled).replace("END", repr(end))
    return text.replace("{{ (first", "{{- '\\n' + (first").replace("{{ '\\n</tools>", "{{- '\\n</tools>")


FORM = XmlTools(
    "\n\n# Functions\n<tools>",
    "\n</tools>\n\nAnswer with <tool_call>\n<function=NAME>\n</function>\n</tool_call>",
    system="first",
    default_system="You use tools.",
)


@pytest.mark.parametrize(
    ("gap", "spelled", "end", "form"),
    [
        ("\n\n", "value | tojson", "", replace(FORM, spelling="json")),
        ("\n", "value | string", "\n", replace(FORM, spelling="text", gap="\n", result_end="\n")),
        (
            "",
            "(value | tojson if value is mapping or value is iterable else value | string)",
            "",
            replace(FORM, gap=""),
        ),
    ],
)
def test_the_form_is_found_by_rendering_whatever_its_words(
    gap: str, spelled: str, end: str, form: XmlTools, tokenizer: Tokenizer, make_conversation: Conversation
) -> None:
    template = written(gap, spelled, end)
    found = grade(template)
    assert found == Recognition(ChatPolicy(family="coder", xml_tools=form))
    renderer = Renderer(tokenizer, found.policy)
    theirs, ours = compile_template(template), compile_template(renderer.chat_template)
    for seed in range(60):
        messages, tools = make_conversation(seed)
        text = renderer.render(messages, tools, add_generation_prompt=True).text
        for compiled in (theirs, ours):
            rows = messages_to_openai(messages)
            assert compiled(messages=rows, tools=tools, add_generation_prompt=True) == text


XML_FAMILIES = [name for name, family in FAMILIES.items() if family.xml]


@pytest.mark.parametrize("family", XML_FAMILIES)
def test_own_templates_render_the_same_text(
    family: str, tokenizer: Tokenizer, make_conversation: Conversation, tools: list[dict[str, Any]]
) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family=family))
    compiled = compile_template(renderer.chat_template)
    for seed in range(60):
        messages, offered = make_conversation(seed)
        thinking = not (FAMILIES[family].switches and seed % 2)
        text = renderer.render(messages, offered, thinking, add_generation_prompt=True).text
        variables = {"add_generation_prompt": True, "enable_thinking": thinking}
        assert compiled(messages=messages_to_openai(messages), tools=offered, **variables) == text


@pytest.mark.parametrize("family", XML_FAMILIES)
def test_what_is_trained_is_what_is_read_back(family: str, tokenizer: Tokenizer) -> None:
    """Every view's reply, parsed with the schema, is the turn; its prompt is the one that is served."""
    fields = {"text": "string", "n": "integer", "ok": "boolean", "none": "null", "list": "array", "map": "object"}
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in fields.items()}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    arguments = {"text": "a\n  b\n", "n": 3, "ok": True, "none": None, "list": [{"a": "é"}], "map": {"k": None}}
    calls = (ToolCall("f", arguments), ToolCall("f", {}))
    thought = "I call." if FAMILIES[family].thinks else None
    messages = [
        Message("user", "Go."),
        Message("assistant", "Two calls.", thought, calls),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "", thought, calls[:1]),
        Message("tool", "3"),
        Message("assistant", "Done."),
    ]
    renderer = Renderer(tokenizer, ChatPolicy(family=family))
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    for index, view in zip(turns, renderer.views(messages, tools), strict=True):
        size = next(place for place, weight in enumerate(view.weights) if weight)
        prompt, reply = view.token_ids[:size], view.token_ids[size:]
        served = renderer.prompt_ids(messages[:index], tools, thinking=messages[index].reasoning is not None)
        assert prompt == (served if FAMILIES[family].switches else renderer.prompt_ids(messages[:index], tools))
        assert set(view.weights[size:]) == {1.0}
        parsed = parse(tokenizer, reply, prompt, ParseOptions(tools=tools))
        assert parsed.message() == messages[index] and parsed.errors == ()


def test_results_appended_as_tokens_are_the_next_prompt(tokenizer: Tokenizer) -> None:
    for family in XML_FAMILIES:
        renderer = Renderer(tokenizer, ChatPolicy(family=family))
        call = Message("assistant", "", None, (ToolCall("f", {}),))
        asked = [Message("user", "Go."), call]
        before = renderer.render(asked).token_ids
        end = len(before) - before[::-1].index(tokenizer.control_id("<|im_end|>"))
        after = renderer.prompt_ids([*asked, Message("tool", "1"), Message("tool", " 2 ")])
        assert before[:end] + renderer.tool_result_ids(["1", " 2 "]) == after


def test_a_json_call_keeps_the_newlines_of_its_content(tokenizer: Tokenizer) -> None:
    """Only the XML form has a blank line of its own before a call."""
    for content in ("a", "a\n", "a\n\n"):
        turn = Message("assistant", content, None, (ToolCall("f", {}),))
        for early in (False, True):
            renderer = Renderer(tokenizer, ChatPolicy(family="instruct"))
            view = renderer.views([Message("user", "Go."), turn])[0]
            size = next(place for place, weight in enumerate(view.weights) if weight)
            options = ParseOptions(early_calls=early)
            parsed = parse(tokenizer, view.token_ids[size:], view.token_ids[:size], options)
            assert parsed.message() == turn


def test_the_policy_file_keeps_the_form(tmp_path: Any) -> None:
    policy = ChatPolicy(family="coder", xml_tools=FORM, trim_content=True)
    write_chat_policy(tmp_path, policy)
    assert read_chat_policy(tmp_path) == (policy, policy.template)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spelling": "yaml"}, "spelling"),
        ({"gap": "x"}, "gap"),
        ({"head": 3}, "head"),
        ({"result_end": None}, "result_end"),
    ],
)
def test_bad_forms_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"xml_tools\.{message}"):
        XmlTools(**{"head": "", "tail": "", **changes})
    with pytest.raises(InputError, match="cannot show tools"):
        ChatPolicy(family="chatml", xml_tools=FORM)


@pytest.mark.parametrize(
    "tool", [{"name": "f"}, {"function": {"name": "f", "parameters": 3}}, {"parameters": {"properties": {"a": True}}}]
)
def test_odd_tools_are_described_too(tool: dict[str, Any]) -> None:
    shown = tool_text(tool, CODER, "tools[0]")
    assert shown.startswith("\n<function>\n<name>") and shown.endswith("\n</parameters>\n</function>")
    compiled = compile_template(ChatPolicy(family="coder").template)
    assert shown in compiled(messages=[{"role": "user", "content": "Go."}], tools=[tool])


def test_random_conversations_keep_their_calls(tokenizer: Tokenizer, make_conversation: Conversation) -> None:
    """Render, then parse: the calls of the last turn come back, types by the schema or as text."""
    renderer = Renderer(tokenizer, ChatPolicy(family="qwen3.6"))
    properties = {"city": {"type": "string"}, "n": {"type": "number"}, "nested": {"type": "object"}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name in ("get_weather", "now")
    ]
    rng, seen = random.Random(0), 0
    for seed in range(80):
        messages, _ = make_conversation(rng.randrange(10**6) + seed)
        for view in renderer.views(messages, tools)[-1:]:
            turn = [message for message in messages if message.role == "assistant"][-1]
            size = next(place for place, weight in enumerate(view.weights) if weight)
            parsed = parse(tokenizer, view.token_ids[size:], view.token_ids[:size], ParseOptions(tools=tools))
            assert parsed.tool_calls == turn.tool_calls
            seen += len(turn.tool_calls)
    assert seen > 5
