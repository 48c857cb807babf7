"""What the engine's parts say to each other: samples on their way, options, events, counters. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from twofold.base.records import Completion, InputError, Request
from twofold.engine.blocks import Key


@dataclass(eq=False, slots=True)
class Sample:
    """One sample of one request, from its queueing to its end.

    tokens: prompt, then what was made. computed: positions whose keys are in ``blocks``; those at and after it are to
    be fed. keys: of its full blocks, as far as they are known. root: what those keys start from.
    index: of its completion's request among those given together. slot: its place in the sampler, -1 before it is first
    admitted.
    leader: the sample of the same request whose prompt it waits for. cached: tokens found in the prefix cache.
    extended: coded beyond the native length of a model with a long context. limit: most tokens it may come to.
    begun_at: when its prompt was first taken up, in seconds of ``time.monotonic``.
    speculate: most tokens to guess at a time. draft: those guessed to come next, fed together with the last one.
    """

    request_id: int
    index: int
    sample_index: int
    request: Request
    root: Key
    extended: bool
    tokens: list[int]
    limit: int
    speculate: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    slot: int = -1
    leader: Sample | None = None
    followers: list[Sample] = field(default_factory=list)
    cached: int | None = None
    begun_at: float = 0.0
    draft: list[int] = field(default_factory=list)

    @property
    def fresh(self) -> bool:
        """Nothing has been made yet: another sample of the request may share its prompt."""
        return len(self.tokens) == len(self.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What need not be said.

    block_size: positions of a cache block; None lets a call of ``generate`` with many short samples give each one
        block, and takes 32 otherwise.
    kv_bytes: size of the cache; None takes half of the free memory of a CPU or 0.8 of a GPU's, as far as ``max_rows``
        sequences of the longest context can use it.
    step_tokens: most tokens of a forward pass. mixed_tokens: most prompt tokens of one that also decodes.
    entropies: record the entropy at each token, which training needs; costs passes over the vocabulary.
    replay_after: decoding steps of a kind after which a dense model's are recorded and replayed without Python, on a
        CPU; recording takes as long as about a hundred of them. None: never.
    """

    block_size: int | None = None
    kv_bytes: int | None = None
    step_tokens: int = 8192
    mixed_tokens: int = 512
    entropies: bool = True
    replay_after: int | None = 64

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_bytes", "step_tokens", "mixed_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if self.replay_after is not None and self.replay_after < 0:
            raise InputError(f"replay_after must be >= 0 or None, got {self.replay_after}")


@dataclass(frozen=True, slots=True)
class Event:
    """One new token of one sample; ``completion`` is set on a sample's last event.

    token_id is None where a sample ended without a new token, because it was aborted. logprob: natural-log probability
    under the model at temperature 1. top: the likeliest (id, log-probability) pairs, if asked for. begun_at: when the
    sample was first taken up, in seconds of ``time.monotonic``.
    """

    request_id: int
    sample_index: int
    token_id: int | None
    forced: bool = False
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    begun_at: float = 0.0
    completion: Completion | None = None


@dataclass(slots=True)
class EngineStats:
    """Where the engine stands, and counters since its start.

    running, waiting: samples. blocks_used, blocks_total: of the KV cache (0 while it has none).
    prompt_tokens: of prompts whose samples have begun, each prompt once; cached_tokens: those of them found in the
    prefix cache. prefix_queries, prefix_hits: tokens looked up and found, recomputation after preemption included.
    generated_tokens: sampled and forced ones. forced_stops: samples whose thought the engine ended; loops: those it
    ended because the thought repeated itself. drafted, accepted: tokens of prompt lookup.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    forced_stops: int = 0
    loops: int = 0
    drafted: int = 0
    accepted: int = 0
