"""What crosses layers: messages, sampling parameters, requests and completions, as plain data.

Nothing here knows about tokenizers, tensors or templates. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "aborted"]
GrammarKind = Literal["json_schema", "json", "regex", "lark"]


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
class AnswerSampling:
    """How to draw the tokens after the think block, where that differs from the thought."""

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check_filters(self.temperature, self.top_p, self.top_k, self.min_p)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, from its first character to its last; thoughts are free.

    kind: "json_schema" (text: the schema), "json" (any JSON object; no text), "regex" (Rust's syntax, the whole answer
    matches), "lark" (llguidance's dialect of Lark; ``<tool_call>`` outside quotes is the control token).
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise InputError(f"grammar kind is {self.kind!r}; use one of {', '.join(kinds)}")
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json"):
            needs = "takes no text" if self.kind == "json" else "needs its text, a non-empty string"
            raise InputError(f"a grammar of kind {self.kind!r} {needs}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request.

    temperature 0 (or below 1e-5) is greedy. Filters, in this order, on the distribution at that temperature: ``min_p``
    keeps tokens with at least that share of the likeliest one's probability, ``top_k`` the k likeliest, ``top_p`` the
    nucleus of what is left; 0, 0 and 1 switch them off. Penalties come before that: presence is subtracted once,
    frequency once for each occurrence, both for generated tokens; repetition (1 = off) divides positive and multiplies
    negative logits of tokens in prompt or generated text. ``logit_bias``: (token id, -100..100) pairs, added first.

    ``thinking_budget`` is the largest number of tokens inside the think block before the stop text is forced (None: no
    limit); ``stop_loops`` ends a thought that repeats itself the same way. ``post_thinking`` samples the answer after
    the block otherwise (None: the same). ``grammar`` binds the answer, never the thought.

    ``seed`` makes the tokens a function of (seed, position) alone, whatever else is in the batch. ``n`` samples per
    prompt use seeds seed, seed+1, …. ``stop_token_ids`` end a completion like the checkpoint's own end tokens do;
    ``stop`` strings end an answer, for those who read text (the engine sees tokens only); ``ignore_eos`` makes the
    checkpoint's end tokens ordinary ones, and no end token is drawn among the first ``min_tokens``.
    ``top_logprobs`` likeliest tokens are reported at each place. ``speculate``: tokens drafted by prompt lookup at a
    time (0 = off); the tokens stay the same.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    n: int = 1
    seed: int = 0
    thinking_budget: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    post_thinking: AnswerSampling | None = None
    stop_loops: bool = False
    grammar: Grammar | None = None
    speculate: int = 0

    def __post_init__(self) -> None:
        _check_filters(self.temperature, self.top_p, self.top_k, self.min_p)
        if self.max_tokens < 1 or self.n < 1:
            raise InputError(f"max_tokens and n must be >= 1, got {self.max_tokens} and {self.n}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise InputError(f"thinking_budget must be >= 0 or None, got {self.thinking_budget}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be > 0 (1 = off), got {self.repetition_penalty}")
        for name in ("min_tokens", "top_logprobs", "speculate"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        self._check_bias()
        if isinstance(self.stop, str) or any(not isinstance(stop, str) or not stop for stop in self.stop):
            raise InputError("stop must be a tuple of non-empty strings")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise InputError("a grammar decides where the answer ends; leave min_tokens and ignore_eos out")

    def _check_bias(self) -> None:
        ids = [token for token, _ in self.logit_bias]
        if len(set(ids)) < len(ids):
            raise InputError("logit_bias names a token twice; give each token one bias")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise InputError(f"logit_bias {bias} of token {token}: ids are >= 0, biases in [-100, 100]")


def _check_filters(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise InputError(f"top_k must be >= 0 (0 = off), got {top_k}")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p must be in [0, 1] (0 = off), got {min_p}")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, already rendered to token ids, and how to continue it.

    ``in_think`` says that the prompt ends inside an open think block (a template that pre-fills ``<think>``),
    ``after_think`` that it ends after one (an empty block where thinking is off), so that the answer comes next.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    in_think: bool = False
    after_think: bool = False


@dataclass(slots=True)
class Completion:
    """What the engine made of one sample of one request.

    token_ids: sampled and forced tokens, the stop token included.
    logprobs: natural-log probability of each token under the model at temperature 1 (fp32).
    forced: True where the engine, not the model, chose the token (budget stop text); no gradient belongs there.
    entropies: entropy in nats of the model's distribution at each place (temperature 1); empty if not recorded.
    policy_version: version of the weights that produced the tokens.
    top_logprobs: for each token the likeliest (id, log-probability) pairs at its place, as many as were asked for.
    cached_tokens: tokens of the prompt that came from the prefix cache.
    looped: the thought repeated itself and was ended for that.
    error: why the engine had to give a sample up ("aborted"), else empty.
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
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    cached_tokens: int = 0
    looped: bool = False
    error: str = ""
