"""LLM: a checkpoint ready to be used, from a Hugging Face folder or a GGUF file: model, tokenizer, renderer, engine.

It only joins them: what a message looks like is the renderer's business, what is sampled the engine's, what a reply
means the parser's. Stop strings are watched for here, because the engine sees no text. Not here: a server, tools that
run, training.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from twofold.base.gguf_file import is_gguf, read_metadata
from twofold.base.records import Completion, FinishReason, InputError, Message, Request, SamplingParams, ToolCall
from twofold.engine.embed import embed, relevance
from twofold.engine.engine import Engine, EngineOptions, Event, ThinkTokens
from twofold.engine.generation import config_warnings, sampling_defaults
from twofold.engine.grammar import Grammars
from twofold.model.config import ModelConfig
from twofold.model.gguf_read import open_gguf
from twofold.model.hf_config import read_generation_config, said_ends
from twofold.model.inspect import tokenizer_warnings
from twofold.model.peft_io import CONFIG as ADAPTER
from twofold.model.quantised import load_quantised
from twofold.model.weights import CONFIG, TensorSource, build, check_device, open_folder, resolve_dtype
from twofold.text.chat import Renderer
from twofold.text.gguf_tokenizer import gguf_ends, gguf_template, tokenizer_from_gguf
from twofold.text.parse import Delta, Parsed, ParseOptions, StreamParser, parse
from twofold.text.policy import ChatPolicy
from twofold.text.retrieval import DEFAULT_TASK, embedding_ids, query_text, rerank_ids, yes_no_ids
from twofold.text.stops import StopMatcher
from twofold.text.tokenizer import StreamDecoder, Tokenizer

logger = logging.getLogger("twofold")

Messages = Sequence[Message] | Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

MAX_TOKENS = 1024  # of a reply, unless caller or checkpoint say otherwise or the context ends earlier
FIELDS = frozenset(SamplingParams.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. completion_tokens include reasoning_tokens; cached_tokens are part of the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatOutput:
    """One reply. ``reasoning`` is None when no think block was written.

    token_ids, logprobs and forced run in step: sampled and forced tokens, the stop token included; natural-log
    probabilities under the model at temperature 1. top_logprobs: the likeliest (id, log-probability) pairs at each
    place, if asked for. warnings: what the parser had to mend or flag.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    token_ids: list[int]
    logprobs: list[float]
    forced: list[bool]
    warnings: tuple[str, ...] = ()
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


