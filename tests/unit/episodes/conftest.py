"""A small trained tokenizer and an engine that replays written turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from twofold.base.records import Completion, Request
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer


@dataclass
class ScriptedEngine:
    """Answers every request with the next turn of its script; remembers what it was asked.

    A turn is text of the program's own spelling (control tokens included); without ``<|im_end|>`` it counts as cut
    off. The k-th token of a turn gets log-probability -(k + 1) / 10.
    """

    tokenizer: Tokenizer
    turns: list[str]
    calls: list[list[Request]] = field(default_factory=list)
    forced_text: str = ""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append(list(requests))
        out = []
        for index, request in enumerate(requests):
            for sample in range(request.params.n):
                text = self.turns.pop(0)
                ids = self.tokenizer.encode_with_special(text)
                forced_ids = self.tokenizer.encode_with_special(self.forced_text) if self.forced_text in text else []
                at = next(
                    (i for i in range(len(ids)) if forced_ids and ids[i : i + len(forced_ids)] == forced_ids), len(ids)
                )
                out.append(
                    Completion(
                        request_index=index,
                        sample_index=sample,
                        token_ids=ids,
                        logprobs=[-(k + 1) / 10 for k in range(len(ids))],
                        forced=[at <= k < at + len(forced_ids) for k in range(len(ids))],
                        entropies=[0.5] * len(ids),
                        finish_reason="stop" if text.endswith("<|im_end|>") else "length",
                        thinking_tokens=2,
                    )
                )
        return out


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["sum mod 10: E1 B5 calc 37*48 find 0123456789 user assistant system"] * 4, 330)


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., ScriptedEngine]:
    return lambda *turns, forced_text="": ScriptedEngine(tokenizer, list(turns), forced_text=forced_text)
