"""What crosses layers: messages, sampling parameters, requests and completions, as plain data.

Nothing here knows about tokenizers, tensors or templates. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "aborted"]
GrammarKind = Literal["json_schema", "json", "regex", "lark"]

_MOST, _MOST_SEED = 2**32, 2**62  # whole numbers that samplers and clocks can hold


CONTEXT_OVERFLOW = "context_length_exceeded"  # code of the error for a text that the model cannot hold


class InputError(ValueError):
    """Bad input from a user; the message says what is wrong and how to mend it. Programs read the other facts.

    Args:
        message: what is wrong.
        hint: how to mend it, where another place has words of its own for that (a command line has an option); it
            stands after the message.
        field: the parameter or the place that is wrong, such as ``top_p`` or ``messages[2].content``.
        code: a word for programs, such as ``CONTEXT_OVERFLOW``.
    """

    def __init__(self, message: str, *, hint: str = "", field: str | None = None, code: str | None = None) -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.problem, self.hint, self.field, self.code = message, hint, field, code

    def with_hint(self, hint: str) -> InputError:
        """The same error with another hint."""
        return type(self)(self.problem, hint=hint, field=self.field, code=self.code)

    @classmethod
    def overflow(cls, what: str, tokens: int, limit: int, hint: str = "shorten it") -> InputError:
        """The error for a text that is too long for the model.

        Gateways in front of servers recognise it by the words "this model's maximum context length is", so all places
        that measure a text say it alike.

        Args:
            what: names the text. tokens: how long it is. limit: tokens that the model can hold.
        """
        message = f"{what} has {tokens} tokens and this model's maximum context length is {limit} tokens"
        return cls(message, hint=hint, code=CONTEXT_OVERFLOW)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call made by the assistant.

    ``raw``: the text of the arguments as it was written, only where that is no JSON object (a call that was cut off);
    ``arguments`` is empty then. Such a call can be shown again but not run.
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""
    raw: str = ""


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
            raise InputError(f"grammar kind is {self.kind!r}; use one of {', '.join(kinds)}", field="grammar")
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json"):
            needs = "takes no text" if self.kind == "json" else "needs its text, a non-empty string"
            raise InputError(f"a grammar of kind {self.kind!r} {needs}", field="grammar")


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
        for name in ("max_tokens", "n"):
            _check_whole(name, getattr(self, name), least=1)
        for name in ("min_tokens", "top_logprobs", "speculate"):
            _check_whole(name, getattr(self, name))
        _check_whole("seed", self.seed, -_MOST_SEED, _MOST_SEED)
        if self.thinking_budget is not None:
            _check_whole("thinking_budget", self.thinking_budget)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}"
            raise InputError(message, field="min_tokens")
        self._check_bias()
        if not _holds(self.stop_token_ids, Integral):
            message = f"stop_token_ids must be a tuple of token ids, got {self.stop_token_ids!r}"
            raise InputError(message, field="stop_token_ids")
        for name, kind in (("grammar", Grammar), ("post_thinking", AnswerSampling)):
            if not isinstance(getattr(self, name), kind | None):
                message = f"{name} must be {kind.__name__} or None, got {getattr(self, name)!r}"
                raise InputError(message, field=name)
        if not _holds(self.stop, str) or not all(self.stop):
            raise InputError("stop must be a tuple of non-empty strings", field="stop")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            message = "a grammar decides where the answer ends; leave min_tokens and ignore_eos out"
            raise InputError(message, field="min_tokens" if self.min_tokens else "ignore_eos")

    def _check_bias(self) -> None:
        pairs = _holds(self.logit_bias, list | tuple)
        if not pairs or not all(len(p) == 2 and _holds(p, Real) for p in self.logit_bias):
            message = f"logit_bias must be a tuple of (token id, bias) pairs, got {self.logit_bias!r}"
            raise InputError(message, field="logit_bias")
        ids = [token for token, _ in self.logit_bias]
        if len(set(ids)) < len(ids):
            raise InputError("logit_bias names a token twice; give each token one bias", field="logit_bias")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                message = f"logit_bias {bias} of token {token}: ids are >= 0, biases in [-100, 100]"
                raise InputError(message, field="logit_bias")


def _check_filters(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    _check_number("temperature", temperature, 0, 1e30)
    _check_number("min_p", min_p, 0, 1)
    _check_whole("top_k", top_k)
    if not _holds([top_p], Real) or not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p!r}", field="top_p")


def _holds(values: Any, kind: Any) -> bool:
    """Whether it is a tuple (a list does) of nothing else."""
    return isinstance(values, tuple | list) and all(isinstance(value, kind) for value in values)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    """Numbers far outside overflow in fp32, inside a step of the engine."""
    if not _holds([value], Real) or not low <= value <= high:
        raise InputError(f"{name} must be in [{low}, {high}], got {value!r}", field=name)


def _check_whole(name: str, value: Any, least: int = 0, most: int = _MOST) -> None:
    if not _holds([value], Integral) or not least <= value <= most:
        raise InputError(f"{name} must be >= {least}, whole and at most {most}, got {value!r}", field=name)


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
