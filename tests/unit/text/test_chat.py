"""The renderer: equal to the Jinja template, impossible to forge, and weighted exactly where the model writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.chat import (
    CHAT_TEMPLATE,
    STOP_TEXT,
    ChatPolicy,
    Rendered,
    Renderer,
    TurnWeights,
    messages_to_openai,
)
from twofold.text.tokenizer import Tokenizer

Conversation = tuple[list[Message], list[dict[str, Any]] | None]
Maker = Callable[..., Conversation]
GEN = "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def jinja(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template)


@pytest.fixture(scope="module")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer)


def trained_text(renderer: Renderer, rendered: Rendered, weight: float = 1.0) -> str:
    pairs = zip(rendered.token_ids, rendered.weights, strict=True)
    return renderer.tokenizer.decode(i for i, w in pairs if w == weight)


@pytest.mark.parametrize("keep", [False, True])
def test_text_equals_the_template_for_generated_conversations(
    tokenizer: Tokenizer, make_conversation: Maker, keep: bool
) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(history_thinking="keep" if keep else "strip"))
    template = jinja(renderer.chat_template)
    for seed in range(210):
        messages, tools = make_conversation(seed, forged=seed % 3 == 0)
        for generate, thinking in ((False, True), (True, True), (True, False)):
            got = renderer.render(messages, tools, thinking=thinking, add_generation_prompt=generate)
            flags = {} if thinking else {"enable_thinking": False}
            rows = messages_to_openai(messages)
            want = template.render(messages=rows, tools=tools, add_generation_prompt=generate, **flags)
            assert got.text == want, seed


def test_token_ids_equal_plain_encoding_of_the_text(renderer: Renderer, make_conversation: Maker) -> None:
    unforged = [{"type": "function", "function": {"name": "f", "description": "plain"}}]
    for seed in range(200):
        messages, tools = make_conversation(seed)
        if any("tool_response" in m.content for m in messages):
            continue
        got = renderer.render(messages, unforged if tools else None, thinking=False, add_generation_prompt=True)
        assert got.token_ids == renderer.tokenizer.encode_with_special(got.text), seed
        assert len(got.token_ids) == len(got.weights) == len(got.roles) == len(got.parts)


def test_official_examples(renderer: Renderer) -> None:
    hi, user = Message("user", "hi"), "<|im_start|>user\nhi<|im_end|>\n"
    gen = renderer.render([hi], add_generation_prompt=True)
    assert gen.text == user + GEN
    assert renderer.render([hi], add_generation_prompt=True, thinking=False).text == user + GEN + EMPTY
    history = [hi, Message("assistant", "yo", "abc"), Message("user", "again")]
    want = user + GEN + "yo<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n" + GEN
    assert renderer.render(history, add_generation_prompt=True).text == want
    assert renderer.render([hi, Message("assistant", "yo")]).text == user + GEN + EMPTY + "yo<|im_end|>\n"


def test_tool_conversation_byte_for_byte(renderer: Renderer) -> None:
    tool = {"type": "function", "function": {"name": "w", "description": "Größe"}}
    messages = [
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "let me", "t1", (ToolCall("w", {"c": "ü"}), ToolCall("w", {}))),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "", "t2", (ToolCall("w", {}),)),
        Message("tool", "3"),
    ]
    assert renderer.render(messages, [tool], add_generation_prompt=True).text == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "w", "description": "Größe"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt1\n</think>\n\nlet me\n"
        '<tool_call>\n{"name": "w", "arguments": {"c": "ü"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt2\n</think>\n\n"
        '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" + GEN
    )


def test_content_cannot_forge_structure(renderer: Renderer, make_conversation: Maker) -> None:
    tok = renderer.tokenizer
    plain = [tok.im_start, tok.im_end, tok.endoftext, tok.think_open, tok.think_close, tok.token_id("<tool_call>")]
    for seed in range(60):
        messages, tools = make_conversation(seed, forged=True)
        got = renderer.render(messages, tools)
        outside = {"text", "content"}
        for token, part, role in zip(got.token_ids, got.parts, got.roles, strict=True):
            in_tool_help = role == "system" and token in (tok.token_id("<tool_call>"), tok.token_id("</tool_call>"))
            assert not (part in outside and token in plain and not in_tool_help)
        assert got.token_ids.count(tok.im_start) == got.token_ids.count(tok.im_end)
        assert tok.endoftext not in got.token_ids


def test_supplied_tokens_have_no_weight_and_end_token_is_trained_once(
    renderer: Renderer, make_conversation: Maker
) -> None:
    for seed in range(150):
        messages, tools = make_conversation(seed, forged=seed % 2 == 0)
        for view in renderer.views(messages, tools):
            rows = list(zip(view.token_ids, view.weights, view.roles, view.parts, strict=True))
            assert all(w == 0 for _, w, role, part in rows if role != "assistant" or part in ("header", "empty_think"))
            assert [token for token, w, _, part in rows if part == "eot" and w == 1] == [renderer.tokenizer.im_end]
            assert rows[-1][0] == renderer.tokenizer.im_end and rows[-1][1] == 1
            weights = view.weights  # one unbroken stretch at the end
            assert weights == sorted(weights) and set(weights) == {0.0, 1.0}


def test_views_are_generation_prompt_plus_turn(renderer: Renderer, make_conversation: Maker) -> None:
    checked = 0
    for seed in range(150):
        messages, tools = make_conversation(seed)
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        for trained in (False, True):
            views = renderer.views(messages, tools, empty_think_trained=trained)
            assert len(views) == len(turns)
            for index, view in zip(turns, views, strict=True):
                message = messages[index]
                empty = not (message.reasoning or "").strip("\n")
                prompt = renderer.prompt_ids(messages[:index], tools, thinking=trained or not empty)
                length = view.weights.index(1.0)
                assert view.token_ids[:length] == prompt
                reply = renderer.tokenizer.decode(view.token_ids[length:])
                thought = (message.reasoning or "").strip("\n")
                block = f"<think>\n{thought}\n</think>\n\n" if trained or not empty else ""
                assert reply.startswith(block + message.content.lstrip("\n")) and reply.endswith("<|im_end|>")
                checked += 1
    assert checked > 300


def test_history_answers_carry_weight_once_over_all_views(renderer: Renderer) -> None:
    messages = [
        Message("user", "a"),
        Message("assistant", "first answer", "t1"),
        Message("user", "b"),
        Message("assistant", "second answer", "t2"),
    ]
    views = renderer.views(messages)
    assert [trained_text(renderer, v) for v in views] == [
        "<think>\nt1\n</think>\n\nfirst answer<|im_end|>",
        "<think>\nt2\n</think>\n\nsecond answer<|im_end|>",
    ]
    assert all(v.text.count("first answer") == 1 for v in views) and "t1" not in views[1].text
    assert trained_text(renderer, renderer.render(messages)) == trained_text(renderer, views[1])


def test_tool_steps_keep_their_thinking(renderer: Renderer) -> None:
    call = (ToolCall("now", {}),)
    messages = [
        Message("user", "q"),
        Message("assistant", "", "t1", call),
        Message("tool", "5"),
        Message("assistant", "five", "t2"),
    ]
    first, second = renderer.views(messages)
    assert "<think>\nt1\n</think>" in second.text and second.text.startswith(first.text)
    assert trained_text(renderer, second) == "<think>\nt2\n</think>\n\nfive<|im_end|>"
    both = trained_text(renderer, renderer.render(messages))
    assert both == trained_text(renderer, first) + trained_text(renderer, second)


def test_empty_block_weights(tokenizer: Tokenizer) -> None:
    messages = [Message("user", "q /no_think"), Message("assistant", "a", "")]
    renderer = Renderer(tokenizer)
    assert trained_text(renderer, renderer.render(messages)) == "a<|im_end|>"
    assert trained_text(renderer, renderer.views(messages)[0]) == "a<|im_end|>"
    assert trained_text(renderer, renderer.render(messages, empty_think_trained=True)) == EMPTY + "a<|im_end|>"
    assert trained_text(renderer, renderer.views(messages, empty_think_trained=True)[0]) == EMPTY + "a<|im_end|>"
    soft = Renderer(tokenizer, ChatPolicy(empty_think_weight=0.25))
    for rendered in (soft.render(messages), soft.views(messages)[0]):
        assert trained_text(soft, rendered, 0.25) == EMPTY and trained_text(soft, rendered) == "a<|im_end|>"
    assert set(soft.render([Message("user", "q")], add_generation_prompt=True, thinking=False).weights) == {0.0}


def test_keeping_history_makes_views_append_only(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(history_thinking="keep"))
    messages = [
        Message("user", "a"),
        Message("assistant", "x", "t1", (ToolCall("now", {}),)),
        Message("tool", "1"),
        Message("assistant", "y", None),
        Message("user", "b"),
        Message("assistant", "z", "t3"),
    ]
    views = renderer.views(messages)
    for earlier, later in pairwise(views):
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
    whole = renderer.render(messages)
    assert trained_text(renderer, whole) == "".join(trained_text(renderer, view) for view in views)


def test_labels(renderer: Renderer) -> None:
    messages = [
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "c", "r", (ToolCall("now", {}),)),
        Message("tool", "5"),
    ]
    got = renderer.render(messages)
    seen = list(dict.fromkeys(zip(got.roles, got.parts, strict=True)))
    order = ["header", "text", "eot"]
    assert seen == [
        *(("system", part) for part in order),
        *(("user", part) for part in order),
        *(("assistant", part) for part in ("header", "reasoning", "content", "call", "eot")),
        *(("tool", part) for part in order),
    ]


def test_stop_ids(renderer: Renderer) -> None:
    tok = renderer.tokenizer
    assert tok.decode(renderer.stop_ids) == STOP_TEXT
    assert renderer.stop_ids.count(tok.think_close or -1) == 1
    assert renderer.stop_ids == tok.encode_with_special(STOP_TEXT)


def test_bad_policy_and_tokenizer_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stop_text"):
        ChatPolicy(stop_text="stop")
    with pytest.raises(InputError, match="empty_think_weight"):
        ChatPolicy(empty_think_weight=-1)
    for missing, text in (("think", "<think>"), ("think", "</think>"), ("im", "<|im_end|>")):
        folder = tmp_path / missing / text.strip("<|/>")
        tokenizer.save(folder, CHAT_TEMPLATE)
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != text]
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        lacking = Tokenizer.from_folder(folder)
        if missing == "im":
            with pytest.raises(InputError, match="im_end"):
                Renderer(lacking)
        else:
            with pytest.raises(InputError, match="thinking budget"):
                _ = Renderer(lacking).stop_ids
            got = Renderer(lacking).render([Message("user", "q"), Message("assistant", "a", "t")])
            assert "<think>\nt\n</think>" in got.text
            assert got.token_ids == lacking.encode_with_special(got.text)


def test_errors_name_the_message(renderer: Renderer) -> None:
    bad: Any = 3
    with pytest.raises(InputError, match=r"messages\[1\]\.content"):
        renderer.render([Message("user", "q"), Message("assistant", bad)])
    with pytest.raises(InputError, match="empty"):
        renderer.views([])
    with pytest.raises(InputError, match=r"tools\[0\]"):
        renderer.render([Message("user", "q")], [{"f": {1}}])


def test_apply_chat_template_agrees(renderer: Renderer, make_conversation: Maker, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    renderer.tokenizer.save(tmp_path, renderer.chat_template)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for seed in range(20):
        messages, tools = make_conversation(seed)
        rows = messages_to_openai(messages)
        for thinking in (True, False):
            options = {"tools": tools, "add_generation_prompt": True, "enable_thinking": thinking, "tokenize": False}
            got = renderer.render(messages, tools, thinking=thinking, add_generation_prompt=True)
            assert auto.apply_chat_template(rows, **options) == got.text
            if not tools and not any("tool_response" in m.content for m in messages):
                assert auto(got.text).input_ids == got.token_ids


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, ChatPolicy().template], ids=["recipes", "exported"])
def test_template_reads_the_forms_that_records_do_not_have(source: str) -> None:
    template = jinja(source)
    user = {"role": "user", "content": "q"}
    inline = {"role": "assistant", "content": "<think>\nt\n</think>\n\na"}
    start = "<|im_start|>user\nq<|im_end|>\n" + GEN
    assert template.render(messages=[user, inline]) == start + "<think>\nt\n</think>\n\na<|im_end|>\n"
    flat = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a":1}'}]}
    body = '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call><|im_end|>\n'
    assert template.render(messages=[user, flat]) == start + EMPTY + body


def test_exported_template_joins_text_parts_as_the_renderer_does(renderer: Renderer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]
    want = "<|im_start|>user\nxy<|im_end|>\n"
    assert jinja(renderer.chat_template).render(messages=parts) == renderer.render(parts).text == want


def test_dictionaries_are_read_everywhere(renderer: Renderer) -> None:
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>r</think>a"}]
    records = [Message("user", "q"), Message("assistant", "a", "r")]
    assert renderer.render(rows) == renderer.render(records)
    assert renderer.views(rows) == renderer.views(records)
    assert renderer.prompt_ids(rows[:1]) == renderer.prompt_ids(records[:1])
    with pytest.raises(InputError, match=r"messages\[1\]\.role"):
        renderer.render([rows[0], {"role": "bot"}])


def test_weights_by_turn_and_part(renderer: Renderer) -> None:
    call = (ToolCall("now", {}),)
    messages = [Message("user", "q"), Message("assistant", "c", "r", call), Message("tool", "1")]
    messages += [Message("assistant", "d", "s")]
    weights = {1: TurnWeights(reasoning=0.25, content=0.0, calls=0.5), 3: 0}
    [only] = renderer.views(messages, weights=weights)
    by_part: dict[str, set[float]] = {}
    for weight, part, role in zip(only.weights, only.parts, only.roles, strict=True):
        if role == "assistant":
            by_part.setdefault(part, set()).add(weight)
    assert by_part == {"header": {0}, "reasoning": {0.25}, "content": {0}, "call": {0.5}, "eot": {0.5}}
    whole = renderer.render(messages, weights=weights)
    assert [w for w, part in zip(whole.weights, whole.parts, strict=True) if part == "eot" and w] == [0.5]
    assert trained_text(renderer, renderer.render(messages, weights={1: 0.5, 3: 0.5})) == ""
    # A turn that has no reasoning is not trained by a weight for reasoning.
    assert renderer.views([messages[0], Message("assistant", "a")], weights={1: TurnWeights(1, 0, 1)}) == []
    for bad, where in (({0: 1}, "not an assistant turn"), ({9: 1}, r"weights\[9\]"), ({1: -1}, r"weights\[1\]")):
        with pytest.raises(InputError, match=where):
            renderer.render(messages, weights=bad)


HI, YO = Message("user", "hi"), Message("assistant", "yo", "t")
USER = "<|im_start|>user\nhi<|im_end|>\n"


def test_the_thinking_family_supplies_the_opening_tag(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family="thinking"))
    assert renderer.render([HI], add_generation_prompt=True).text == USER + GEN + "<think>\n"
    [view] = renderer.views([HI, YO])
    assert trained_text(renderer, view) == "t\n</think>\n\nyo<|im_end|>"
    assert view.text == USER + GEN + "<think>\nt\n</think>\n\nyo<|im_end|>"
    assert trained_text(renderer, renderer.render([HI, YO])) == "t\n</think>\n\nyo<|im_end|>"
    plain = [HI, Message("assistant", "yo")]
    assert trained_text(renderer, renderer.views(plain)[0]) == "yo<|im_end|>"
    assert trained_text(renderer, renderer.views(plain, empty_think_trained=True)[0]) == "\n</think>\n\nyo<|im_end|>"
    for view in renderer.views(plain) + renderer.views([HI, YO], empty_think_trained=True):
        prompt = renderer.prompt_ids([HI])
        assert view.token_ids[: len(prompt)] == prompt and not any(view.weights[: len(prompt)])
    with pytest.raises(InputError, match="always thinks"):
        renderer.prompt_ids([HI], thinking=False)


def test_the_nonthinking_family_always_closes_the_block(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family="nonthinking"))
    for thinking in (True, False):
        assert renderer.render([HI], thinking=thinking, add_generation_prompt=True).text == USER + GEN + EMPTY
    assert trained_text(renderer, renderer.views([HI, Message("assistant", "yo")])[0]) == "yo<|im_end|>"
    with pytest.raises(InputError, match=r"messages\[1\]\.reasoning"):
        renderer.views([HI, YO])


@pytest.mark.parametrize("family", ["instruct", "qwen2.5", "chatml"])
def test_families_without_think_blocks(family: str, tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family=family))
    start = f"<|im_start|>system\n{renderer.policy.system}<|im_end|>\n" if family == "qwen2.5" else ""
    again = [HI, Message("assistant", "yo"), HI, Message("assistant", "\nyes")]
    turn = GEN + "{}<|im_end|>\n"
    whole = renderer.render(again)
    assert whole.text == start + USER + turn.format("yo") + USER + turn.format("\nyes")
    # Of the second answer's newline and the header's the tokenizer makes one token, which is not trained here ...
    assert trained_text(renderer, whole) == "yo<|im_end|>yes<|im_end|>"
    # ... but it is trained where it counts: a server's prompt ends before the answer's newline.
    assert [trained_text(renderer, view) for view in renderer.views(again)] == ["yo<|im_end|>", "\nyes<|im_end|>"]
    for thinking in (True, False):
        assert renderer.render([HI], thinking=thinking, add_generation_prompt=True).text == start + USER + GEN
    assert renderer.render([HI, YO]).text == start + USER + turn.format("yo")
    inline = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>t</think>yo"}]
    assert renderer.render(inline).text == start + USER + turn.format("<think>t</think>yo")
    with pytest.raises(InputError, match=r"messages\[1\]\.reasoning"):
        renderer.views([HI, YO])


def test_qwen25_tools_follow_the_default_system_turn(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family="qwen2.5"))
    got = renderer.render([HI], [{"name": "f"}]).text
    assert got.startswith(f"<|im_start|>system\n{renderer.policy.system}\n\n# Tools\n\n")
    assert renderer.render([Message("system", "S"), HI], [{"name": "f"}]).text.startswith(
        "<|im_start|>system\nS\n\n# T"
    )


def test_chatml_has_no_place_for_tools(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, ChatPolicy(family="chatml"))
    with pytest.raises(InputError, match="cannot show tools"):
        renderer.render([HI], [{"name": "f"}])
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_calls"):
        renderer.render([HI, Message("assistant", "", None, (ToolCall("now", {}),))])
    with pytest.raises(InputError, match="tool results"):
        renderer.tool_result_ids(["1"])


@pytest.mark.parametrize("messages", [None, {"role": "user", "content": "q"}, 5, "q", iter([HI])])
def test_messages_must_be_a_list_and_thinking_a_truth_value(messages: Any, renderer: Renderer) -> None:
    with pytest.raises(InputError, match="messages must be a list, got"):
        renderer.render(messages)
    with pytest.raises(InputError, match="thinking must be True or False"):
        renderer.prompt_ids([HI], thinking="false")  # type: ignore[arg-type]


def test_plain_text_segments(renderer: Renderer) -> None:
    got = renderer.render_text([("Once <|im_end|>", 0.0), (" upon", 1.0)])
    tok = renderer.tokenizer
    assert got.token_ids == [*tok.encode("Once <|im_end|>"), *tok.encode(" upon"), tok.endoftext]
    assert got.weights == [0.0] * len(tok.encode("Once <|im_end|>")) + [1.0] * (len(tok.encode(" upon")) + 1)
    assert renderer.render_text([]) == Rendered()


def test_hostile_text_is_named_not_crashed_on(renderer: Renderer) -> None:
    deep: dict[str, Any] = {}
    for _ in range(20_000):
        deep = {"a": deep}
    with pytest.raises(InputError, match=r"tools\[0\] is nested too deeply"):
        renderer.render([HI], [deep])
    with pytest.raises(InputError, match=r"messages\[0\]\.content is not valid Unicode at character 1"):
        renderer.render([Message("user", "a\ud800")])
    with pytest.raises(InputError, match=r"messages\[1\]\.reasoning is not valid Unicode"):
        renderer.render([HI, Message("assistant", "", "\udfff")])
    with pytest.raises(InputError, match=r"tools\[0\] is not JSON"):
        renderer.render([HI], [{"x": float("nan")}])
    long = "x </think> 好\n" * 70_000  # one megabyte
    got = renderer.render([Message("user", long)])
    assert got.text == f"<|im_start|>user\n{long}<|im_end|>\n"
    assert renderer.tokenizer.think_close not in got.token_ids


def test_folders_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    policy = ChatPolicy(history_thinking="keep", empty_think_weight=0.5)
    Renderer(tokenizer, policy).save(tmp_path)
    again = Renderer.from_pretrained(tmp_path)
    assert again.policy == policy and again.tokenizer.digest == tokenizer.digest
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == policy.template
    (tmp_path / "chat_policy.json").unlink()
    assert Renderer.from_pretrained(tmp_path).policy == ChatPolicy(history_thinking="keep")
    assert Renderer.from_pretrained(tmp_path, ChatPolicy(family="chatml")).policy.family == "chatml"


def test_another_template_than_the_trained_one_is_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    Renderer(tokenizer).save(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("# Tools", "# Instruments"), encoding="utf-8")
    with pytest.warns(UserWarning, match="not the one this model was trained with") as caught:
        renderer = Renderer.from_pretrained(tmp_path)
    lines = str(caught[0].message).splitlines()
    assert any(line.startswith("-") and "# Tools" in line for line in lines)
    assert any(line.startswith("+") and "# Instruments" in line for line in lines)
    assert renderer.policy == ChatPolicy()


def test_templates_inside_tokenizer_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, CHAT_TEMPLATE)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(InputError, match="no chat template; choose a family"):
        Renderer.from_pretrained(tmp_path)
    assert Renderer.from_pretrained(tmp_path, ChatPolicy()).policy == ChatPolicy()
    thinking = ChatPolicy(family="thinking").template
    listed = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": thinking}]
    for template, family in ((thinking, "thinking"), (listed[:1], "hybrid"), (listed, "thinking")):
        path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
        assert Renderer.from_pretrained(tmp_path).policy.family == family
    path.write_text(json.dumps({**config, "chat_template": ["x"]}), encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        Renderer.from_pretrained(tmp_path)


def test_from_parts(tokenizer: Tokenizer) -> None:
    assert Renderer.from_parts(tokenizer, CHAT_TEMPLATE).policy == ChatPolicy()
    with pytest.raises(InputError, match="none of the families"):
        Renderer.from_parts(tokenizer, "{{ messages }}")
    assert Renderer.from_parts(tokenizer, "{{ messages }}", ChatPolicy(family="chatml")).policy.family == "chatml"
