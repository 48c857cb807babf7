"""The web chat in headless Chromium: against the real server with tiny random models, and with scripted replies for
what a random model cannot be made to say (Markdown, attacks, tool calls, failures).

Every test also checks that no request left the server's origin and that the browser reported no error it should not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the web chat").expect

Chat = Any  # of conftest.py
DONE = ".turn.assistant:not([data-state=streaming])"


def slow_down(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on each token takes 15 ms, so that there is time to press keys while a reply streams."""
    engine = server.service.llm.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.015)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)


def lasting_seed(server: Any, text: str, tokens: int) -> int:
    """A seed whose thought about ``text`` goes on for so many tokens; a seed gives the page the same tokens."""
    for seed in range(100):
        reply = server.chat(text, seed=seed, max_tokens=tokens)
        if reply.usage.completion_tokens_details.reasoning_tokens == tokens:
            return seed
    raise AssertionError("no thought lasts that long")


def test_thought_streams_folds_and_stops(
    thinker: Any, monkeypatch: pytest.MonkeyPatch, chat_at: Callable[..., Chat]
) -> None:
    chat = chat_at(thinker, {"maxTokens": 800, "seed": lasting_seed(thinker, "sum E1 B5", 150)})
    page = chat.page
    slow_down(thinker, monkeypatch)
    chat.ask("sum E1 B5", wait=False)
    page.wait_for_selector(".thought[data-live=true][data-open=true]")
    tokens = "Number(document.querySelector('.thought-meta').textContent.match(/(\\d[\\d,]*) tokens/)?.[1] || 0)"
    before = page.evaluate(tokens)
    chat.wait(f"{tokens} > {before} + 5")
    assert re.search(r"\d+ tokens.*tokens/s", chat.text(".stats").replace("\n", " "))
    page.click(".thought-head")
    expect(page.locator(".thought-head")).to_have_attribute("aria-expanded", "false")
    assert page.locator(".thought-text").evaluate("node => node.inert")
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-state=stopped]")
    thinker.wait_until_idle()
    assert "stopped" in chat.text(".mark-line")
    assert chat.text(".thought-label").startswith("Thought interrupted after ")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert page.locator(".segments[data-name=mode]").count() == 0, "this model has no switch"


def test_budget_is_sent_and_the_forced_stop_marked(thinker: Any, chat_at: Callable[..., Chat]) -> None:
    seed = lasting_seed(thinker, "sum E1 B5", 40)
    chat = chat_at(thinker, {"maxTokens": 90, "seed": seed})
    page = chat.page
    slider = page.locator(".budget input")
    slider.press("Home")
    slider.press("ArrowRight")
    assert chat.text(".budget output") == "16 tokens"
    chat.ask("sum E1 B5")
    assert chat.bodies[-1]["thinking_budget"] == 16 and chat.bodies[-1]["seed"] == seed
    assert "enable_thinking" not in chat.bodies[-1]
    assert chat.text(".thought-label") == "Thought for 16 tokens"
    expect(page.locator(".thought-marks .forced >> nth=0")).to_have_text("stopped at the budget")
    page.get_by_role("button", name="Token probabilities").click()
    text = page.locator(".tokens").text_content()
    assert "<|im_end|>" in text or page.locator(".mark-line").count(), "sampled control tokens are shown"
    assert page.locator(".tokens .token.forced").count() > 1
    assert page.locator(".tokens .token:not(.forced)").count() >= 16
    page.locator(".tokens .token").first.hover()
    assert page.locator(".token-card .token-row").count() == 5
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.current").get_attribute("data-index") == "1"