class LLM:
    """A model to chat with, to continue text with, and to score text with.

    Args:
        model: a Hugging Face folder or a .gguf file.
        dtype: "auto" (bf16 on GPUs that have it, fp32 elsewhere; the reason is logged), a torch dtype or its name.
        device: where the weights go.
        policy: the chat format, where the checkpoint's own template is missing or unknown.
        max_rows: most sequences decoded together.
        exact: compute attention in fp64 and keep at least 16 rows, so that sampled log-probabilities equal a
            trainer's to the bit on a CPU (``docs/numerics.md``).
        options: of the engine: size of the cache and of steps, and what is recorded.
        quantize: "int8" or "float16" packs the weights for a CPU's kernels as they are read: faster, and no training.

    Raises:
        InputError: no such checkpoint, or one that is damaged, incomplete or of an unknown kind.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        policy: ChatPolicy | None = None,
        max_rows: int = 512,
        exact: bool = False,
        options: EngineOptions | None = None,
        quantize: str | None = None,
    ) -> None:
        self.path = Path(model)
        _check_path(self.path)
        kind, reason = resolve_dtype(dtype, check_device(device))
        logger.info("%s: computing in %s (%s)", self.path, kind, reason)
        one_file = is_gguf(self.path)
        load = _read_gguf if one_file else _read_folder
        self.tokenizer, self._renderer, self._generation, ends_said = load(self.path, policy)
        config: ModelConfig
        source: TensorSource
        config, source = open_gguf(self.path) if one_file else open_folder(self.path)
        ends = self.tokenizer.ends(ends_said, config.vocab_size)
        if quantize is None:
            self.model = build(config, source, kind, device)
        else:
            self.model = load_quantised(config, source, quantize, kind, device)
        if exact:
            self.model.set_attention_dtype(torch.float64)
        if self.model.config.context is not None:
            logger.info("%s: %s", self.path, self.model.config.context.describe())
        for warning in (*tokenizer_warnings(self.tokenizer, self.model.config), *config_warnings(self._generation)):
            logger.warning("%s: %s", self.path, warning)
        self.engine = Engine(
            self.model,
            ends,
            _think_tokens(self._renderer),
            max_rows,
            self.tokenizer.vocab_size,
            min_rows=16 if exact else 1,
            grammars=Grammars(self.tokenizer, ends),
            options=options,
        )

    @property
    def renderer(self) -> Renderer:
        """The checkpoint's renderer.

        Raises:
            InputError: the checkpoint has no chat template that is known; the message says how to choose one.
        """
        if isinstance(self._renderer, InputError):
            raise type(self._renderer)(str(self._renderer))
        return self._renderer

    @property
    def has_renderer(self) -> bool:
        """False where the checkpoint has no chat template that is known."""
        return isinstance(self._renderer, Renderer)

    def chat(
        self, messages: Messages, tools: Tools | None = None, *, thinking: bool = True, **sampling: Any
    ) -> ChatOutput:
        """Reply to a conversation.

        Args:
            messages: ``Message`` records or dictionaries in OpenAI's form. tools: JSON-able descriptions.
            thinking: False is the hard switch. sampling: fields of ``SamplingParams`` (thinking_budget, max_tokens,
                temperature, stop, ...); what is not given comes from the checkpoint's generation_config.json.

        Raises:
            InputError: naming the message and field, or the parameter, that cannot be honoured.
        """
        ids = self.renderer.prompt_ids(messages, tools, thinking=thinking)
        request = self._one(ids, sampling, thinking)
        options = ParseOptions(stop=request.params.stop, tools=tools)
        completion = self._complete([request], lambda _: _ReplyWatch(self.tokenizer, ids, options))[0]
        return self._output(ids, completion, parse(self.tokenizer, completion.token_ids, ids, options))

    def stream(
        self, messages: Messages, tools: Tools | None = None, *, thinking: bool = True, **sampling: Any
    ) -> Iterator[Delta]:
        """Like ``chat``, but yields the reply's pieces (reasoning, content, calls) as they are made."""
        ids = self.renderer.prompt_ids(messages, tools, thinking=thinking)
        request = self._one(ids, sampling, thinking)
        parser = StreamParser(self.tokenizer, ids, ParseOptions(stop=request.params.stop, tools=tools))
        with closing(self.engine.stream(request)) as tokens:
            for token, _ in tokens:
                yield from parser.feed(token)
                if parser.state == "done" and request.params.stop:
                    break
        yield from parser.end()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue plain prompts, without a chat format; order is by prompt, then sample.

        Args:
            prompts: texts (spellings of control tokens in them count as such, and a model that has a token to begin
                texts with gets it) or lists of token ids, taken as they are: whole numbers, also in an array or tensor.
            params: None takes the checkpoint's defaults.

        Raises:
            InputError: one string instead of a list of them, an empty prompt, one that is neither text nor token ids, a
                token that the model does not have, or a prompt as long as the model's context.
        """
        _check_list(prompts, "prompts")
        lists = [self.tokenizer.encode_prompt(p) if isinstance(p, str) else _whole_numbers(p) for p in prompts]
        requests = [self.request(ids, {} if params is None else params) for ids in lists]
        return self._complete(requests, lambda request: _TextWatch(self.tokenizer, request.params.stop))

    def text(self, completion: Completion, stop: Sequence[str] = ()) -> str:
        """The text of a completion, without end-of-turn tokens, up to the first of the ``stop`` strings."""
        matcher = StopMatcher(stop)
        text = matcher.feed(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        return text + matcher.flush()

    def score(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """fp32 log-probability of each token given those before it, from the second token on (length - 1 each).

        Raises:
            InputError: what is no list of token lists, fewer than two tokens in one, more than the model's context, or
                a token that the model does not have.
        """
        _check_list(token_lists, "token_lists")
        lists = [_whole_numbers(tokens) for tokens in token_lists]
        for tokens in lists:
            self.check_tokens(tokens)
            if len(tokens) > self.model.config.longest:
                raise InputError(f"{len(tokens)} tokens to score, the model's context is {self.model.config.longest}")
        return self.engine.score(lists)

    def embed(
        self, texts: Sequence[str], task: str | None = None, dimensions: int | None = None, truncate: bool = False
    ) -> torch.Tensor:
        """Embedding vectors in Qwen3-Embedding's form, L2-normalised fp32 [texts, dimensions or model width].

        Args:
            texts: queries where ``task`` says in a sentence what is looked for, documents without. dimensions: keep the
                first ones (Matryoshka). truncate: cut off the end of a text that is too long for the model.

        Raises:
            InputError: one string instead of a list of them, a text too long for the model, or dimensions that are no
                whole number in range.
        """
        _check_list(texts, "texts")
        shown = [text if task is None else query_text(text, task) for text in texts]
        limit = self.model.config.longest
        return embed(self.model, [embedding_ids(self.tokenizer, text, limit, truncate) for text in shown], dimensions)

    def rerank(
        self, query: str, documents: Sequence[str], task: str = DEFAULT_TASK, truncate: bool = False
    ) -> list[float]:
        """How relevant each document is to the query, 0 to 1, in Qwen3-Reranker's form.

        Args:
            truncate: cut off the end of a document that is too long for the model.

        Raises:
            InputError: one string instead of a list of documents, a document too long for the model, or a tokenizer
                without the tokens "yes" and "no".
        """
        _check_list(documents, "documents")
        limit = self.model.config.longest
        pairs = [rerank_ids(self.tokenizer, query, text, task, limit, truncate) for text in documents]
        return relevance(self.model, pairs, *yes_no_ids(self.tokenizer)).tolist()

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Raise InputError for an id that the model has no embedding for."""
        rows = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            strange = next(token for token in ids if not 0 <= token < rows)
            raise InputError(f"token {strange} is none of the model's {rows}; encode the text with its own tokenizer")

    def request(
        self, ids: Sequence[int], sampling: Mapping[str, Any] | SamplingParams, *, thinking: bool | None = None
    ) -> Request:
        """A prompt as a request for the engine, with no more tokens than the context has room for.

        Where nobody says how many, a model with a long context is not asked for more than its native length holds, so
        that a short prompt is coded natively; unless that would leave less than ``MAX_TOKENS`` of what it may write.

        Args:
            ids: the prompt. sampling: parameters; where it is a mapping, what is not given comes from the checkpoint.
            thinking: the mode whose defaults count; None for text without modes.

        Raises:
            InputError: a token that the model does not have, a prompt as long as the context, or a bad parameter.
        """
        self.check_tokens(ids)
        room = self.model.config.longest - len(ids)
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, the model's context {self.model.config.longest}")
        params = sampling if isinstance(sampling, SamplingParams) else self.params(sampling, thinking=thinking)
        self.check_tokens([*params.stop_token_ids, *(token for token, _ in params.logit_bias)])
        if not isinstance(sampling, SamplingParams) and "max_tokens" not in sampling:
            native = self._native_room(len(ids))
            room = native if native >= min(MAX_TOKENS, params.max_tokens) else room
        if params.max_tokens > room:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        state = StreamParser(self.tokenizer, ids).state
        return Request(tuple(ids), params, in_think=state == "think", after_think=state == "answer")

    def params(self, sampling: Mapping[str, Any], *, thinking: bool | None = None) -> SamplingParams:
        """Sampling parameters, completed from the checkpoint for a mode (None: text without modes).

        Raises:
            InputError: an unknown parameter or an impossible value.
        """
        if unknown := sorted(sampling.keys() - FIELDS):
            raise InputError(f"unknown sampling parameter {unknown[0]!r}; there are {', '.join(sorted(FIELDS))}")
        own = sampling_defaults(self._generation, thinking)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in sampling.items()}
        values = {"max_tokens": MAX_TOKENS, **own, **given}
        if "min_tokens" not in given:
            values["min_tokens"] = min(values.get("min_tokens", 0), values["max_tokens"])
        return SamplingParams(**values)

    def _native_room(self, length: int) -> int:
        """Tokens after which a sequence would be coded beyond the native length; 0 where that is decided already."""
        context = self.model.config.context
        return 0 if context is None or context.always else max(0, context.native + 1 - length)

    def _one(self, ids: list[int], sampling: Mapping[str, Any], thinking: bool) -> Request:
        request = self.request(ids, sampling, thinking=thinking)
        if request.params.n != 1:
            raise InputError(f"a chat has one reply, n = {request.params.n} asks for more; use generate")
        return request

    def _complete(self, requests: Sequence[Request], watch: Callable[[Request], _Watch]) -> list[Completion]:
        """Complete requests; samples with stop strings end where ``watch`` finds one."""
        if not any(request.params.stop for request in requests):
            return self.engine.generate(requests)
        samples = [
            (index, sample, replace(request, params=replace(request.params, n=1, seed=request.params.seed + sample)))
            for index, request in enumerate(requests)
            for sample in range(request.params.n)
        ]
        running: dict[int, int] = {}
        watches = [watch(request) for _, _, request in samples]
        lengths: dict[int, int] = {}  # tokens up to the one that completed a stop string
        done: dict[int, Completion] = {}
        events: list[Event] = []
        try:
            for number, (_, _, request) in enumerate(samples):
                running[self.engine.add(request, sink=events)] = number
            while len(done) < len(samples):
                self.engine.advance()
                for event in events:  # an abort adds its last event to those being read
                    number, token = running[event.request_id], event.token_id
                    if token is not None and number not in lengths and watches[number].stops_at(token):
                        lengths[number] = watches[number].tokens
                        self.engine.abort(event.request_id)
                    if event.completion is not None:
                        done[number] = _cut(event.completion, *samples[number][:2], lengths.get(number))
                events.clear()
        finally:
            self.engine.abort(running)
        return [done[number] for number in range(len(samples))]

    def _output(self, ids: list[int], completion: Completion, parsed: Parsed) -> ChatOutput:
        made, thought = len(completion.token_ids), completion.thinking_tokens
        usage = Usage(len(ids), made, thought, completion.cached_tokens)
        return ChatOutput(
            reasoning=parsed.reasoning,
            content=parsed.content,
            tool_calls=tuple(parsed.tool_calls),
            finish_reason=completion.finish_reason,
            usage=usage,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            forced=completion.forced,
            warnings=tuple(parsed.errors),
            top_logprobs=completion.top_logprobs,
        )


