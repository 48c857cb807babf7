"""From checked bodies to reply bodies: runs the jobs and puts their choices into OpenAI's envelopes.

Replies are dictionaries; a stream is an iterator of them. Not here: bytes, headers and status codes (``app.py``), the
engine's thread (``engine_loop.py``), what a choice is (``replies.py``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import twofold
from twofold.base.hub import checkpoint_name
from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.model.hf_config import read_about
from twofold.serve.config import ServeConfig
from twofold.serve.engine_loop import EngineLoop, Job
from twofold.serve.errors import ApiError, bad_request, from_input_error
from twofold.serve.metrics import Metrics
from twofold.serve.prepare import Prepared, prepare_chat, prepare_completion
from twofold.serve.protocol import ChatRequest, CompletionRequest, count_texts, read_body
from twofold.serve.replies import ChatChoice, Choice, Echo, Score, TextChoice
from twofold.serve.scoring import score_prompt
from twofold.text.policy import Family

Json = dict[str, Any]


class Reply:
    """One request on its way: what was asked, its choices, and the job once it runs."""

    ending = b"data: [DONE]\n\n"  # of a stream

    def __init__(self, service: Service, prepared: Prepared, choices: Sequence[Choice], kinds: tuple[str, str]) -> None:
        self.service, self.prepared, self.choices = service, prepared, list(choices)
        self.whole_kind, self.chunk_kind = kinds
        self.best = 0  # choices kept of each prompt's; 0 keeps all
        self.job: Job | None = None
        prefix = "chatcmpl" if isinstance(self.choices[0], ChatChoice) else "cmpl"
        self._head: Json = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def start(self) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: refused.
        """
        open_choices = [choice for choice in self.choices if choice.finish_reason is None]
        if not open_choices:
            return
        try:
            self.job = await self.service.loop.submit(self.prepared.requests)
        except InputError as error:
            raise from_input_error(error, names=self.prepared.names) from None

    def close(self) -> None:
        """Abort what still runs."""
        if self.job is not None:
            self.job.close()

    async def whole(self) -> Json:
        """The reply in one piece."""
        async for _ in self._follow():
            pass
        kept = self._kept()
        body = self._head | {
            "object": self.whole_kind,
            "choices": [choice.whole() | {"index": index} for index, choice in enumerate(kept)],
            "usage": self.usage(),
        }
        if warnings := [*self.prepared.warnings, *self._parser_warnings(kept)]:
            body["warnings"] = warnings
        if self.prepared.wanted.token_ids and isinstance(self.choices[0], ChatChoice):
            body["prompt_token_ids"] = self.prepared.prompts[0]  # completions have them in each choice
        return body

    async def chunks(self) -> AsyncIterator[Json]:
        """The reply as chunks, whose deltas put together are the whole reply.

        Every chunk but the one with usage has at least one choice: clients read ``choices[0]`` without a look.
        """
        head = self._head | {"object": self.chunk_kind}
        warnings = list(self.prepared.warnings)  # they go with the first chunk, whichever that is
        if isinstance(self.choices[0], ChatChoice):
            opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            first: Json = {"choices": [{"index": choice.index, **opening} for choice in self.choices]}
            if self.prepared.wanted.token_ids:
                first["prompt_token_ids"] = self.prepared.prompts[0]
            yield head | first | ({"warnings": warnings} if warnings else {})
            warnings = []
        async for touched in self._follow():
            deltas = [delta for choice in touched if (delta := choice.delta()) is not None]
            if not deltas:
                continue
            chunk = head | {"choices": deltas}
            ended = [choice for choice in touched if choice.finish_reason is not None]
            if warnings := [*warnings, *self._parser_warnings(ended)]:
                chunk["warnings"] = warnings
                warnings = []
            if self.prepared.usage_always:
                chunk["usage"] = self.usage()
            yield chunk
        if self.prepared.usage:
            yield head | {"choices": [], "usage": self.usage()}

    def failure(self, error: ApiError) -> Json:
        """The last chunk of a stream that breaks off."""
        return error.body()

    def usage(self) -> Json:
        """Token counts of the reply so far."""
        made = sum(choice.tokens for choice in self.choices)
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        prompt = self.prepared.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "completion_tokens_details": {"reasoning_tokens": sum(made.thinking_tokens for made in done)},
            "prompt_tokens_details": {"cached_tokens": sum(map(_cached, self._by_prompt()))},
        }

    async def _follow(self) -> AsyncIterator[list[Choice]]:
        """Feed events to choices until all have ended; yields those that got something."""
        if self.job is None:
            if self.choices:
                yield self.choices
            return
        running = len(self.choices)
        while running:
            touched: dict[int, Choice] = {}
            for number, event in await self.job.read():
                choice = touched[number] = self.choices[number]
                if choice.take(event):
                    self.job.abort(self.prepared.parts[number])
                if event.completion is not None:
                    if event.completion.error:
                        raise ApiError(400, f"the answer could not go on: {event.completion.error}", "grammar_stuck")
                    running -= 1
                    self.service.metrics.ended(choice, self.job.age(), self.job.decoding(number))
            yield list(touched.values())

    def _kept(self) -> list[Choice]:
        if not self.best:
            return self.choices
        groups = (sorted(group, key=_mean_logprob, reverse=True) for group in self._by_prompt())
        return [choice for group in groups for choice in group[: self.best]]

    def _by_prompt(self) -> list[list[Choice]]:
        size = self.prepared.per_prompt
        return [self.choices[begin : begin + size] for begin in range(0, len(self.choices), size)]

    def _parser_warnings(self, choices: Sequence[Choice]) -> list[str]:
        many = len(self.choices) > 1
        return [(f"choice {c.index}: " if many else "") + warning for c in choices for warning in c.warnings]


