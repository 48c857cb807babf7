"""Random lives of samples over a cache that is too small: what is read is what was written, and nothing is lost.

The cache is simulated: each place remembers the whole prefix whose last token was computed there. A sample that reads
another sample's place, an overwritten one, or one of other weights is caught, whatever mixture of sharing, copying,
moving, preemption and abortion led to it.
"""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError, Request, SamplingParams
from twofold.engine.blocks import BlockManager, root_key
from twofold.engine.request import Sample
from twofold.engine.scheduler import Batch, Scheduler

Prefix = tuple[object, ...]  # a sample's root and its tokens


class World:
    """A scheduler, a simulated cache, and the rules that every step is checked against."""

    def __init__(self, seed: int, blocks: int, size: int, rows: int, whole: bool = False) -> None:
        self.random = random.Random(seed)
        self.scheduler = Scheduler(BlockManager(blocks, size, whole), rows, max_tokens=14, mixed_tokens=5)
        self.size, self.whole = size, whole
        self.cache: dict[tuple[int, int], Prefix] = {}
        self.version, self.ids = 0, count()
        self.steps = self.ended = self.shared = self.forked = 0

    def add(self) -> None:
        number, n = next(self.ids), self.random.choice((1, 1, 2, 4))
        stem = [self.random.randrange(2)] * self.random.randrange(1, 9)  # few stems: prefixes are shared
        prompt = (stem + [self.random.randrange(3) for _ in range(self.random.randrange(8))])[: 3 * self.size]
        room = self.size - len(prompt) + 1 if self.whole else 12
        if room < 1:
            return
        params = SamplingParams(n=n, max_tokens=self.random.randrange(1, room + 1))
        root = root_key(self.version, self.random.random() < 0.1)
        limit = len(prompt) + params.max_tokens
        try:
            self.scheduler.check_size(limit - 1)
        except InputError:
            return
        request = Request(tuple(prompt), params)
        for index in range(n):
            sample = Sample(number, 0, index, request, root, False, list(prompt), limit, self.random.choice((0, 0, 3)))
            self.scheduler.waiting.append(sample)

    def step(self) -> None:
        batch = self.scheduler.schedule()
        if not batch.rows and not batch.chunks:
            assert not self.scheduler.running and not self.scheduler.waiting, "work is there, but none is chosen"
            return
        self.steps += 1
        self.compute(batch)
        ready = self.collect(batch)
        ended = []
        for sample in ready:
            sample.tokens.append(self.random.randrange(3))
            while sample.draft and sample.tokens[-1] == sample.draft[0] and len(sample.tokens) < sample.limit:
                del sample.draft[0]
                self.scheduler.accept(sample)
                sample.tokens.append(self.random.randrange(3))
            room = sample.limit - len(sample.tokens) - 1
            sample.draft = [self.random.randrange(3) for _ in range(min(sample.speculate, room))]
            if len(sample.tokens) == sample.limit or self.random.random() < 0.05:
                ended.append(sample)
        self.ended += len(ended)
        self.scheduler.end(ended)

    def compute(self, batch: Batch) -> None:
        """What the runner does: moves, the forward pass, copies; every place that is read must hold its prefix."""
        moved = {
            (new, place): self.cache[old, place]
            for old, new in batch.moves.items()
            for place in range(batch.moved)
            if (old, place) in self.cache
        }
        self.cache.update(moved)
        assert all(0 < s.computed == len(s.tokens) - 1 and not s.draft and not s.followers for s in batch.rows)
        spans = [(sample, sample.computed, sample.computed + 1) for sample in batch.rows]
        spans += [(chunk.sample, chunk.begin, chunk.end) for chunk in batch.chunks]
        assert 0 < sum(end - begin for _, begin, end in spans) <= self.scheduler.max_tokens
        written: set[tuple[int, int]] = set()
        for sample, begin, end in spans:
            assert begin == sample.computed and end <= len(sample.tokens) + len(sample.draft)
            fed = [*sample.tokens, *sample.draft]
            for position in range(begin, end):
                place = (sample.blocks[position // self.size], position % self.size)
                assert place not in written, "two samples write to one place"
                written.add(place)
                self.cache[place] = (sample.root, *fed[: position + 1])
        for sample, _, end in spans:
            fed = [*sample.tokens, *sample.draft]
            for position in range(end):
                place = (sample.blocks[position // self.size], position % self.size)
                assert self.cache[place] == (sample.root, *fed[: position + 1]), "a sample reads what is not its own"
        for source, target, length in batch.copies:
            self.cache.update({(target, place): self.cache[source, place] for place in range(length)})
            self.forked += 1

    def collect(self, batch: Batch) -> list[Sample]:
        self.scheduler.decoded(batch.rows)
        ready = list(batch.rows)
        for chunk in batch.chunks:
            self.shared += chunk.begin if chunk.sample.cached == chunk.begin else 0
            ready += self.scheduler.computed(chunk.sample, min(chunk.end, len(chunk.sample.tokens)))
        return ready

    def other(self, name: str) -> None:
        scheduler = self.scheduler
        if name == "abort" and (scheduler.running or scheduler.waiting):
            victim = self.random.choice([*scheduler.running, *scheduler.waiting]).request_id
            aborted = scheduler.abort(victim)
            assert aborted and not any(sample.blocks for sample in aborted)
        elif name == "sleep":
            old = scheduler.blocks
            scheduler.restart(BlockManager(old.total, old.block_size, old.whole))
            assert not scheduler.running
        elif name == "weights" and not scheduler.running and not scheduler.waiting:
            self.version += 1
            scheduler.blocks.flush()

    def live(self, operations: int) -> None:
        names = ("add", "step", "abort", "sleep", "weights")
        for name in self.random.choices(names, weights=(25, 70, 4, 0.4, 3), k=operations):
            if name == "add" and len(self.scheduler.waiting) < 20:
                self.add()
            elif name in ("add", "step"):
                self.step()
            else:
                self.other(name)
            self.scheduler.check_integrity()

    def finish(self) -> None:
        """No more requests: everything ends, and every block is free."""
        for _ in range(5000):
            if not self.scheduler.running and not self.scheduler.waiting:
                break
            self.step()
            self.scheduler.check_integrity()
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.blocks.used == 0


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_operations_over_a_small_cache(seed: int) -> None:
    world = World(seed, blocks=9, size=4, rows=5)
    world.live(4000)
    world.finish()
    assert world.ended > 300 and world.shared > 300 and world.forked > 50
    assert world.scheduler.stats.preemptions > 20 and world.scheduler.stats.prefix_hits > 300


def test_whole_sequences_are_moved_together() -> None:
    world = World(0, blocks=5, size=20, rows=5, whole=True)
    for _ in range(1500):
        world.live(1)
        decoded = [sample.blocks[0] for sample in world.scheduler.running if sample.blocks]
        if not world.scheduler._holes:
            assert sorted(decoded) == list(range(len(decoded))), "rows do not lie together"
    world.finish()
    assert world.ended > 100 and world.forked > 20


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    blocks=st.integers(2, 12),
    size=st.integers(1, 6),
    rows=st.integers(1, 6),
    whole=st.booleans(),
)
def test_any_shape_of_cache(seed: int, blocks: int, size: int, rows: int, whole: bool) -> None:
    world = World(seed, max(blocks, rows) if whole else blocks, 4 * size if whole else size, rows, whole)
    world.live(60)
    world.finish()


@pytest.mark.parametrize("blocks", [40, 9])
def test_first_come_first_served(blocks: int) -> None:
    """Those that run came before those that wait, preempted ones included; nobody overtakes."""
    world = World(7, blocks, size=4, rows=6)
    for _ in range(60):
        world.add()
    scheduler = world.scheduler
    while scheduler.running or scheduler.waiting:
        world.step()
        order = [(s.request_id, s.sample_index) for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
    assert (scheduler.stats.preemptions > 10) == (blocks == 9)


def test_the_oldest_always_goes_on() -> None:
    """However many wait, the first running sample takes a token or a chunk in every step."""
    world = World(3, blocks=6, size=4, rows=6)
    for _ in range(40):
        world.add()
    scheduler = world.scheduler
    while scheduler.running or scheduler.waiting:
        oldest = (*scheduler.running, *scheduler.waiting)[0]
        before = (len(oldest.tokens), oldest.computed)
        world.step()
        assert (len(oldest.tokens), oldest.computed) != before or len(oldest.tokens) == oldest.limit
