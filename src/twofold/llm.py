"""LLM: a checkpoint ready to be used, from a Hugging Face folder or a GGUF file: model, tokenizer, renderer, engine.

It only joins them: what a message looks like is the renderer's business, what is sampled the engine's, what a reply
means the parser's. Not here: a server, tools that run, training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twofold.base.gguf_file import read_metadata
from twofold.base.records import Completion, FinishReason, InputError, Message, Request, SamplingParams, ToolCall
from twofold.engine.embed import embed, relevance
from twofold.engine.engine import Engine
from twofold.engine.rows import ThinkTokens
from twofold.model.gguf_read import load_gguf
from twofold.model.hf_config import read_generation_config
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, resolve_dtype
from twofold.text.chat import Renderer
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
from twofold.text.parse import Delta, Parsed, StreamParser, parse
from twofold.text.policy import ChatPolicy
from twofold.text.retrieval import DEFAULT_TASK, embedding_ids, query_text, rerank_ids, yes_no_ids
from twofold.text.tokenizer import Tokenizer

logger = logging.getLogger("twofold")

Messages = Sequence[Message] | Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

MAX_TOKENS = 1024  # of a reply, unless the caller says otherwise or the context ends earlier
_SAMPLING_KEYS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. completion_tokens include reasoning_tokens."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class ChatOutput:
    """One reply. ``reasoning`` is None when no think block was written.

    token_ids, logprobs and forced run in step: sampled and forced tokens, the stop token included; natural-log
    probabilities under the model at temperature 1. warnings: what the parser had to mend or flag.
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
    ) -> None:
        self.path = Path(model)
        kind, reason = resolve_dtype(dtype, device)
        logger.info("%s: computing in %s (%s)", self.path, kind, reason)
        load = _load_gguf if self.path.suffix == ".gguf" else _load_folder
        self.model, self.tokenizer, self._renderer, self._generation = load(self.path, kind, device, policy)
        if exact:
            self.model.set_attention_dtype(torch.float64)
        if self.model.config.context is not None:
            logger.info("%s: %s", self.path, self.model.config.context.describe())
        eos = self._generation.get("eos_token_id") or self.tokenizer.eos_ids
        self.engine = Engine(
            self.model,
            (eos,) if isinstance(eos, int) else tuple(eos),
            _think_tokens(self._renderer),
            max_rows,
            self.tokenizer.vocab_size,
            min_rows=16 if exact else 1,
        )

    @property
    def renderer(self) -> Renderer:
        """The checkpoint's renderer.

        Raises:
            InputError: the checkpoint has no chat template that is known; the message says how to choose one.
        """
        if isinstance(self._renderer, InputError):
            raise InputError(str(self._renderer))
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
                temperature, ...); what is not given comes from the checkpoint's generation_config.json.

        Raises:
            InputError: naming the message and field, or the parameter, that cannot be honoured.
        """
        ids = self.renderer.prompt_ids(messages, tools, thinking=thinking)
        request = self._one(ids, sampling)
        completion = self.engine.generate([request])[0]
        return self._output(ids, completion, parse(self.tokenizer, completion.token_ids, ids))

    def stream(
        self, messages: Messages, tools: Tools | None = None, *, thinking: bool = True, **sampling: Any
    ) -> Iterator[Delta]:
        """Like ``chat``, but yields the reply's pieces (reasoning, content, calls) as they are made."""
        ids = self.renderer.prompt_ids(messages, tools, thinking=thinking)
        request = self._one(ids, sampling)
        parser = StreamParser(self.tokenizer, ids)
        for token, _ in self.engine.stream(request):
            yield from parser.feed(token)
        yield from parser.end()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue plain prompts, without a chat format; order is by prompt, then sample.

        Args:
            prompts: texts (spellings of control tokens in them count as such) or lists of token ids.
            params: None takes the checkpoint's defaults.

        Raises:
            InputError: one string instead of a list of them, an empty prompt, a token that the model does not have,
                or a prompt as long as the model's context.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list, of texts or of token lists; put the text into one: [text]")
        lists = [self.tokenizer.encode_with_special(p) if isinstance(p, str) else list(p) for p in prompts]
        return self.engine.generate([self._request(ids, {} if params is None else params) for ids in lists])

    def text(self, completion: Completion) -> str:
        """The text of a completion, without end-of-turn tokens."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def score(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """fp32 log-probability of each token given those before it, from the second token on (length - 1 each).

        Raises:
            InputError: fewer than two tokens, more than the model's context, or a token that the model does not have.
        """
        for tokens in token_lists:
            self._check_tokens(tokens)
            if len(tokens) > self.model.config.longest:
                raise InputError(f"{len(tokens)} tokens to score, the model's context is {self.model.config.longest}")
        return self.engine.score(token_lists)

    def embed(self, texts: Sequence[str], task: str | None = None, dimensions: int | None = None) -> torch.Tensor:
        """Embedding vectors in Qwen3-Embedding's form, L2-normalised fp32 [texts, dimensions or model width].

        Args:
            texts: queries where ``task`` says in a sentence what is looked for, documents without. dimensions: keep the
                first ones (Matryoshka).

        Raises:
            InputError: a text too long for the model, or dimensions out of range.
        """
        shown = [text if task is None else query_text(text, task) for text in texts]
        limit = self.model.config.longest
        return embed(self.model, [embedding_ids(self.tokenizer, text, limit) for text in shown], dimensions)

    def rerank(self, query: str, documents: Sequence[str], task: str = DEFAULT_TASK) -> list[float]:
        """How relevant each document is to the query, 0 to 1, in Qwen3-Reranker's form.

        Raises:
            InputError: a document too long for the model, or a tokenizer without the tokens "yes" and "no".
        """
        limit = self.model.config.longest
        pairs = [rerank_ids(self.tokenizer, query, text, task, max_tokens=limit) for text in documents]
        return relevance(self.model, pairs, *yes_no_ids(self.tokenizer)).tolist()

    def _check_tokens(self, ids: Sequence[int]) -> None:
        rows = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            strange = next(token for token in ids if not 0 <= token < rows)
            raise InputError(f"token {strange} is none of the model's {rows}; encode the text with its own tokenizer")

    def _request(self, ids: list[int], sampling: Mapping[str, Any] | SamplingParams) -> Request:
        """A request with what is not given taken from the checkpoint, and no more tokens than the context has room."""
        self._check_tokens(ids)
        room = self.model.config.longest - len(ids)
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, the model's context {self.model.config.longest}")
        params = sampling if isinstance(sampling, SamplingParams) else self._params(sampling)
        if not isinstance(sampling, SamplingParams) and "max_tokens" not in sampling:
            room = min(room, self._native_room(len(ids)) or room)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        return Request(tuple(ids), params, StreamParser(self.tokenizer, ids).in_think)

    def _native_room(self, length: int) -> int:
        """Tokens after which a sequence would be coded beyond the native length; 0 where that is decided already."""
        context = self.model.config.context
        return 0 if context is None or context.always else max(0, context.native + 1 - length)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        own = {key: self._generation[key] for key in _SAMPLING_KEYS if self._generation.get(key) is not None}
        if self._generation.get("do_sample") is False:
            own = {"temperature": 0.0}
        known = SamplingParams.__dataclass_fields__
        if unknown := sorted(sampling.keys() - known):
            raise InputError(f"unknown sampling parameter {unknown[0]!r}; there are {', '.join(known)}")
        return SamplingParams(**{"max_tokens": MAX_TOKENS, **own, **sampling})

    def _one(self, ids: list[int], sampling: Mapping[str, Any]) -> Request:
        request = self._request(ids, sampling)
        if request.params.n != 1:
            raise InputError(f"a chat has one reply, n = {request.params.n} asks for more; use generate")
        return request

    def _output(self, ids: list[int], completion: Completion, parsed: Parsed) -> ChatOutput:
        usage = Usage(len(ids), len(completion.token_ids), completion.thinking_tokens)
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
        )


_Loaded = tuple[Qwen3, Tokenizer, Renderer | InputError, dict[str, Any]]


def _load_folder(folder: Path, dtype: torch.dtype, device: str | torch.device, policy: ChatPolicy | None) -> _Loaded:
    model = load_weights(folder, dtype, device)
    tokenizer = Tokenizer.from_folder(folder)
    renderer = _or_error(lambda: Renderer.from_pretrained(folder, policy))
    return model, tokenizer, renderer, read_generation_config(folder)


def _load_gguf(path: Path, dtype: torch.dtype, device: str | torch.device, policy: ChatPolicy | None) -> _Loaded:
    metadata = read_metadata(path)
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    model = load_gguf(path, dtype, device)
    template = metadata.get("tokenizer.chat_template")
    renderer = _or_error(lambda: Renderer.from_parts(tokenizer, template, policy))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return model, tokenizer, renderer, {} if eos is None else {"eos_token_id": eos}


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
