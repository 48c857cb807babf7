"""What a step computes: limits, order, sharing and preemption, case by case. Random lives are in tests/property."""

from __future__ import annotations

import pytest

from twofold.base.records import InputError, Request, SamplingParams
from twofold.engine.blocks import BlockManager, root_key
from twofold.engine.request import Sample
from twofold.engine.scheduler import Batch, Scheduler


def make(blocks: int = 20, size: int = 4, rows: int = 8, max_tokens: int = 20, mixed: int = 6) -> Scheduler:
    return Scheduler(BlockManager(blocks, size), rows, max_tokens, mixed)


def add(scheduler: Scheduler, number: int, prompt: int, n: int = 1, max_tokens: int = 30) -> list[Sample]:
    tokens = [100 * number + place for place in range(prompt)]
    request = Request(tuple(tokens), SamplingParams(n=n, max_tokens=max_tokens))
    samples = [
        Sample(number, 0, index, request, root_key(0), False, list(tokens), prompt + max_tokens) for index in range(n)
    ]
    scheduler.waiting.extend(samples)
    return samples


def step(scheduler: Scheduler) -> Batch:
    """Schedule, and give every sample that is ready the token 7."""
    batch = scheduler.schedule()
    scheduler.decoded(batch.rows)
    ready = list(batch.rows)
    for chunk in batch.chunks:
        ready += scheduler.computed(chunk.sample, chunk.end)
    for sample in ready:
        sample.tokens.append(7)
    scheduler.check_integrity()
    return batch


def shape(batch: Batch) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Requests that are decoded, and (request, begin, end) of each chunk."""
    rows = [sample.request_id for sample in batch.rows]
    return rows, [(chunk.sample.request_id, chunk.begin, chunk.end) for chunk in batch.chunks]


def test_prompts_are_cut_by_the_limit_and_more_so_beside_decoding() -> None:
    scheduler = make()
    add(scheduler, 0, 12)
    add(scheduler, 1, 30)
    assert shape(step(scheduler)) == ([], [(0, 0, 12), (1, 0, 8)])
    assert shape(step(scheduler)) == ([0], [(1, 8, 14)])
    add(scheduler, 2, 3)
    for begin in (14, 20):
        assert shape(step(scheduler)) == ([0], [(1, begin, begin + 6)])
    assert shape(step(scheduler)) == ([0], [(1, 26, 30), (2, 0, 2)])
    assert shape(step(scheduler)) == ([0, 1, 2], [])  # the last token of a prompt is like any other
    assert scheduler.stats.prompt_tokens == 45


def test_a_draft_beside_a_long_prompt_counts_as_decoding() -> None:
    scheduler = make()
    [sample] = add(scheduler, 0, 5)
    step(scheduler)
    step(scheduler)
    sample.draft = [7, 7]
    add(scheduler, 1, 30)
    assert shape(scheduler.schedule()) == ([], [(0, 6, 9), (1, 0, 6)])


def test_no_more_run_than_there_are_rows() -> None:
    scheduler = make(rows=2)
    for number in range(3):
        add(scheduler, number, 2)
    step(scheduler)
    assert shape(step(scheduler)) == ([0, 1], []) and len(scheduler.waiting) == 1
    scheduler.end([scheduler.running[0]])
    assert shape(step(scheduler)) == ([1], [(2, 0, 2)])


def test_samples_of_a_request_share_full_blocks_and_copy_the_last() -> None:
    scheduler = make()
    one, two, three = add(scheduler, 0, 10, n=3)
    batch = step(scheduler)
    assert shape(batch) == ([], [(0, 0, 10)]) and len(batch.copies) == 2
    assert one.blocks[:2] == two.blocks[:2] == three.blocks[:2]
    assert len({one.blocks[2], two.blocks[2], three.blocks[2]}) == 3
    assert batch.copies == [(one.blocks[2], two.blocks[2], 2), (one.blocks[2], three.blocks[2], 2)]
    assert shape(step(scheduler)) == ([0, 0, 0], [])
    assert scheduler.stats.prompt_tokens == 10 and scheduler.blocks.used == 5


def test_a_prompt_of_full_blocks_needs_no_copy() -> None:
    scheduler = make()
    one, two = add(scheduler, 0, 8, n=2)
    assert not step(scheduler).copies and one.blocks == two.blocks
    step(scheduler)
    assert one.blocks[:2] == two.blocks[:2] and one.blocks[2] != two.blocks[2]


def test_a_follower_waits_while_the_prompt_is_computed_in_chunks() -> None:
    scheduler = make(max_tokens=8)
    one, two = add(scheduler, 0, 14, n=2)
    assert shape(step(scheduler)) == ([], [(0, 0, 8)]) and two.leader is one and not two.blocks
    assert shape(step(scheduler)) == ([], [(0, 8, 14)]) and two.leader is None
    assert one.tokens == two.tokens and one.computed == two.computed == 14


def test_followers_without_blocks_wait_again() -> None:
    scheduler = make(blocks=5, max_tokens=8)
    early, (one, two) = add(scheduler, 0, 1), add(scheduler, 1, 9, n=2)
    step(scheduler)
    assert two.leader is one  # when it was admitted, a block was left for it
    early[0].tokens += [7] * 3  # as if time had passed: the next token needs another block
    early[0].computed += 3
    step(scheduler)
    assert two in scheduler.waiting and one in scheduler.running


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make(blocks=5)
    for number in range(3):
        add(scheduler, number, 4 if number else 6)
    step(scheduler)
    assert scheduler.blocks.available == 1
    step(scheduler)
    step(scheduler)
    assert [sample.request_id for sample in scheduler.running] == [0, 1]
    (back,) = scheduler.waiting
    assert back.request_id == 2 and back.tokens[-1] == 7 and not back.blocks and back.computed == 0
    assert scheduler.stats.preemptions == 1
    scheduler.end([scheduler.running[0]])
    step(scheduler)
    assert back in scheduler.running and back.tokens == [200, 201, 202, 203, 7, 7]


def test_a_guess_is_dropped_before_anyone_gives_way() -> None:
    scheduler = make(blocks=2)
    (sample,) = add(scheduler, 0, 7, max_tokens=2)
    step(scheduler)
    sample.draft = [1, 2, 3, 4]
    assert shape(step(scheduler)) == ([0], []) and not sample.draft and scheduler.stats.preemptions == 0


def test_what_can_never_fit_is_refused_with_both_sizes() -> None:
    scheduler = make(blocks=3)
    scheduler.check_size(12)
    with pytest.raises(InputError, match="come to 13 tokens, 4 blocks of 4; the cache has 3"):
        scheduler.check_size(13)


def test_an_abort_frees_everything_at_once() -> None:
    scheduler = make(rows=3, max_tokens=8)
    add(scheduler, 0, 10, n=5)
    add(scheduler, 1, 3)
    step(scheduler)
    assert len(scheduler.abort(0)) == 5 and scheduler.blocks.used == 0 and not scheduler.running
    assert scheduler.abort(0) == []
    assert shape(step(scheduler)) == ([], [(1, 0, 3)])
