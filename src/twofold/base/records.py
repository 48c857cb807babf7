"""What crosses layers: messages, sampling parameters, requests and completions, as plain data.

Nothing here knows about tokenizers, tensors or templates. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "aborted"]


class InputError(ValueError):
    """Bad input from a user; the message says what is wrong and how to mend it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call made by the assistant."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    ``reasoning`` is the text inside the think block (assistant only): None means "no block was written",
    an empty string means an empty block. ``tool_call_id``: the call that a tool's result answers; no template shows it.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request.

    temperature 0 is greedy; top_p 1 and top_k 0 switch those filters off. ``thinking_budget`` is the largest
    number of tokens inside the think block before the stop text is forced (None: no limit). ``seed`` makes the
    tokens a function of (seed, position) alone, whatever else is in the batch. ``n`` samples per prompt use
    seeds seed, seed+1, …. ``stop_token_ids`` end a completion like the checkpoint's own end tokens do.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    n: int = 1
    seed: int = 0
    thinking_budget: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be >= 0 (0 = off), got {self.top_k}")
        if self.max_tokens < 1 or self.n < 1:
            raise InputError(f"max_tokens and n must be >= 1, got {self.max_tokens} and {self.n}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise InputError(f"thinking_budget must be >= 0 or None, got {self.thinking_budget}")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, already rendered to token ids, and how to continue it.

    ``in_think`` says that the prompt ends inside an open think block (a template that pre-fills ``<think>``).
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    in_think: bool = False


@dataclass(slots=True)
class Completion:
    """What the engine made of one sample of one request.

    token_ids: sampled and forced tokens, the stop token included.
    logprobs: natural-log probability of each token under the model at temperature 1 (fp32).
    forced: True where the engine, not the model, chose the token (budget stop text); no gradient belongs there.
    entropies: entropy in nats of the distribution each token was drawn from (temperature 1).
    policy_version: version of the weights that produced the tokens.
    """

    request_index: int
    sample_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    thinking_tokens: int = 0
    policy_version: int = 0
