"""What torch.compile is worth in training: the tiny recipe's flagship step, plain and compiled, in turn.

    python -m benchmarks.compile_speed [--rounds 15] [--precision fp32] [--out FILE]

The step is that of ``train_speed``: about 2,560 tokens in packed documents, AdamW. The median of per-round ratios is
what counts; the time of the first compiled step is what it costs, and how many steps pay for it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from benchmarks.steps import training_step
from benchmarks.train_speed import VOCAB, documents, timed
from twofold.base.files import write_json
from twofold.model.qwen3 import Qwen3
from twofold.recipes.tiny import FLAGSHIP
from twofold.train.compute import compiled, in_precision


def flagship() -> Qwen3:
    """The model, with random weights."""
    model = Qwen3(FLAGSHIP.build(VOCAB, 1e4, 1024))
    model.init_weights(0)
    return model


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, models = documents(), (flagship(), flagship())
    plain, fast = (training_step(model, rows) for model in models)
    with compiled(models[1], True):
        steps = [
            lambda s=step, m=m: in_precision(m, arguments.precision, s)
            for step, m in zip((plain, fast), models, strict=True)
        ]
        first = timed(steps[1])
        for _ in range(2):
            steps[0](), steps[1]()
        rounds = [(timed(steps[0]), timed(steps[1])) for _ in range(arguments.rounds)]
    ratios = [a / b for a, b in rounds]
    gained = statistics.median(a - b for a, b in rounds)
    result = {
        "plain_seconds": round(statistics.median(a for a, _ in rounds), 4),
        "compiled_seconds": round(statistics.median(b for _, b in rounds), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "first_step_seconds": round(first, 1),
        "steps_that_pay_for_it": round(first / gained) if gained > 0 else None,
    }
    print(json.dumps(result))
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "precision": arguments.precision}
    if arguments.out:
        write_json(arguments.out, {"machine": platform.processor() or platform.machine(), **facts, **result})


if __name__ == "__main__":
    main()
