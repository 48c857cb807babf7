"""Speed of the stream parser, and of encoding against the bare ``tokenizers`` library.

    python -m benchmarks.parse_speed [--tokenizer FOLDER] [--rounds 15] [--out benchmarks/results/parse-speed.json]

FOLDER holds the official tokenizer.json or qwen.tiktoken; without it a small tokenizer is trained on the spot. The
parser gets a reply of a thought, an answer and tool calls, one token at a time as a server does, and at once. Encoding
runs in turn with the library on the same texts, whose tokenizer treats added tokens as usual; the median of per-round
ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from twofold.base.files import write_json
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.parse import ParseOptions, StreamParser, TextParser, parse, parse_text
from twofold.text.tokenizer import Tokenizer

CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "units": ["c", "f"]}}\n</tool_call>'
)


def prose() -> str:
    """About 400,000 characters of English that every Python has."""
    return "\n\n".join(pydoc_data.topics.topics.values())[:400_000]


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def median_speed(step: Callable[[], Any], amount: int, rounds: int) -> int:
    """Amount per second, from the median time."""
    step()
    return round(amount / statistics.median(timed(step) for _ in range(rounds)))


def parser_speeds(tokenizer: Tokenizer, text: str, rounds: int) -> dict[str, int]:
    """Tokens per second of one reply, read in each way."""
    calls = "\n".join([CALL] * 20)
    reply = f"<think>\n{text[:40_000]}\n</think>\n\n{text[40_000:60_000]}\n{calls}<|im_end|>"
    ids = tokenizer.encode_with_special(reply)
    prompt = tokenizer.encode_with_special("<|im_start|>assistant\n")

    def stream(options: ParseOptions) -> None:
        parser = StreamParser(tokenizer, prompt, options)
        for token in ids:
            parser.feed(token)
        parser.finish()

    def stream_text() -> None:
        parser = TextParser()
        for at in range(0, len(reply), 4):
            parser.feed(reply[at : at + 4])
        parser.finish()

    steps: dict[str, Callable[[], Any]] = {
        "stream_tokens": lambda: stream(ParseOptions()),
        "stream_tokens_early_calls": lambda: stream(ParseOptions(early_calls=True)),
        "stream_tokens_stop_strings": lambda: stream(ParseOptions(stop=("\nUser:", "STOP"))),
        "stream_text": stream_text,
        "whole_tokens": lambda: parse(tokenizer, ids, prompt),
        "whole_text": lambda: parse_text(reply),
    }
    return {name: median_speed(step, len(ids), rounds) for name, step in steps.items()}


def encode_speeds(tokenizer: Tokenizer, bare: tokenizers.Tokenizer, text: str, rounds: int) -> dict[str, Any]:
    """Ours over theirs, in time, on single texts and on a batch."""
    texts = [text[at : at + 2000] for at in range(0, len(text), 2000)]
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode": (
            lambda: [tokenizer.encode(piece) for piece in texts],
            lambda: [bare.encode(piece, add_special_tokens=False).ids for piece in texts],
        ),
        "encode_batch": (
            lambda: tokenizer.encode_batch(texts),
            lambda: [encoding.ids for encoding in bare.encode_batch_fast(texts, add_special_tokens=False)],
        ),
    }
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    results = {}
    for name, (ours, theirs) in pairs.items():
        ours(), theirs()
        times = [(timed(ours), timed(theirs)) for _ in range(rounds)]
        ratios = [mine / other for mine, other in times]
        results[name] = {
            "ours_tokens_per_second": round(tokens / statistics.median(mine for mine, _ in times)),
            "library_tokens_per_second": round(tokens / statistics.median(other for _, other in times)),
            "time_ratio": round(statistics.median(ratios), 3),
            "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return results


def main() -> None:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokenizer", type=Path)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/parse-speed.json"))
    arguments = options.parse_args()
    text = prose()
    folder = arguments.tokenizer
    tokenizer = Tokenizer.from_folder(folder) if folder else Tokenizer.train([text, CHAT_TEMPLATE, CALL], 8192)
    bare = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    results = {
        "machine": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "vocab_size": tokenizer.vocab_size,
        "parser_tokens_per_second": parser_speeds(tokenizer, text, arguments.rounds),
        "encoding": encode_speeds(tokenizer, bare, text, arguments.rounds),
    }
    print(json.dumps(results, indent=1))
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
