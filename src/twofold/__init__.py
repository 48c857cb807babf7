"""Twofold: one model with two modes, thinking and not thinking, from raw text to served chat.

The names below load when they are first used, so that ``import twofold`` waits for nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twofold.base.records import Message, SamplingParams
    from twofold.llm import LLM
    from twofold.text.chat import Renderer
    from twofold.text.parse import StreamParser

__version__ = "0.1.0"
__all__ = ["LLM", "Message", "Renderer", "SamplingParams", "StreamParser"]

_HOMES = {
    "LLM": "twofold.llm",
    "Message": "twofold.base.records",
    "Renderer": "twofold.text.chat",
    "SamplingParams": "twofold.base.records",
    "StreamParser": "twofold.text.parse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twofold' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
