"""Training and sampling speed of the tiny recipe's flagship against transformers' Qwen3: same shape, data and dtype.

    python -m benchmarks.train_speed [--rounds 5] [--out FILE]

Training: one optimiser step on the same 2,560 tokens in fp32 with fused AdamW on both sides. Ours takes them as packed
documents in one flat stream; transformers as a padded batch of the same documents, its usual form. Sampling: 256
prompts, 48 new tokens, T = 1. The sides run in turn, and the median of per-round ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.steps import training_step
from twofold.base.files import write_json
from twofold.base.records import Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import save_weights
from twofold.recipes.tiny import FLAGSHIP

VOCAB, TOKENS = 1024, 2560


def documents() -> list[list[int]]:
    """About 2,560 tokens in documents of 40 to 256 tokens."""
    rng = random.Random(0)
    out: list[list[int]] = []
    while sum(map(len, out)) < TOKENS:
        out.append([rng.randrange(VOCAB) for _ in range(rng.choice((40, 60, 80, 120, 256)))])
    return out


def timed(step: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def their_training(model: torch.nn.Module, rows: list[list[int]]) -> Callable[[], None]:
    """One training step of transformers on the padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_sampling(model: Qwen3) -> Callable[[], None]:
    """256 prompts x 48 tokens through the engine."""
    engine = Engine(model, eos_ids=(VOCAB,))
    rng = random.Random(1)
    params = SamplingParams(temperature=1.0, max_tokens=48)
    requests = [Request(tuple(rng.randrange(VOCAB) for _ in range(32)), params) for _ in range(256)]
    return lambda: engine.generate(requests) and None


def their_sampling(model: torch.nn.Module) -> Callable[[], None]:
    """The same through ``generate``."""
    rng = random.Random(1)
    ids = torch.tensor([[rng.randrange(VOCAB) for _ in range(32)] for _ in range(256)])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_new_tokens": 48, "max_new_tokens": 48}

    def step() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return step


def main() -> None:
    """Run both comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = documents()
    ours = Qwen3(FLAGSHIP.build(VOCAB, 1e4, 1024))
    ours.init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(ours, Path(folder))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = {
        "training": (training_step(ours, rows), their_training(theirs, rows), sum(map(len, rows))),
        "sampling": (our_sampling(ours), their_sampling(theirs), 256 * 48),
    }
    results = {}
    for name, (our_step, their_step, tokens) in pairs.items():
        our_step(), their_step()
        rounds = [(timed(our_step), timed(their_step)) for _ in range(arguments.rounds)]
        results[name] = {
            "ours_tokens_per_second": round(tokens / statistics.median(a for a, _ in rounds)),
            "transformers_tokens_per_second": round(tokens / statistics.median(b for _, b in rounds)),
            "ratio": round(statistics.median(b / a for a, b in rounds), 2),
            "ratio_range": [round(min(b / a for a, b in rounds), 2), round(max(b / a for a, b in rounds), 2)],
        }
        print(name, json.dumps(results[name]))
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    if arguments.out:
        write_json(arguments.out, {"machine": platform.processor() or platform.machine(), **facts, **results})


if __name__ == "__main__":
    main()