def _check_path(path: Path) -> None:
    """Refuse what is not there, and an adapter by its name."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a model folder or a .gguf file, downloaded before")
    if (path / ADAPTER).is_file() and not (path / CONFIG).is_file():
        advice = "load the model it was made for, then peft_io.load_adapter(llm.model, folder)"
        raise InputError(f"{path} is an adapter, not a model; {advice}")


def _check_list(value: object, name: str) -> None:
    if isinstance(value, str | bytes):
        raise InputError(f"{name} must be a list, this is one string; put it into a list: [text]")


def _whole_numbers(tokens: object) -> list[int]:
    """Token ids from a list, an array or a tensor.

    Raises:
        InputError: it is something else, a text for one, or has numbers that are not whole.
    """
    values = tokens.tolist() if isinstance(tokens, torch.Tensor | np.ndarray) else tokens
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        with suppress(TypeError):
            return [operator.index(value) for value in values]
    raise InputError(f"token ids must be a list of whole numbers, got {str(tokens)[:60]!r}")


class _Watch(Protocol):
    """Reads tokens of one sample; ``tokens`` is how many it has read."""

    tokens: int

    def stops_at(self, token_id: int) -> bool:
        """Read a token; True when it completes a stop string."""


class _ReplyWatch:
    """Stop strings in the answer of a chat; thoughts and calls may mention them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: ParseOptions) -> None:
        self.tokens = 0
        self._parser = StreamParser(tokenizer, prompt_ids, options)

    def stops_at(self, token_id: int) -> bool:
        self.tokens += 1
        self._parser.feed(token_id)
        return self._parser.state == "done" and self._parser.finish().stop is not None