def test_modes_and_sampling_reach_the_server(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    page.click(".half-direct")
    expect(page.locator(".half-direct")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Alt+s")
    fields = {"temperature": "0.9", "top_k": "7", "min_p": "0.1", "presence_penalty": "0.5", "max_tokens": "6"}
    for name, value in fields.items():
        page.fill(f".field[data-field={name}] input[type=number]", value)
    page.fill("#system-prompt", "You count.")
    page.keyboard.press("Escape")
    chat.ask("sum E1 B5")
    body = chat.bodies[-1]
    assert body["enable_thinking"] is False and "thinking_budget" not in body
    assert {name: body[name] for name in fields} == {name: json.loads(value) for name, value in fields.items()}
    assert body["messages"][0] == {"role": "system", "content": "You count."}
    assert "top_p" not in body and "frequency_penalty" not in body, "what is not set is the checkpoint's business"
    assert re.match(r"\d tokens?", chat.text(".stats"))
    assert page.locator(".thought").count() == 0
    page.keyboard.press("Alt+m")
    chat.ask("again")
    assert "enable_thinking" not in chat.bodies[-1], "auto leaves it to the model"
    page.keyboard.press("Alt+m")
    chat.ask("again")
    assert chat.bodies[-1]["enable_thinking"] is True and "temperature" not in chat.bodies[-1]


def test_what_the_server_says_about_its_model_is_shown(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    """Defaults of each mode where nothing is set, examples of what it can do, and no switch where it has none."""
    card = hybrid.client.models.retrieve(hybrid.name).to_dict()
    card |= {"defaults": {"on": {"temperature": 0.6}, "off": {"temperature": 0.7}}, "about": {"can": ["sum E1"]}}
    silent = {**card, "capabilities": {"thinking": False, "thinking_switch": False, "thinking_budget": False}}
    chat = chat_at(hybrid)
    page = chat.page
    for entry in (card, silent):
        page.unroute("**/v1/models")
        page.route("**/v1/models", lambda route, _, entry=entry: route.fulfill(json={"data": [entry]}))
        page.reload()
        page.wait_for_selector(".example")
        page.keyboard.press("Alt+s")
        temperature = page.locator("[data-field=temperature] input[type=number]")
        if entry is card:
            expect(temperature).to_have_attribute("placeholder", "0.6")
            page.locator(".settings").get_by_role("radio", name="Direct").check()
        expect(temperature).to_have_attribute("placeholder", "0.7")
        page.keyboard.press("Escape")
        page.click(".example")
        expect(page.locator("#message")).to_have_value("sum E1")
    assert page.locator(".composer .segments, .composer .budget").count() == 0
    chat.script("fine")
    page.press("#message", "Enter")
    page.wait_for_selector("text=fine")
    assert not {"enable_thinking", "thinking_budget"} & set(chat.bodies[-1])


def test_the_servers_own_words_on_a_refusal(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    chat.ask("word " * 5000)
    assert "did not accept the request" in chat.text(".error")
    assert "this model's maximum context length is" in chat.text(".error-detail")


def test_edit_branches_and_reload(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    chat.script("first answer", "second answer", "third answer")
    chat.ask("first question")
    page.hover(".turn.user")
    page.get_by_role("button", name="Edit").click()
    page.fill(".editor textarea", "second question")
    page.press(".editor textarea", "Enter")
    page.wait_for_selector("text=second answer")
    assert [message["content"] for message in chat.bodies[-1]["messages"]] == ["second question"]
    page.get_by_role("button", name="Answer again").click()
    page.wait_for_selector("text=third answer")
    assert chat.text(".assistant .branches") == "2 / 2"
    page.locator(".user").get_by_role("button", name="Previous branch").click()
    assert chat.text(".user .bubble") == "first question" and "first answer" in chat.text(".answer")
    page.locator(".user").get_by_role("button", name="Next branch").click()
    page.locator(".assistant").get_by_role("button", name="Previous branch").click()
    page.fill("#message", "half a thou")
    page.hover(".turn.user")
    page.get_by_role("button", name="Edit").click()
    page.fill(".editor textarea", "half an edit")
    page.reload()
    page.wait_for_selector(".editor")
    assert page.input_value(".editor textarea") == "half an edit"
    assert page.input_value("#message") == "half a thou"
    assert "second answer" in chat.text(".answer") and chat.text(".assistant .branches") == "1 / 2"


def test_a_reply_cut_by_a_reload_is_kept(
    thinker: Any, monkeypatch: pytest.MonkeyPatch, chat_at: Callable[..., Chat]
) -> None:
    chat = chat_at(thinker, {"maxTokens": 800, "seed": lasting_seed(thinker, "sum E1", 120)})
    slow_down(thinker, monkeypatch)
    chat.ask("sum E1", wait=False)
    chat.wait("document.querySelector('.thought-text')?.textContent.length > 20")
    chat.page.reload()
    chat.page.wait_for_selector("[data-state=interrupted]")
    thinker.wait_until_idle()
    chat.page.click(".thought-head")
    assert len(chat.text(".thought-text")) > 10
    assert "interrupted" in chat.text(".mark-line")


def test_theme_and_language(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("radio", name="Dark").check()
    assert page.evaluate(paper) != light
    page.get_by_role("radio", name="中文").check()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.reload()
    page.wait_for_selector(".opening")
    assert "一个模型，两种模式" in chat.text(".opening")
    assert page.evaluate(paper) != light
    assert page.get_attribute("#message", "placeholder") == "输入问题"


def test_the_browsers_language_and_theme_come_first(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid, locale="zh-CN", color_scheme="dark")
    assert "新对话" in chat.text(".new-chat")
    assert chat.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 22)"


WIDE = f"""# A heading
`a_very_long_piece_of_code_without_any_place_to_break_it_{"x" * 80}`

| one | two | three | four | five | six | seven |
|-----|-----|-------|------|------|-----|-------|
| {"y" * 40} | b | c | d | e | f | g |

```python
print("{"z" * 120}")
```

$$x = {"+".join("abcdefghij" * 8)}$$

https://example.org/{"w" * 90}
"""


def test_a_narrow_phone_never_scrolls_sideways(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid, viewport={"width": 360, "height": 740}, has_touch=True)
    page = chat.page

    def fits(state: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, state
        assert page.evaluate("document.querySelector('.scroll').scrollWidth <= innerWidth"), state
        edges = page.locator(".center button:visible, .center textarea:visible").evaluate_all(
            "nodes => nodes.map((node) => node.getBoundingClientRect().right)"
        )
        assert max(edges) <= 360.5, state

    fits("empty")
    chat.script(WIDE, (429, "full", {"Retry-After": "3"}))
    chat.ask("x" * 300)
    fits("answer")
    page.get_by_role("button", name="Token probabilities").click()
    fits("probabilities")
    chat.ask("again")
    fits("error")
    page.get_by_role("button", name="Settings").tap()
    fits("settings")
    page.locator(".settings header button").tap()
    page.get_by_role("button", name="Conversation list").tap()
    expect(page.locator(".sidebar")).to_be_visible()
    fits("list")


ATTACK = """<script>window.hurt = 1</script>
<img src=x onerror="window.hurt = 2"> <iframe src="javascript:parent.hurt=3"></iframe>
[press](javascript:window.hurt=4) [data](data:text/html,<script>window.hurt=5</script>) <javascript:hurt>
<svg onload=hurt()>
![picture](https://evil.example/pixel.png) <a href="javascript:hurt" onclick="hurt()">x</a>
[good](https://example.org/ok)

| <b onmouseover=hurt()>cell</b> | two |
|---|---|
| <style>*{display:none}</style> | `<script>hurt()</script>` |

```html"><script>window.hurt = 6</script>
</code></pre><script>window.hurt = 7</script>
```

$\\href{javascript:hurt}{x}$ $\\text{<img src=x onerror=hurt()>}$ $$<script>hurt()</script>$$
"""


def test_what_a_model_writes_cannot_become_markup(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    call = {"index": 0, "id": "c", "function": {"name": "<img src=x onerror=hurt()>", "arguments": ATTACK}}
    entry = {"token": "<img src=x onerror=hurt()>", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    chat.script(
        [
            chat.chunk({"reasoning_content": ATTACK}),
            chat.chunk({"content": ATTACK, "tool_calls": [call]}, logprobs={"content": [entry]}),
            chat.chunk({}, "tool_calls"),
        ],
        (500, ATTACK, {}),
    )
    chat.ask(ATTACK)
    page.click(".thought-head")
    page.get_by_role("button", name="Token probabilities").click()
    page.hover(".tokens .token")
    page.get_by_role("button", name="Token probabilities").click()
    chat.ask("again")
    found = page.evaluate(
        """() => {
          const inside = (selector) => document.querySelectorAll(`#app ${selector}`).length;
          const forbidden = ["script", "img", "iframe", "style", "svg:not(.icon, .mark)", "object", "form"];
          const nodes = [...document.querySelectorAll("#app *")];
          return {
            hurt: window.hurt ?? null,
            elements: forbidden.filter(inside),
            handlers: nodes.flatMap((node) => [...node.attributes]).filter(({ name }) => name.startsWith("on")).length,
            links: [...new Set([...document.querySelectorAll(".turn a")].map(({ href }) => href))].sort(),
          };
        }"""
    )
    links = ["https://evil.example/pixel.png", "https://example.org/ok"]
    assert found == {"hurt": None, "elements": [], "handlers": 0, "links": links}
    assert "<script>window.hurt = 1</script>" in chat.text(".answer >> nth=0"), "shown as it was written"
    page.reload()
    page.wait_for_selector(".turn")
    assert page.evaluate("window.hurt ?? null") is None


def test_the_policy_of_the_page_is_strict(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    """Even a hole in the renderer could not run anything: no inline script, no HTML from strings."""
    chat = chat_at(hybrid)
    page = chat.page
    caught = """() => {
      const script = document.createElement("script");
      try { script.text = "window.hurt = 1"; } catch { return "refused"; }
      document.body.append(script);
      return window.hurt ?? "blocked";
    }"""
    assert page.evaluate(caught) == "refused"
    assert page.evaluate("() => { try { document.body.innerHTML = '<p>'; } catch { return 'refused'; } }") == "refused"
    assert page.locator(".opening").count() == 1
    assert len(chat.errors) == 4, "each is refused by the header and by the page"
    assert all("Trusted" in error for error in chat.errors)
    chat.errors.clear()


HALF = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
FAILURES: list[tuple[Any, str]] = [
    ((429, "the queue is full", {"Retry-After": "7"}), "Try again in 7 s"),
    ((503, "stopping", {}), "starting or shutting down"),
    ((401, "bad key", {}), "asks for an API key"),
    ((413, "too big", {}), "larger than the server takes"),
    ((500, "oops", {}), "The server failed"),
    ("offline", "cannot be reached"),
    ("half an ans<CUT>", "connection broke"),
    ([HALF, {"error": {"message": "out of memory", "type": "server_error"}}], "out of memory"),
]


def test_failures_in_plain_words_with_retry(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    for number, (failure, words) in enumerate(FAILURES):
        chat.page.keyboard.press("Alt+n")
        chat.script(failure, f"now it works {number}")
        chat.ask("hello")
        assert words in chat.text(".error")
        if not isinstance(failure, tuple) and failure != "offline":
            assert "half" in chat.text(".answer"), "what had arrived is kept"
        chat.page.get_by_role("button", name="Try again").click()
        chat.page.wait_for_selector(f"text=now it works {number}")
        assert chat.page.locator(".error").count() == 0
        assert chat.page.locator(".turn").count() == 2
        assert [message["content"] for message in chat.bodies[-1]["messages"]] == ["hello"]


def test_a_key_is_asked_for_and_used(served_folder: Path, serving: Any, chat_at: Callable[..., Chat]) -> None:
    with serving(served_folder, api_keys=("secret",)) as server:
        chat = chat_at(server, {"maxTokens": 12})
        assert "asks for an API key" in chat.text(".server-notice")
        chat.page.locator(".server-notice").get_by_role("button", name="Settings").click()
        chat.page.fill("input[type=password]", "secret")
        chat.page.press("input[type=password]", "Enter")
        chat.page.wait_for_selector(f".top small >> text={server.name}")
        assert chat.page.locator(".server-notice .error").count() == 0
        chat.page.keyboard.press("Escape")
        chat.ask("sum E1")
        assert chat.page.locator(".turn .error").count() == 0


def test_tool_calls_as_cards(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    """The calculator runs in the page; the result of any other tool is typed by the reader."""
    weather = json.dumps([{"type": "function", "function": {"name": "weather"}}])
    chat = chat_at(hybrid, {"calculator": True, "tools": weather})
    page = chat.page

    def call(name: str, *fragments: str) -> list[dict[str, Any]]:
        head = {"index": 0, "id": f"id-{name}", "type": "function", "function": {"name": name, "arguments": ""}}
        rest = [{"index": 0, "function": {"arguments": fragment}} for fragment in fragments]
        return [*(chat.chunk({"tool_calls": [part]}) for part in [head, *rest]), chat.chunk({}, "tool_calls")]

    chat.script(call("calc", '{"expression": ', '"37*48"}'), call("weather", '{"city": "Oslo"}'), "It rains.")
    chat.ask("37*48 and the weather?", wait=False)
    field = page.get_by_label("Result: weather")
    field.fill("rain")
    page.reload()
    assert field.input_value() == "rain", "half-typed results survive"
    assert "1776" in chat.text(".call-result pre")
    assert [tool["function"]["name"] for tool in chat.bodies[0]["tools"]] == ["calc", "weather"]
    result = chat.bodies[1]["messages"][-1]
    assert result == {"role": "tool", "tool_call_id": "id-calc", "content": "1776"}
    chat.script("It rains.")
    page.get_by_role("button", name="Send result").click()
    page.wait_for_selector("text=It rains.")
    assert [message["role"] for message in chat.bodies[-1]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert chat.bodies[-1]["messages"][3]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


def test_keyboard(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    chat.script("one", "two")
    field = page.locator("#message")
    field.fill("你好")
    enter = {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True}
    field.dispatch_event("keydown", enter)
    assert page.locator(".turn").count() == 0, "Enter belongs to the input method"
    field.press("Shift+Enter")
    field.type("second line")
    assert field.input_value() == "你好\nsecond line"
    field.press("Enter")
    page.wait_for_selector(f"{DONE} >> text=one")
    field.press("ArrowUp")
    expect(page.locator(".editor textarea")).to_be_focused()
    page.keyboard.press("Escape")
    page.locator(".top b").click()
    page.keyboard.press("/")
    expect(field).to_be_focused()
    page.keyboard.press("Alt+n")
    assert page.locator(".opening").count() == 1
    field.blur()
    page.keyboard.press("?")
    expect(page.locator(".key-list")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".settings")).to_be_hidden()
    expect(page.locator(".settings-button")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "keyboard focus is visible"
    assert (
        page.locator("button:not([aria-label])").evaluate_all(
            "buttons => buttons.filter((button) => !button.textContent.trim()).length"
        )
        == 0
    ), "every button has a name"


def test_conversations_are_managed(hybrid: Any, chat_at: Callable[..., Chat], tmp_path: Path) -> None:
    chat = chat_at(hybrid)
    page = chat.page
    chat.script("alpha", "beta")
    chat.ask("first talk")
    page.get_by_role("button", name="New conversation").first.click()
    chat.ask("second talk")
    names = page.locator(".chat-name span")
    assert names.all_inner_texts() == ["second talk", "first talk"]
    page.locator(".chat-list li").last.hover()
    page.locator(".chat-list li").last.get_by_role("button", name="Rename").click()
    page.locator(".chat-list input").fill("renamed")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["second talk", "renamed"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export all").click()
    saved = tmp_path / "chats.json"
    waiting.value.save_as(saved)
    page.locator(".chat-list li").last.hover()
    page.locator(".chat-list li").last.get_by_role("button", name="Delete").click()
    assert names.all_inner_texts() == ["second talk"]
    page.get_by_role("button", name="Undo").click()
    assert sorted(names.all_inner_texts()) == ["renamed", "second talk"]
    page.locator("input[type=file]").set_input_files(saved)
    chat.wait("document.querySelectorAll('.chat-list li').length === 4")
    page.reload()
    page.wait_for_selector(".turn")
    assert sorted(names.all_inner_texts()) == ["renamed", "renamed", "second talk", "second talk"]
    for content, words in [("{", "not JSON"), ("{}", "not an export"), (json.dumps(BROKEN), "damaged")]:
        saved.write_text(content, encoding="utf-8")
        page.locator("input[type=file]").set_input_files(saved)
        page.wait_for_selector(f".toast >> text={words}")
    assert names.count() == 4


BROKEN = {"kind": "twofold-conversations", "conversations": [{"nodes": {"a": {"kids": ["a"]}}, "kids": ["a"]}]}
