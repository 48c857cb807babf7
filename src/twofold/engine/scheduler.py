"""Scheduler: which tokens of which samples the next forward pass computes.

Continuous batching in first-come order. Every step takes one token of each sample that is being decoded and, as far as
the token limit allows, chunks of prompts. When blocks run out, the youngest sample gives its own up and is computed
again later: the oldest always goes on, so every request ends. The first sample of a request computes the prompt, the
others share its blocks, with a copy of the last one if it is not full. No tensors here, and nothing about sampling.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from twofold.base.records import InputError
from twofold.engine.blocks import BlockManager, next_key
from twofold.engine.request import EngineStats, Sample


@dataclass(slots=True)
class Chunk:
    """Positions ``begin`` to ``end`` of a sample, draft included."""

    sample: Sample
    begin: int
    end: int


@dataclass(slots=True)
class Batch:
    """One forward pass.

    rows: samples that are decoded: one token each, with keys before it, no draft, nobody waiting for it. chunks: all
    others. decodes: some of them go on with an answer. moves: contents of blocks to move before it, {old: new}, and how
    many positions of them. copies: after it, (source, target, positions).
    """

    rows: list[Sample] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decodes: bool = False
    moves: dict[int, int] = field(default_factory=dict)
    moved: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)


class Scheduler:
    """Queues samples and hands out batches.

    Args:
        blocks: the cache's. max_rows: most samples that run at once. max_tokens: most tokens of a step.
        mixed_tokens: most prompt tokens of a step that also decodes, so that a long prompt does not hold up answers.
    """

    def __init__(self, blocks: BlockManager, max_rows: int, max_tokens: int, mixed_tokens: int) -> None:
        self.blocks, self.max_rows = blocks, max_rows
        self.max_tokens, self.mixed_tokens = max(max_tokens, max_rows), mixed_tokens
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []  # in the order of their admission
        self.stats = EngineStats()
        self._holes = False

    def restart(self, blocks: BlockManager) -> None:
        """Go on with another cache, empty: everything that runs waits again, to be computed anew."""
        for sample in reversed(self.running):
            sample.blocks = []
            self._give_up(sample)
            self.waiting.appendleft(sample)
        self.running, self.blocks, self._holes = [], blocks, False

    def check_size(self, tokens: int) -> None:
        """Refuse a sample of so many positions if it could not run even alone.

        Raises:
            InputError: naming both sizes.
        """
        needed, total = self.blocks.needed(tokens), self.blocks.total
        if needed > total:
            raise InputError(
                f"prompt and max_tokens come to {tokens} tokens, {needed} blocks of {self.blocks.block_size}; the "
                f"cache has {total}: lower max_tokens, shorten the prompt or give the engine more kv_bytes",
                field="max_tokens",
            )

    def schedule(self) -> Batch:
        """The next batch; empty if nothing runs or waits. Takes the blocks it needs."""
        batch = Batch()
        if self._holes:
            self._compact(batch)
        preemptions, size = self.stats.preemptions, self.blocks.block_size
        left, prompt_left = self.max_tokens, self.max_tokens
        index = 0
        while index < len(self.running):
            sample = self.running[index]
            index += 1
            if sample.leader is not None or left < 1:
                continue
            place = sample.computed
            decoding = place == len(sample.tokens) - 1
            simple = decoding and not sample.draft and not sample.followers
            if simple and 0 < place < len(sample.blocks) * size:  # nearly always
                batch.rows.append(sample)
                batch.decodes = True
                left -= 1
                continue
            taken = self._go_on(batch, sample, left if decoding else self._prompt_share(batch, left, prompt_left))
            left -= taken
            prompt_left -= 0 if decoding else taken
            batch.decodes |= decoding and taken > 0
        if preemptions == self.stats.preemptions:
            self._admit_all(batch, self._prompt_share(batch, left, prompt_left))
        return batch

    def _prompt_share(self, batch: Batch, left: int, prompt_left: int) -> int:
        """Prompt tokens that this step may still take."""
        taken = self.max_tokens - prompt_left
        return min(left, (self.mixed_tokens if batch.decodes else self.max_tokens) - taken)

    def _go_on(self, batch: Batch, sample: Sample, allowed: int) -> int:
        """Put a running sample's next tokens into the batch; preempt others, or it, if there are no blocks for them.

        Returns:
            How many tokens.
        """
        if allowed < 1:
            return 0
        del sample.draft[max(0, allowed - 1) :]
        if self._missing(sample, len(sample.tokens) + len(sample.draft)) > self.blocks.available:
            sample.draft.clear()  # a guess is worth no preemption
        end = min(sample.computed + allowed, len(sample.tokens) + len(sample.draft))
        while (missing := self._missing(sample, end)) > self.blocks.available:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sample:
                return 0
        if missing > 0:
            sample.blocks += self.blocks.take(missing, sample.blocks[-1] if sample.blocks else None)
        return self._put(batch, sample, end)

    def _missing(self, sample: Sample, end: int) -> int:
        return self.blocks.needed(end) - len(sample.blocks)

    def _put(self, batch: Batch, sample: Sample, end: int) -> int:
        begin = sample.computed
        if 0 < begin == end - 1 == len(sample.tokens) - 1 and not sample.followers:
            batch.rows.append(sample)
        else:
            batch.chunks.append(Chunk(sample, begin, end))
        if sample.followers and end == len(sample.tokens):
            self._fork(batch, sample)
        return end - begin

    def _fork(self, batch: Batch, leader: Sample) -> None:
        """Give the followers of a sample, whose prompt this batch completes, its full blocks and copies of the last."""
        length, size = len(leader.tokens), self.blocks.block_size
        full, partial = divmod(length, size)
        for place in range(len(leader.followers) - 1, -1, -1):
            if not partial or place < self.blocks.available:
                break
            follower = leader.followers.pop()
            self.running.remove(follower)
            self._preempt(follower)
        for follower in leader.followers:
            self.blocks.share(leader.blocks[:full])
            follower.blocks = leader.blocks[:full]
            if partial:
                own = self.blocks.take(1)
                batch.copies.append((leader.blocks[full], own[0], partial))
                follower.blocks += own

    def _admit_all(self, batch: Batch, allowed: int) -> None:
        while self.waiting and len(self.running) < self.max_rows and allowed > 0:
            sample = self.waiting[0]
            if not self._admit(sample):
                break
            end = min(len(sample.tokens), sample.computed + allowed)
            allowed -= self._put(batch, sample, end)

    def _admit(self, sample: Sample) -> bool:
        """Move the first waiting sample, and those that share its prompt, to the running ones if blocks suffice."""
        found, keys = self.blocks.lookup(sample.tokens, sample.root)
        missing = self.blocks.needed(len(sample.tokens)) - len(found)
        available = self.blocks.available - self.blocks.kept(found) - missing
        if available < 0:
            return False
        self.waiting.popleft()
        self.blocks.share(found)
        sample.blocks = found + self.blocks.take(missing, found[-1] if found else None)
        sample.keys, sample.computed = keys, len(found) * self.blocks.block_size
        self.running.append(sample)
        self._gather_followers(sample, available)
        self._count(sample)
        return True

    def _gather_followers(self, leader: Sample, available: int) -> None:
        own = 1 if len(leader.tokens) % self.blocks.block_size else 0
        while leader.fresh and self.waiting and len(self.running) < self.max_rows:
            other = self.waiting[0]
            available -= own
            if other.request_id != leader.request_id or not other.fresh or available < 0:
                break
            other.leader = leader
            leader.followers.append(self.waiting.popleft())
            self.running.append(other)

    def _count(self, sample: Sample) -> None:
        if not self.blocks.whole:
            self.stats.prefix_queries += len(sample.tokens)
            self.stats.prefix_hits += sample.computed
        if sample.cached is None and sample.sample_index == 0:
            self.stats.prompt_tokens += len(sample.tokens)
            self.stats.cached_tokens += sample.computed
        now = time.monotonic()
        for begun in (sample, *sample.followers):
            begun.begun_at = begun.begun_at or now
            begun.cached = sample.computed if begun.cached is None else begun.cached

    def computed(self, sample: Sample, upto: int) -> list[Sample]:
        """Say that the forward pass is done and a sample's blocks hold what they should up to a position.

        Returns:
            The samples that get their next token from it: this one and its followers, or none if its prompt goes on.
        """
        self._set_computed(sample, upto)
        if upto < len(sample.tokens):
            return []
        if not sample.followers:
            return [sample]
        followers, sample.followers = sample.followers, []
        for follower in followers:
            follower.leader = None
            follower.keys = list(sample.keys)
            follower.computed = upto
        return [sample, *followers]

    def decoded(self, rows: list[Sample]) -> None:
        """The same for rows: each has one more position."""
        size, whole = self.blocks.block_size, self.blocks.whole
        for sample in rows:
            sample.computed += 1
            if not whole and sample.computed % size == 0:
                self._set_computed(sample, sample.computed)

    def _set_computed(self, sample: Sample, tokens: int) -> None:
        sample.computed = tokens
        size = self.blocks.block_size
        while not self.blocks.whole and len(sample.keys) < tokens // size:
            at = len(sample.keys)
            key = next_key(sample.keys[-1] if at else sample.root, sample.tokens[at * size : (at + 1) * size])
            self.blocks.register(sample.blocks[at], key)
            sample.keys.append(key)

    def accept(self, sample: Sample) -> None:
        """The next token of a sample's draft was right: what was computed at its place holds."""
        self._set_computed(sample, sample.computed + 1)

    def end(self, samples: list[Sample]) -> None:
        """Samples that run have ended: their blocks are free."""
        gone = {id(sample) for sample in samples}
        self.running = [sample for sample in self.running if id(sample) not in gone]
        for sample in samples:
            self._give_up(sample)

    def abort(self, request_ids: int | Collection[int]) -> list[Sample]:
        """End the samples of a request, or of several, that have not ended, and return them."""
        ids = {request_ids} if isinstance(request_ids, int) else set(request_ids)
        ended = [sample for sample in (*self.running, *self.waiting) if sample.request_id in ids]
        self.waiting = deque(sample for sample in self.waiting if sample.request_id not in ids)
        self.end(ended)
        return ended

    def _preempt(self, sample: Sample) -> None:
        assert not sample.followers, "followers run after their leader, so they are preempted before it"
        if sample.leader is not None and sample in sample.leader.followers:
            sample.leader.followers.remove(sample)
        self._give_up(sample)
        self.waiting.appendleft(sample)
        self.stats.preemptions += 1

    def _give_up(self, sample: Sample) -> None:
        self._holes |= self.blocks.whole and bool(sample.blocks)
        self.blocks.release(sample.blocks)
        sample.blocks, sample.keys, sample.followers, sample.draft = [], [], [], []
        sample.computed, sample.leader = 0, None

    def _compact(self, batch: Batch) -> None:
        """Sequences of one block each stay the first blocks, so that decoding reads them without gathering."""
        self._holes = False
        batch.moves = self.blocks.compact()
        for sample in self.running:
            if sample.blocks and sample.blocks[0] in batch.moves:
                sample.blocks = [batch.moves[sample.blocks[0]]]
                batch.moved = max(batch.moved, sample.computed)

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self.blocks.check_integrity([sample.blocks for sample in (*self.running, *self.waiting)])
        assert len(self.running) <= self.max_rows, "more samples run than there are rows"
        assert not any(sample.blocks or sample.computed for sample in self.waiting), "a waiting sample holds blocks"
        for sample in self.running:
            assert sample.computed < len(sample.tokens) <= sample.limit, "a sample has nothing to compute"
            assert self.blocks.needed(sample.computed) <= len(sample.blocks), "computed positions without a block"
            assert len(sample.keys) <= sample.computed // self.blocks.block_size, "a key of a block that is not full"
            assert sample.leader is None or (sample in sample.leader.followers and not sample.blocks), "a lost follower"
            assert all(other.leader is sample for other in sample.followers), "a follower of another sample"
