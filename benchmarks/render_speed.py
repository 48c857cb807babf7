"""How long rendering takes beyond encoding.

    python -m benchmarks.render_speed FOLDER [--rounds 50] [--out FILE]

FOLDER holds a tokenizer.json and a chat template (the official Qwen3 files for the published figures). Rendering: one
conversation of 20 turns (10 user, 10 assistant with reasoning), once with all its texts already encoded, which leaves
our own part, and once as it is, beside one call of the tokenizers library on the whole text. Sides take turns; medians
count. Encoding itself is measured in ``parse_speed``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from twofold.base.files import write_json
from twofold.base.records import Message
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer

WORDS = (
    *("the", "model", "reads", "a", "long", "question", "about", "trains,", "rivers", "and", "12", "numbers;"),
    *("then", "it", "answers:", "naïve,", "世界,", "x", "=", "3*y\n"),
)


class Remembering:
    """A tokenizer that encodes every text once: with it, rendering costs everything but encoding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.control_id = tokenizer.control_id
        self.encode = cache(tokenizer.encode)
        self.encode_with_offsets = cache(tokenizer.encode_with_offsets)


def prose(rng: random.Random, words: int) -> str:
    """Text of about the given number of words."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def conversation(turns: int = 20) -> list[Message]:
    """User and assistant in turn; assistant turns carry reasoning."""
    rng = random.Random(0)
    messages = []
    for number in range(turns):
        if number % 2:
            messages.append(Message("assistant", prose(rng, 60), prose(rng, 60)))
        else:
            messages.append(Message("user", prose(rng, 40)))
    return messages


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if round_number:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def rendering(renderer: Renderer, library: tokenizers.Tokenizer, rounds: int) -> dict[str, float]:
    """Rendering a 20-turn conversation against encoding its text once."""
    messages = conversation()
    remembering = Renderer(Remembering(renderer.tokenizer), renderer.policy)  # type: ignore[arg-type]
    rendered = renderer.render(messages)
    assert rendered.token_ids == library.encode(rendered.text, add_special_tokens=False).ids
    sides = {
        "render": lambda: renderer.render(messages),
        "encode": lambda: library.encode(rendered.text, add_special_tokens=False).ids,
        "ours": lambda: remembering.render(messages),
        "views": lambda: renderer.views(messages),
    }
    found = medians(sides, rounds)
    return {
        "tokens": len(rendered.token_ids),
        "render_ms": round(found["render"], 3),
        "encode_ms": round(found["encode"], 3),
        "beyond_encoding_ms": round(found["ours"], 3),
        "ten_views_ms": round(found["views"], 3),
    }


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    renderer = Renderer.from_pretrained(arguments.folder)
    library = tokenizers.Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    results = rendering(renderer, library, arguments.rounds)
    print(json.dumps(results, indent=1))
    if arguments.out:
        facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        write_json(arguments.out, {**facts, "tokenizers": tokenizers.__version__, **results})


if __name__ == "__main__":
    main()
