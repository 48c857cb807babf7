"""What a training arm saw: operations, forms of prompts, and steps for a budget."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.post.sft import ChatSource, StoredExample
from twofold.recipes.pretrain import ModelShape
from twofold.recipes.saw import flops, forms_of, saw, steps_for
from twofold.tasks.families import Direct, SumMod
from twofold.tasks.query import flagged, single, with_tools
from twofold.tasks.tools import Calc

SHAPE = ModelShape(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=16)


def policy(generated: int = 0) -> Any:
    """What these functions need of a policy: the shape of its model and a counter."""
    config = SHAPE.build(300, 1e4, 256)
    return SimpleNamespace(model=SimpleNamespace(config=config), engine=SimpleNamespace(generated_tokens=generated))


def trainer(tokens: int, rewards: list[float]) -> Any:
    """A finished trainer whose rows of metrics hold these rewards, between rows without any."""
    rows = [row for reward in rewards for row in ({"loss": 1.0}, {"reward": reward})]
    return SimpleNamespace(tokens=tokens, step=len(rewards), metrics=SimpleNamespace(rows=lambda: rows))


def test_training_costs_three_times_sampling() -> None:
    one = flops(policy(), 0, 1)
    assert one > 2 * 2 * 32 * 64 and flops(policy(), 0, 0, 1) == one
    assert flops(policy(), 5) == pytest.approx(15 * one)
    assert flops(policy(), 5, 7, 11) == pytest.approx((15 + 7 + 11) * one)


@pytest.mark.parametrize(("batch_size", "factor"), [(32, 10.4), (32, 57.5), (8, 200.3)])
def test_steps_hit_a_budget_within_a_twentieth(batch_size: int, factor: float) -> None:
    rng = random.Random(batch_size)
    examples = [StoredExample([1] * n, [0.0] + [1.0] * (n - 1)) for n in (rng.randint(10, 90) for _ in range(150))]
    budget = factor * flops(policy(), 50 * batch_size)
    steps = steps_for(policy(), budget, examples, batch_size)
    source = ChatSource(examples, batch_size, seed=0)
    spent = flops(policy(), sum(batch.num_tokens for _ in range(steps) for batch in source.next_step()))
    assert spent == pytest.approx(budget, rel=0.05)


def test_there_is_at_least_one_step() -> None:
    examples = [StoredExample([1, 2], [0.0, 1.0])]
    assert steps_for(policy(), 0.0, examples, 4) == 1 == steps_for(policy(), -1e12, examples, 4)


def test_forms_of_queries() -> None:
    item, calc = SumMod().generate(random.Random(0), 0.0), Calc().generate(random.Random(0), 0.0)
    queries = [
        single(item, SumMod()),
        single(item, SumMod(), kind="think"),
        single(item, SumMod(), "think"),
        single(item, SumMod(), "no_think", kind="direct"),
        single(item, SumMod(), "think", hard_switch=True),
        with_tools(calc, Calc(), "no_think"),
        flagged([(item, Direct("max"))], "system /no_think"),
        flagged([(item, Direct("max"))] * 2, "u- u"),  # spelled out: the pattern of these turns
        flagged([(item, Direct("max"))] * 3, "u- u u-"),
    ]
    assert forms_of(queries) == {
        "no flag": 2, "/think": 1, "/no_think": 1, "hard switch": 1, "tool, /no_think": 1, "system /no_think": 1,
        "random flags": 1, "earlier turn /no_think": 1,
    }  # fmt: skip
    assert forms_of([]) == Counter()


def test_the_row_of_an_arm() -> None:
    rewards = [0.0] * 5 + [0.5] * 10
    result = saw(policy(20), trainer(100, rewards), Counter({"b": 1, "a": 2}), "verifier", (1e-3, 2e-3), beside=7.0)
    assert result["flops"] == pytest.approx(flops(policy(), 100, 20) + 7)
    assert {name: result[name] for name in ("tokens", "generated_tokens", "steps")} == {
        "tokens": 100, "generated_tokens": 20, "steps": 15,
    }  # fmt: skip
    assert result["saw"] == {
        "forms": {"a": 2, "b": 1}, "labels": "verifier", "trained_tokens": 100, "generated_tokens": 20,
        "flops": result["flops"], "tuned": [1e-3, 2e-3], "train_reward": 0.5,
    }  # fmt: skip
    assert saw(policy(), trainer(1, []), Counter(), "answers", ())["saw"]["train_reward"] is None
