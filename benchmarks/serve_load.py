"""Many clients at one server for minutes, some of which go away or send nonsense: nothing lost, crossed or leaked?

    python -m benchmarks.serve_load [--seconds 180] [--clients 64] [--model FOLDER] [--out FILE]

The server is a process of its own, the clients are coroutines here that speak plain HTTP. Each asks greedy streaming
chats one after the other; one in ten is broken off after a few tokens, one in ten is malformed. Every whole answer must
be the beginning of the answer that its prompt got alone, before the load, token by token. Sums are rounded otherwise
in batches of other sizes, so an answer may leave its path where the two likeliest tokens are nearly equal: those are
counted apart, as ties. After the load nothing may run, wait or hold a block. Memory is the server's resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from twofold.base.files import write_json
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes.pretrain import save_model
from twofold.serve_cli import serve
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import Tokenizer

PROMPTS, LONGEST = 48, 64
TIE = 1e-3  # difference of two log-probabilities that other sums may turn round
NONSENSE: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"messages": []}', 400),
    (b'{"messages": [{"role": "ghost", "content": "x"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temprature": 1}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "n": "two"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', 404),
    (b'{"messages": [{"role": "user", "content": "x"}], "enable_thinking": false, "thinking_budget": 9}', 400),
    (json.dumps({"messages": [{"role": "user", "content": "word " * 4000}]}).encode(), 400),
]


@dataclass
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Solo:
    """A prompt's answer alone: its tokens, and how much likelier each was than the next best."""

    token_ids: list[int]
    margins: list[float]


def small_model(folder: Path) -> Path:
    """A random model of four layers with a tokenizer for English and the chat format."""
    words = "the sum of one and two is three, and of a list all of its numbers; which city has rain today? "
    tokenizer = Tokenizer.train([words * 4, CHAT_TEMPLATE], 1000)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e6,
            max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1,
        )
    )  # fmt: skip
    model.init_weights(0)
    save_model(model, tokenizer, folder)
    return folder


def question(number: int) -> str:
    """One of the prompts: a common beginning, and lengths that differ."""
    return "the sum of a list all of its numbers " * (1 + number % 4) + f"which of {number} and {number * 7}?"


def body(number: int, limit: int, **extra: Any) -> dict[str, Any]:
    """A greedy chat that ends only at its limit."""
    messages = [{"role": "user", "content": question(number)}]
    fixed = {"messages": messages, "max_tokens": limit, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return fixed | extra


async def alone(client: httpx.AsyncClient, number: int) -> Solo:
    """The answer of a prompt while nothing else runs."""
    reply = await client.post("/v1/chat/completions", json=body(number, LONGEST, logprobs=True, top_logprobs=2))
    [choice] = reply.raise_for_status().json()["choices"]
    tops = [[pair["logprob"] for pair in entry["top_logprobs"]] for entry in choice["logprobs"]["content"]]
    return Solo(choice["token_ids"], [top[0] - top[1] for top in tops])


async def stream(client: httpx.AsyncClient, solo: list[Solo], tally: Tally, dice: random.Random) -> None:
    """One streamed chat, checked token by token; one in nine is broken off."""
    number, limit = dice.randrange(PROMPTS), dice.randint(8, LONGEST)
    leave = dice.randint(1, limit) if dice.random() < 1 / 9 else None
    made: list[int] = []
    begun = last = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body(number, limit, stream=True)) as reply:
        async for line in reply.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                tally.outcomes["error"] += 1
                tally.faults.append(chunk["error"]["message"])
                return
            ids = [token for choice in chunk["choices"] for token in choice.get("token_ids", [])]
            if ids:
                now = time.perf_counter()
                if made:
                    tally.gaps += [(now - last) / len(ids)] * len(ids)
                else:
                    tally.first.append(now - begun)
                last, made = now, made + ids
            if leave is not None and len(made) >= leave:
                break
    tally.tokens += len(made)
    tally.outcomes[judge(made, limit, leave, solo[number], tally)] += 1


def judge(made: list[int], limit: int, leave: int | None, solo: Solo, tally: Tally) -> str:
    """What became of an answer, compared with the one that its prompt got alone."""
    if leave is None and len(made) != limit:
        tally.faults.append(f"{len(made)} of {limit} tokens came")
        return "lost"
    for place, (token, wanted) in enumerate(zip(made, solo.token_ids, strict=False)):
        if token != wanted:
            if solo.margins[place] < TIE:
                return "tie"
            tally.faults.append(f"token {place} differs where the margin is {solo.margins[place]:.4f}")
            return "crossed"
    return "same" if leave is None else "broken off"


