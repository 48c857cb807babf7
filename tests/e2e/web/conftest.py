"""A browser for tests of the web chat, and one page of it with what it asked for and complained about.

Where Chromium is installed a skipped test is a failure: it would be taken for one that passed. Not here: tests, and
servers (the conftest above).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

API = "**/v1/chat/completions"
DONE = ".turn.assistant:not([data-state=streaming])"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return no_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return no_skips((yield))


def no_skips(report: Any) -> Any:
    """A report in which a skip is a failure, where the browser is there."""
    if report.skipped and not hasattr(report, "wasxfail") and shutil.which("chromium"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped although Chromium is installed: {reason}"
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the web chat")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs the browser `chromium` (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


class Chat:
    """One page, with what it asked for and what the browser complained about."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.bodies: list[dict[str, Any]] = []
        self.strangers: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.base + "/", f"blob:{self.base}/")):
            self.strangers.append(request.url)
        if request.method == "POST":
            self.bodies.append(json.loads(request.post_data))

    def open(self) -> None:
        """Load the page and wait until it knows its model."""
        self.page.goto(self.base)
        self.page.wait_for_selector(".top small:not(:empty)")

    def ask(self, text: str, wait: bool = True) -> None:
        """Type a message and send it."""
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        if wait:
            self.page.wait_for_selector(f"{DONE}:last-child")

    def script(self, *replies: Any) -> None:
        """Answer the next requests with these: texts, lists of chunks, or (status, message, headers)."""
        left = list(replies)

        def answer(route: Any) -> None:
            reply = left.pop(0)
            if isinstance(reply, tuple):
                status, message, headers = reply
                body = json.dumps({"error": {"message": message, "type": "", "param": None, "code": None}})
                route.fulfill(status=status, body=body, headers={"Content-Type": "application/json", **headers})
            elif reply == "offline":
                route.abort("connectionrefused")
            else:
                route.fulfill(status=200, content_type="text/event-stream", body=stream(reply))

        self.page.unroute(API)
        self.page.route(API, answer)

    @staticmethod
    def chunk(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> dict[str, Any]:
        """One event of a stream, for ``script``."""
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **extra}]}

    def text(self, selector: str) -> str:
        """What is to be read there."""
        return self.page.locator(selector).inner_text()

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true. (The page's policy forbids the eval of wait_for_function.)"""
        end = time.monotonic() + 20
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"still not true: {expression}"
            self.page.wait_for_timeout(20)


def stream(reply: str | list[dict[str, Any]], finished: bool = True) -> str:
    """Server-sent events of a reply: a text is answered after a short thought."""
    if isinstance(reply, str):
        finished = not reply.endswith("<CUT>")
        text = reply.removesuffix("<CUT>")
        reply = [
            Chat.chunk({"reasoning_content": "Let me think."}),
            Chat.chunk({"content": text}),
            Chat.chunk({}, "stop"),
        ]
    events = [f"data: {json.dumps(part)}\n\n" for part in (reply if finished else reply[:-1])]
    return "".join(events) + ("data: [DONE]\n\n" if finished else "")


@pytest.fixture
def chat_at(browser: Any) -> Iterator[Callable[..., Chat]]:
    """Opens the chat of a server in a fresh profile; ``prefs`` are settings it finds there."""
    chats: list[Chat] = []

    def make(server: Any, prefs: dict[str, Any] | None = None, **context: Any) -> Chat:
        options = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US", "color_scheme": "light"} | context
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(20_000)
        if prefs:
            stored = json.dumps(json.dumps(prefs))
            page.add_init_script(f"localStorage['twofold.prefs'] ||= {stored}")
        chat = Chat(page, server.base)
        chats.append(chat)
        chat.open()
        return chat

    yield make
    for chat in chats:
        assert chat.strangers == [], "a request left the origin"
        expected = re.compile(r"Failed to load resource: (the server responded with a status of|net::ERR)")
        assert [error for error in chat.errors if not expected.match(error)] == []
        chat.page.context.close()
