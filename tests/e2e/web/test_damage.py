"""The web chat with stored conversations that cannot be shown. Not here: what an import takes (``test_modules.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Chat = Any  # of conftest.py

POISON = """const trim = String.prototype.trim;
String.prototype.trim = function () {
  if (`${this}` === "poison") throw new Error("no such text");
  return trim.call(this);
};"""


def test_a_conversation_that_cannot_be_drawn_leaves_no_blank_page(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    """Nothing known is left that cannot be drawn, so the browser is made to fail at one."""
    chat = chat_at(hybrid)
    page = chat.page
    chat.script("poison", "fine")
    chat.ask("first talk")
    page.add_init_script(POISON)
    page.reload()
    page.wait_for_selector(".toast >> text=cannot be shown: first talk")
    assert page.locator(".opening").count() == 1
    assert page.locator(".chat-name span").all_inner_texts() == ["first talk"]
    chat.script("fine")
    chat.ask("second talk")
    page.locator(".chat-list li").last.hover()
    page.locator(".chat-list li").last.get_by_role("button", name="Delete").click()
    assert page.locator(".chat-name span").all_inner_texts() == ["second talk"]
    assert [error for error in chat.errors if "no such text" in error], "what happened is in the console"
    chat.errors.clear()


def test_damaged_conversations_are_shown(hybrid: Any, chat_at: Callable[..., Chat]) -> None:
    """As older versions of the page imported and stored them."""
    chat = chat_at(hybrid)
    page = chat.page
    failed = {"role": "assistant", "kids": [], "content": "x", "state": "error", "error": {"kind": "foo"}}
    raw = {
        "id": "abc", "title": "damaged", "updated": 1e300, "kids": ["u"],
        "nodes": {
            "u": {"role": "user", "kids": ["a"], "content": "q"},
            "a": {**failed, "tokens": [["a", -1]], "stats": {"budget": 0.5, "reasoning": 1e308}},
        },
    }  # fmt: skip
    page.evaluate("([key, text]) => localStorage.setItem(key, text)", ["twofold.chat.abc", json.dumps(raw)])
    page.evaluate("localStorage.setItem('twofold.open', 'abc')")
    page.reload()
    page.wait_for_selector(".turn.assistant >> text=The server failed.")
    assert page.locator(".chat-name span").all_inner_texts() == ["damaged"]
    page.get_by_role("button", name="Token probabilities").click()
    page.locator(".tokens .token").first.hover()
    assert page.locator(".token-card .token-head").count() == 1