logger = logging.getLogger("twofold.serve")

SHOWN_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class Service:
    """A model, its engine's thread, and what requests are to be called.

    Args:
        llm: the model; after ``loop`` starts nobody else may use its engine.
    """

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.llm, self.config = llm, config
        self.name = config.name or checkpoint_name(llm.path)
        self.metrics = Metrics(config.metrics_prefix, self.name)
        self.loop = EngineLoop(
            llm.engine, self.metrics, config.max_queue, config.first_token_seconds, config.request_seconds
        )
        self.metrics.watch(self.loop)
        self.fingerprint = f"twofold-{twofold.__version__}"
        self.started = int(time.time())
        self._about: Json | None = None
        try:
            self._about = read_about(llm.path)
        except InputError as error:
            logger.warning("%s; the page shows no suggestions", error)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served; no name means the one there is."""
        if name is not None and name != self.name:
            raise ApiError(
                404, f"the model {name[:100]!r} is not served; this is {self.name!r}", "model_not_found", "model"
            )

    def card(self) -> Json:
        """The model as ``/v1/models`` shows it, with what it can do."""
        llm = self.llm
        policy = llm.renderer.policy if llm.has_renderer else None
        spec = self.family
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "twofold",
            "max_model_len": llm.model.config.longest,
            "capabilities": {
                "chat": policy is not None,
                "family": policy.family if policy is not None else None,
                "thinking": spec.thinks and spec.prompt != "closed",
                "thinking_switch": spec.switches,
                "thinking_budget": spec.thinks and llm.engine.think is not None,
                "tools": spec.tools,
            },
            "defaults": {"on": self._defaults(True), "off": self._defaults(False)},
            "about": self._about,
        }

    @property
    def family(self) -> Family:
        """What the model's chat format can do; without one, nothing."""
        plain = Family(thinks=False, prompt="plain", tools=False)
        return self.llm.renderer.policy.spec if self.llm.has_renderer else plain

    def _defaults(self, thinking: bool) -> Json:
        """How replies are sampled where a request does not say."""
        params = self.llm.params({}, thinking=thinking)
        return {name: getattr(params, name) for name in SHOWN_DEFAULTS}

    async def chat(self, data: bytes) -> Reply:
        """A chat, checked and started.

        Raises:
            ApiError: it cannot be honoured.
        """
        return await self.converse(*read_body(ChatRequest, data, thinking=True))

    async def converse(self, request: ChatRequest, controls: Json, warnings: Sequence[str]) -> Reply:
        """The same for a body that was read, from whichever protocol; arguments as ``read_body`` gives them."""
        self._check(request.model, request.n)
        prepared = await asyncio.to_thread(prepare_chat, self.llm, request, controls, warnings)
        choices = [
            ChatChoice(index, self.llm.tokenizer, prepared.wanted, ids) for index, ids in enumerate(prepared.prompts)
        ]
        reply = Reply(self, prepared, choices, ("chat.completion", "chat.completion.chunk"))
        await reply.start()
        return reply

    async def completion(self, data: bytes) -> Reply:
        """A plain completion, checked and started.

        Raises:
            ApiError: it cannot be honoured.
        """
        request, _, warnings = read_body(CompletionRequest, data)
        best_of = request.best_of or request.n
        self._check(request.model, best_of)
        self.check_samples(count_texts(request.prompt) * best_of, "prompt", "prompts times n")
        prepared = await asyncio.to_thread(prepare_completion, self.llm, request, warnings)
        try:
            echoes = await self._echoes(request, prepared)
        except InputError as error:
            raise from_input_error(error, "prompt") from None
        choices = [
            TextChoice(index, self.llm.tokenizer, prepared.wanted, *of_prompt)
            for index, of_prompt in enumerate(zip(prepared.prompts, echoes, strict=True))
        ]
        if request.max_tokens == 0:
            for choice in choices:
                choice.finish("length")
        reply = Reply(self, prepared, choices, ("text_completion", "text_completion"))
        reply.best = request.n if request.best_of is not None and request.best_of > request.n else 0
        await reply.start()
        return reply

    async def _echoes(self, request: CompletionRequest, prepared: Prepared) -> list[Echo | None]:
        """The prompts as text, with scores if they are wanted: one prompt for each call of the engine's thread."""
        if not request.echo:
            return [None] * len(prepared.prompts)
        echoes: dict[tuple[int, ...], Echo] = {}
        for ids in prepared.prompts:
            if tuple(ids) not in echoes:
                text = self.llm.tokenizer.decode(ids, skip_special_tokens=True)
                scores: list[Score] = []
                if request.logprobs is not None:
                    scores = await self.loop.call(partial(score_prompt, self.llm.model, ids, request.logprobs))
                echoes[tuple(ids)] = Echo(text, scores)
        return [echoes[tuple(ids)] for ids in prepared.prompts]

    def check_samples(self, count: int, param: str, what: str) -> None:
        """Raise ApiError 400 for more than one request may ask for."""
        if count > self.config.max_samples:
            raise bad_request(f"{what} is {count}, at most {self.config.max_samples} (max_samples); send less", param)

    def _check(self, name: str | None, n: int) -> None:
        self.check_model(name)
        if n > self.config.max_choices:
            raise bad_request(f"n is {n}, at most {self.config.max_choices} choices are made at once", "n")


def _cached(choices: Sequence[Choice]) -> int:
    """Tokens of a prompt that were in the cache when its first sample began."""
    return min((choice.completion.cached_tokens for choice in choices if choice.completion is not None), default=0)


def _mean_logprob(choice: Choice) -> float:
    assert choice.completion is not None
    values = choice.completion.logprobs[: choice.tokens]
    return sum(values) / max(len(values), 1)