async def nonsense(client: httpx.AsyncClient, tally: Tally, dice: random.Random) -> None:
    """A request that must be refused in OpenAI's form."""
    content, status = dice.choice(NONSENSE)
    reply = await client.post("/v1/chat/completions", content=content)
    good = reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}
    tally.outcomes["refused" if good else "wrongly answered"] += 1
    if not good:
        tally.faults.append(f"{reply.status_code} for {content[:60]!r}")


async def one_client(base: str, solo: list[Solo], tally: Tally, end: float, seed: int) -> None:
    """Requests one after the other until the time is over."""
    dice = random.Random(seed)
    async with httpx.AsyncClient(base_url=base, timeout=120) as client:
        while time.perf_counter() < end:
            if dice.random() < 0.1:
                await nonsense(client, tally, dice)
            else:
                await stream(client, solo, tally, dice)


async def watch_memory(pid: int, end: float) -> list[float]:
    """The server's resident set in MiB, every second."""
    seen = []
    while time.perf_counter() < end:
        seen.append(resident(pid))
        await asyncio.sleep(1)
    return seen


def resident(pid: int) -> float:
    """Resident set of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Metrics of the server by name, without histograms."""
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if not line.startswith("#") and "_bucket" not in line]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def measure(base: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Answers alone, then the load, then what is left."""
    async with httpx.AsyncClient(base_url=base, timeout=120) as client:
        solo = [await alone(client, number) for number in range(PROMPTS)]
        tally = Tally()
        begun = time.perf_counter()
        end = begun + seconds
        work = [one_client(base, solo, tally, end, seed) for seed in range(clients)]
        memory, *_ = await asyncio.gather(watch_memory(pid, end), *work)
        took = time.perf_counter() - begun
        await asyncio.sleep(1)
        left = await gauges(client)
        again = [await alone(client, number) for number in range(0, PROMPTS, 6)]
        health = (await client.get("/health")).json()
    changed = sum(now.token_ids != before.token_ids for now, before in zip(again, solo[::6], strict=True))
    return summary(tally, memory, took, left) | {"answers_changed_after": changed, "health": health}


def summary(tally: Tally, memory: list[float], seconds: float, left: dict[str, float]) -> dict[str, Any]:
    """Counts, latencies in milliseconds, memory, and what the engine still held."""
    fifth = max(1, len(memory) // 5)
    held = {
        name: left[f"vllm:{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }
    return {
        "outcomes": dict(sorted(tally.outcomes.items())),
        "faults": tally.faults[:20],
        "requests_per_second": sum(tally.outcomes.values()) / seconds,
        "tokens_per_second": tally.tokens / seconds,
        "time_to_first_token_ms": percentiles(tally.first),
        "inter_token_latency_ms": percentiles(tally.gaps),
        "memory_mib": {
            "after_a_fifth": statistics.median(memory[fifth : 2 * fifth] or memory),
            "at_the_end": statistics.median(memory[-fifth:]),
            "every_tenth_second": [round(value, 1) for value in memory[::10]],
        },
        "held_afterwards": held,
        "aborted": left["twofold:aborted_requests_total"],
        "preemptions": left["vllm:num_preemptions_total"],
        "prefix_cache_hit_rate": left["vllm:prefix_cache_hits_total"] / left["vllm:prefix_cache_queries_total"],
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


async def ready(base: str, process: Any) -> None:
    """Wait until the server answers."""
    async with httpx.AsyncClient(base_url=base) as client:
        while process.is_alive():
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx.ConnectError:
                await asyncio.sleep(0.2)
    raise SystemExit("the server did not start")


def run(model: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Start the server, measure, stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"max_queue={4 * clients}"]
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(model,), kwargs={"port": port, "overrides": settings, "log_level": "warning"}
    )
    process.start()
    base = f"http://127.0.0.1:{port}"
    try:

        async def both() -> dict[str, Any]:
            await ready(base, process)
            return await measure(base, process.pid or 0, clients, seconds)

        return asyncio.run(both())
    finally:
        process.terminate()
        process.join(60)


def main() -> None:
    """Run it, print and write the figures; exit code 1 if an answer was lost or crossed, or something leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", type=Path, help="a model folder; a small random one unless given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve-load.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or small_model(Path(scratch) / "small-random-model")
        result = run(model, options.clients, options.seconds)
    result |= {
        "clients": options.clients,
        "seconds": options.seconds,
        "model": "random, 4 layers, width 256" if options.model is None else options.model.name,
        "processors": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    write_json(options.out, result)
    print(json.dumps(result, indent=2))
    bad = {"lost", "crossed", "error", "wrongly answered"} & result["outcomes"].keys()
    if bad or any(result["held_afterwards"].values()) or result["answers_changed_after"]:
        raise SystemExit(f"failed: {', '.join(sorted(bad)) or 'something is still held or has changed'}")


if __name__ == "__main__":
    main()
