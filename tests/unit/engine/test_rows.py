"""Per-row state by itself: the thinking state machine, ends, and squeezing rows out."""

from __future__ import annotations

import pytest
import torch

from twofold.base.records import Request, SamplingParams
from twofold.engine.rows import Rows, Sample, ThinkTokens

EOS, OPEN, CLOSE = 0, 1, 2
THINK = ThinkTokens(OPEN, CLOSE, (8, CLOSE, 9))


def started(budget: int | None, in_think: bool = False, limit: int = 20) -> Rows:
    rows = Rows(2, limit, THINK, (EOS,))
    params = SamplingParams(max_tokens=limit, thinking_budget=budget)
    rows.place_sample(0, Sample(0, 0, Request((5, 6), params, in_think)))
    return rows


def feed(rows: Rows, wanted: list[int]) -> tuple[list[int], list[bool]]:
    """Offer sampled tokens to row 0 until it ends; returns what was recorded."""
    row = torch.tensor([0])
    for token in wanted:
        if not rows.live[0]:
            break
        tokens, forced = rows.force(torch.tensor([token]), row)
        rows.append(row, tokens, forced, torch.zeros(1), torch.zeros(1))
    made = int(rows.made[0])
    return rows.tokens[0, :made].tolist(), rows.forced[0, :made].tolist()


@pytest.mark.parametrize(
    ("budget", "offered", "recorded", "thought"),
    [
        (2, [OPEN, 5, 6, 7, 7, 7, 4, EOS], [OPEN, 5, 6, 8, CLOSE, 9, 4, EOS], 2),
        (0, [OPEN, 5, 5, 5, 4, EOS], [OPEN, 8, CLOSE, 9, 4, EOS], 0),
        (2, [OPEN, 5, CLOSE, 6, 6, 6, EOS], [OPEN, 5, CLOSE, 6, 6, 6, EOS], 1),
        (1, [5, 6, 7, EOS], [5, 6, 7, EOS], 0),
        (1, [CLOSE, 6, 7, EOS], [CLOSE, 6, 7, EOS], 0),
        (1, [OPEN, 5, 7, 7, 7, OPEN, 6, 6, EOS], [OPEN, 5, 8, CLOSE, 9, OPEN, 6, 6, EOS], 1),
        (None, [OPEN, *[5] * 12, CLOSE, EOS], [OPEN, *[5] * 12, CLOSE, EOS], 12),
    ],
)
def test_the_budget_state_machine(budget: int | None, offered: list[int], recorded: list[int], thought: int) -> None:
    rows = started(budget)
    tokens, forced = feed(rows, offered)
    assert tokens == recorded and rows.finished() == [0]
    assert [t for t, f in zip(tokens, forced, strict=True) if f] in ([], list(THINK.stop_ids))
    completion = rows.take(0, version=3)
    assert completion.thinking_tokens == thought and completion.finish_reason == "stop"
    assert completion.policy_version == 3 and rows.finished() == []


def test_a_prompt_that_ends_inside_a_block() -> None:
    assert feed(started(0, in_think=True), [5, 5, 5, 4, EOS])[0] == [8, CLOSE, 9, 4, EOS]
    assert feed(started(1, in_think=True), [5, 5, 5, 5, 4, EOS])[0] == [5, 8, CLOSE, 9, 4, EOS]


def test_length_limit_and_end_tokens() -> None:
    rows = started(None, limit=3)
    assert feed(rows, [5, 6, 7, 8])[0] == [5, 6, 7]
    assert rows.take(0, 0).finish_reason == "length"
    rows = started(None, limit=3)
    assert feed(rows, [5, 6, EOS])[0] == [5, 6, EOS]
    assert rows.take(0, 0).finish_reason == "stop"


def test_compaction_keeps_the_order_and_the_state_of_live_rows() -> None:
    rows = Rows(4, 5, THINK, (EOS,))
    for row in range(4):
        sample = Sample(row, 0, Request((5,) * (row + 1), SamplingParams(max_tokens=5, seed=row)))
        rows.place_sample(row, sample, extended=row == 3)
    every = torch.arange(4)
    rows.append(every, torch.tensor([EOS, 7, EOS, 6]), torch.zeros(4, dtype=torch.bool), -every.float(), every.float())
    for row in rows.finished():
        rows.take(row, 0)
    assert rows.compact().tolist() == [1, 3] and rows.count == 2
    assert rows.tokens[:2, 0].tolist() == [7, 6] and rows.seed[:2].tolist() == [1, 3]
    assert rows.extended[:2].tolist() == [False, True]
    assert rows.place[:2].tolist() == [2, 4] and rows.logprobs[:2, 0].tolist() == [-1, -3]
    assert [s.request_index for s in rows.samples if s is not None] == [1, 3] and rows.live.tolist() == [True] * 2 + [
        False
    ] * 2
