"""Episodes with a scripted engine: append-only tokens, what was sampled, turns, tools, and the mode that was used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from twofold.base.records import SamplingParams
from twofold.episodes.play import MAX_TURNS, Trajectory, play
from twofold.tasks.base import Item
from twofold.tasks.families import SumMod
from twofold.tasks.query import Mode, Query, single, with_tools
from twofold.tasks.tools import Calc
from twofold.text.chat import Renderer
from twofold.text.parse import parse

END = "<|im_end|>"
CALL = '<tool_call>\n{"name": "calc", "arguments": {"expression": "37*48"}}\n</tool_call>' + END
ITEM = Item("sum", "sum mod 10: E1 B5", "6", (" E0+1=1 B1+5=6",), "sum")
CALC_ITEM = Item("calc", "calc 37*48", "1776", (" calc 37*48",), "calc", {"expression": "37*48"})
Scripted = Callable[..., Any]


def ask(flag: Mode | None = None, hard: bool = False) -> Query:
    return single(ITEM, SumMod(), flag, hard)


def episode(engine: Any, renderer: Renderer, query: Query, params: SamplingParams | None = None) -> Trajectory:
    return play(engine, renderer, [query], params or SamplingParams(max_tokens=50))[0][0]


def in_step(trajectory: Trajectory) -> bool:
    lists = (trajectory.sampled, trajectory.logprobs, trajectory.entropies)
    return {len(values) for values in lists} == {len(trajectory.token_ids)}


def test_one_turn(scripted: Scripted, renderer: Renderer) -> None:
    text = f"<think>\n E0+1=1 B1+5=6\n</think>\n\n6{END}"
    engine = scripted(text)
    trajectory = episode(engine, renderer, ask())
    prompt, reply = trajectory.token_ids[: trajectory.prompt_length], trajectory.token_ids[trajectory.prompt_length :]
    assert prompt == renderer.prompt_ids(ask().messages) == list(engine.calls[0][0].prompt_ids)
    assert reply == renderer.tokenizer.encode_with_special(text)
    assert in_step(trajectory) and trajectory.sampled == [False] * len(prompt) + [True] * len(reply)
    assert trajectory.logprobs[len(prompt) :] == [-(k + 1) / 10 for k in range(len(reply))]
    assert trajectory.answer == "6" and trajectory.correct == 1.0 and trajectory.thinking_tokens == 2
    assert trajectory.final == parse(renderer.tokenizer, reply, prompt)


def test_a_tool_episode_only_grows_and_marks_what_was_sampled(scripted: Scripted, renderer: Renderer) -> None:
    engine = scripted(f"<think>\n calc 37*48\n</think>\n\n{CALL}", f"<think>\n 1776\n</think>\n\n1776{END}")
    query = with_tools(CALC_ITEM, Calc(), "think")
    trajectory = episode(engine, renderer, query)
    first, second = (list(calls[0].prompt_ids) for calls in engine.calls)
    assert second[: len(first)] == first and trajectory.token_ids[: len(second)] == second
    assert first == renderer.prompt_ids(query.messages, Calc().tools)
    turns = [renderer.tokenizer.encode_with_special(text) for text in (
        f"<think>\n calc 37*48\n</think>\n\n{CALL}", f"<think>\n 1776\n</think>\n\n1776{END}")]  # fmt: skip
    added = renderer.tool_result_ids(["1776"])
    assert trajectory.token_ids == first + turns[0] + added + turns[1]
    mask = [False] * len(first) + [True] * len(turns[0]) + [False] * len(added) + [True] * len(turns[1])
    assert trajectory.sampled == mask and in_step(trajectory)
    assert all(v == 0 for v, s in zip(trajectory.logprobs, trajectory.sampled, strict=True) if not s)
    assert trajectory.tool_results == ["1776"] and trajectory.answer == "1776" and trajectory.correct == 1.0
    assert trajectory.first is not None and trajectory.first.tool_calls and trajectory.followed_mode
    assert trajectory.thinking_tokens == 4 and not trajectory.truncated


def test_tool_errors_are_text_for_the_model(scripted: Scripted, renderer: Renderer) -> None:
    bad = '<tool_call>\n{"name": "shell", "arguments": {}}\n</tool_call>' + END
    trajectory = episode(scripted(bad, "0" + END), renderer, with_tools(CALC_ITEM, Calc()))
    assert trajectory.tool_results[0].startswith("error:") and trajectory.answer == "0" and trajectory.correct == 0.0


def test_calls_without_end_are_cut_at_max_turns(scripted: Scripted, renderer: Renderer) -> None:
    engine = scripted(*[CALL] * MAX_TURNS)
    trajectory = episode(engine, renderer, with_tools(CALC_ITEM, Calc()))
    assert len(engine.calls) == MAX_TURNS and not engine.turns
    assert trajectory.truncated and trajectory.answer == "" and trajectory.correct == 0.0
    assert len(trajectory.tool_results) == MAX_TURNS - 1 and in_step(trajectory)


def test_calls_are_run_only_when_tools_are_on_offer_and_the_turn_is_whole(
    scripted: Scripted, renderer: Renderer
) -> None:
    assert episode(scripted(CALL), renderer, ask()).tool_results == []
    cut = episode(scripted(CALL.removesuffix(END)), renderer, with_tools(CALC_ITEM, Calc()))
    assert cut.truncated and cut.tool_results == []


def test_forced_stop_text_is_not_sampled(scripted: Scripted, renderer: Renderer) -> None:
    stop = "\n</think>\n\n"
    engine = scripted(f"<think>\n E0+1=1{stop}6{END}", forced_text=stop)
    trajectory = episode(engine, renderer, ask())
    forced = renderer.tokenizer.encode_with_special(stop)
    marked = [t for t, s in zip(trajectory.token_ids, trajectory.sampled, strict=True) if not s]
    assert marked == trajectory.token_ids[: trajectory.prompt_length] + forced and trajectory.forced
    assert trajectory.answer == "6"


def test_groups_keep_their_order_and_seeds_do_not_overlap(scripted: Scripted, renderer: Renderer) -> None:
    engine = scripted(*(f"{i}{END}" for i in range(6)))
    params = SamplingParams(n=3, seed=100)
    groups = play(engine, renderer, [ask("no_think"), ask("think")], params)
    assert [[t.answer for t in group] for group in groups] == [["0", "1", "2"], ["3", "4", "5"]]
    seeds = [r.params.seed + j for r in engine.calls[0] for j in range(r.params.n)]
    assert seeds == list(range(100, 106))


THOUGHT, EMPTY = "<think>\n a\n</think>\n\n", "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("query", "reply", "followed"),
    [
        (ask(), f"{THOUGHT}6{END}", True),
        (ask("think"), f"{THOUGHT}6{END}", True),
        (ask("think"), f"{EMPTY}6{END}", False),
        (ask("think"), f"6{END}", False),
        (ask("think"), f"<think>\n a{END}", False),
        (ask("think"), "<think>\n a", False),
        (ask("think"), f"{THOUGHT}6", True),
        (ask("no_think"), f"{EMPTY}6{END}", True),
        (ask("no_think"), f"{THOUGHT}6{END}", False),
        (ask("no_think"), f"6{END}", False),
        (ask("no_think"), f"{EMPTY}{THOUGHT}6{END}", False),
        (ask(hard=True), f"6{END}", True),
        (ask("think", hard=True), f"6{END}", True),
        (ask(hard=True), f"{THOUGHT}6{END}", False),
        (ask(hard=True), f"{EMPTY}6{END}", False),
    ],
)
def test_followed_mode(query: Query, reply: str, followed: bool, scripted: Scripted, renderer: Renderer) -> None:
    trajectory = episode(scripted(reply), renderer, query)
    assert trajectory.followed_mode is followed


def test_an_episode_that_was_cut_has_no_answer(scripted: Scripted, renderer: Renderer) -> None:
    trajectory = episode(scripted("6"), renderer, ask("no_think"))
    assert trajectory.truncated and trajectory.answer == "" and trajectory.correct == 0.0


def test_the_prompt_of_a_hard_switch_holds_the_empty_block(scripted: Scripted, renderer: Renderer) -> None:
    trajectory = episode(scripted(f"6{END}"), renderer, ask(hard=True))
    prompt = renderer.tokenizer.decode(trajectory.token_ids[: trajectory.prompt_length])
    assert prompt.endswith("<think>\n\n</think>\n\n") and trajectory.correct == 1.0


def test_any_real_item_round_trips(scripted: Scripted, renderer: Renderer) -> None:
    rng = random.Random(0)
    for _ in range(20):
        item = SumMod().generate(rng, 1.0)
        text = f"<think>\n{item.traces[0]}\n</think>\n\n{item.answer}{END}"
        trajectory = episode(scripted(text), renderer, single(item, SumMod()))
        assert trajectory.correct == 1.0 and trajectory.followed_mode
        assert trajectory.final is not None and trajectory.final.reasoning == item.traces[0]