class _TextWatch:
    """Stop strings anywhere in plain text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokens = 0
        self._tokenizer, self._decoder, self._matcher = tokenizer, StreamDecoder(tokenizer), StopMatcher(stop)

    def stops_at(self, token_id: int) -> bool:
        self.tokens += 1
        if not self._tokenizer.is_special(token_id):
            self._matcher.feed(self._decoder.feed(token_id))
        return self._matcher.matched is not None


def _cut(completion: Completion, index: int, sample: int, length: int | None) -> Completion:
    """A sample under the caller's numbers, up to the token that completed its stop string."""
    own = replace(completion, request_index=index, sample_index=sample)
    if length is None:
        return own
    names = ("token_ids", "logprobs", "forced", "entropies", "top_logprobs")
    return replace(own, finish_reason="stop", **{name: getattr(own, name)[:length] for name in names})


# Tokenizer, renderer, generation_config.json, and what the files say about end tokens, as (where, value).
_Read = tuple[Tokenizer, Renderer | InputError, dict[str, Any], list[tuple[str, Any]]]


def _read_folder(folder: Path, policy: ChatPolicy | None) -> _Read:
    tokenizer = Tokenizer.from_folder(folder)
    renderer = _or_error(lambda: Renderer.from_pretrained(folder, policy))
    return tokenizer, renderer, read_generation_config(folder), said_ends(folder)


def _read_gguf(path: Path, policy: ChatPolicy | None) -> _Read:
    metadata = read_metadata(path)
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    template = gguf_template(metadata, str(path))
    renderer = _or_error(lambda: Renderer.from_parts(tokenizer, template, policy))
    return tokenizer, renderer, {}, [(str(path), list(gguf_ends(metadata, tokenizer, str(path))))]


def _or_error(make: Callable[[], Renderer]) -> Renderer | InputError:
    """A base model can be continued and scored without a chat format; the error is raised when one is needed."""
    try:
        return make()
    except InputError as error:
        return error


def _think_tokens(renderer: Renderer | InputError) -> ThinkTokens | None:
    if isinstance(renderer, InputError):
        return None
    opening, closing = renderer.tokenizer.think_open, renderer.tokenizer.think_close
    if opening is None or closing is None:
        return None
    return ThinkTokens(opening, closing, tuple(renderer.stop_ids))
