"""Checked bodies to engine requests: rendering, sampling parameters, stop strings, budgets, grammars.

What comes out is plain data, ready to be submitted; nothing runs here. Rendering and tokenising happen in the caller's
thread. Not here: the engine's thread, how replies are put together.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twofold.base.records import AnswerSampling, InputError, Request
from twofold.llm import LLM
from twofold.serve.constraints import (
    ToolPlan,
    answer_grammar,
    call_grammar,
    forbidden_calls,
    grammar_field,
    plan_tools,
)
from twofold.serve.controls import Thinking, about_thoughts, places, read_thinking
from twofold.serve.errors import bad_request, from_input_error
from twofold.serve.protocol import ChatRequest, CompletionRequest, PostThinking, SamplingFields, StreamOptions
from twofold.serve.replies import Wanted
from twofold.text.chat import Renderer
from twofold.text.parse import ParseOptions

Json = dict[str, Any]
_COPIED = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_COPIED_TOO = ("min_tokens", "ignore_eos", "speculate")


@dataclass(slots=True)
class Prepared:
    """A request ready to be submitted.

    requests: for the engine. parts: for each choice, the index of its engine request. prompts: for each choice, the
    ids of its prompt. per_prompt: choices of each prompt. prompt_tokens: of all prompts. wanted: what the reply shows.
    names: fields of the engine's requests -> what the body calls them, for errors. stream, usage, usage_always: how it
    is sent.
    """

    requests: list[Request]
    parts: list[int]
    prompts: list[list[int]]
    per_prompt: int
    prompt_tokens: int
    wanted: Wanted
    names: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stream: bool = False
    usage: bool = False
    usage_always: bool = False


def prepare_chat(llm: LLM, request: ChatRequest, controls: Json, warnings: Sequence[str] = ()) -> Prepared:
    """A chat as engine requests.

    Raises:
        ApiError: 400, naming the field or message that cannot be honoured.
    """
    thinking = read_thinking(controls)
    plan = plan_tools(request)
    names = {**places(controls), "grammar": grammar_field(request)}
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        thinks = llm.renderer.policy.spec.thinks
        ids, notes = prompt_ids(llm, request, plan, thinking, controls)
        unheard = [*_without_thought(request, controls, thinks, thinking), *notes]
        sampling = _chat_sampling(llm, request, plan)
        mode = thinks and thinking.enabled is not False
        sampling |= _budget(llm, ids, sampling, thinking)
        [base] = _requests(llm, [ids], sampling, mode)
        wanted = _chat_wanted(request, base, plan, thinking)
        return _prepared([base], request, wanted, names, [*warnings, *unheard])
    except InputError as error:
        raise from_input_error(error, "messages", names) from None


def prepare_completion(llm: LLM, request: CompletionRequest, warnings: Sequence[str] = ()) -> Prepared:
    """Plain prompts as engine requests; with ``max_tokens`` 0 there are none to run, only prompts to echo.

    Raises:
        ApiError: 400, naming the field that cannot be honoured.
    """
    prompts = token_lists(llm, request.prompt, request.add_special_tokens)
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens 0 makes sense only with echo", "max_tokens")
    best_of = request.best_of if request.best_of is not None else request.n
    if best_of < request.n or (best_of > request.n and request.stream):
        raise bad_request("best_of must be at least n, and equal to n in a stream", "best_of")
    sampling = _sampling(request) | {"n": best_of}
    if request.logprobs:
        sampling["top_logprobs"] = request.logprobs
    names = {"grammar": grammar_field(request)}
    try:
        if (grammar := answer_grammar(request)) is not None:
            sampling["grammar"] = grammar
        if request.max_tokens == 0:
            sampling["max_tokens"] = 1
        bases = _requests(llm, prompts, sampling, None)
        wanted = Wanted(
            top_logprobs=request.logprobs,
            token_ids=request.return_token_ids,
            stop=_stops(request, bases[0]),
            stop_ids=frozenset(request.stop_token_ids or ()),
        )
        return _prepared(bases, request, wanted, names, list(warnings))
    except InputError as error:
        raise from_input_error(error, "prompt", names) from None


def prompt_ids(
    llm: LLM, request: ChatRequest, plan: ToolPlan, thinking: Thinking, controls: Json
) -> tuple[list[int], list[str]]:
    """The rendered conversation, and warnings about what in it is damaged or not shown.

    Raises:
        ApiError, InputError: a conversation or mode that the checkpoint's format cannot show.
    """
    renderer = llm.renderer
    policy = renderer.policy
    if not policy.spec.thinks and (thinking.enabled or thinking.budget is not None or thinking.keep_history):
        message = f"this model does not think (template family {policy.family!r}); leave the controls out"
        raise bad_request(message, next(iter(controls), None))
    if thinking.keep_history is not None:
        renderer = Renderer(
            llm.tokenizer, replace(policy, history_thinking="keep" if thinking.keep_history else "strip")
        )
    messages, notes = llm.read_messages(request.messages)
    tools = list(plan.shown) or None
    mode = thinking.enabled is not False
    if not request.continue_final_message:
        prompt = request.add_generation_prompt is not False
        return renderer.render(messages, tools, mode, add_generation_prompt=prompt).token_ids, notes
    if request.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt contradict each other; keep one",
            "add_generation_prompt",
            "conflicting_controls",
        )
    if not request.messages or request.messages[-1].get("role") != "assistant":
        raise bad_request("continue_final_message needs an assistant message at the end", "messages")
    rendered = renderer.render(messages, tools, mode)
    return rendered.token_ids[: len(rendered.parts) - 1 - rendered.parts[::-1].index("eot")], notes


def token_lists(llm: LLM, given: str | Sequence[Any], begin: bool = True) -> list[list[int]]:
    """Prompts of the old API: a text, several, token ids, or several lists of them. begin: texts after a BOS."""
    if isinstance(given, str):
        given = [given]
    if given and all(isinstance(item, int) for item in given):
        return [list(given)]
    lists = [llm.tokenizer.encode_prompt(item, begin) if isinstance(item, str) else list(item) for item in given]
    if not lists or not all(lists):
        raise bad_request("there is an empty prompt; give at least one token", "prompt")
    return lists


def _chat_sampling(llm: LLM, request: ChatRequest, plan: ToolPlan) -> Json:
    sampling = _sampling(request)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise bad_request(
                "max_tokens and max_completion_tokens differ; keep one of them", "max_tokens", "conflicting_controls"
            )
        sampling["max_tokens"] = request.max_completion_tokens
    if request.top_logprobs:
        if not request.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        sampling["top_logprobs"] = request.top_logprobs
    if request.stop_loops is not None:
        sampling["stop_loops"] = request.stop_loops
    xml = llm.renderer.policy.xml is not None
    if (grammar := call_grammar(plan, llm.tokenizer, answer_grammar(request), xml)) is not None:
        sampling["grammar"] = grammar
    if plan.forbidden:
        sampling["logit_bias"] = tuple(
            {**dict(sampling.get("logit_bias", ())), **forbidden_calls(llm.tokenizer)}.items()
        )
    elif not plan.parallel and (closing := llm.tokenizer.control_id("</tool_call>")) is not None:
        sampling["stop_token_ids"] = (*sampling.get("stop_token_ids", ()), closing)
    if request.post_thinking is not None:
        sampling["post_thinking"] = _post_thinking(llm, request.post_thinking, sampling)
    return sampling


def _sampling(request: SamplingFields) -> Json:
    """Fields under the names of ``SamplingParams``; only what was given."""
    names = [*_COPIED, *_COPIED_TOO, "max_tokens"]
    sampling: Json = {name: value for name in names if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        sampling["top_k"] = max(request.top_k, 0)
    if request.stop_token_ids:
        sampling["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        sampling["logit_bias"] = tuple(_bias(*pair) for pair in request.logit_bias.items())
    seed = request.seed if request.seed is not None else secrets.randbelow(2**31)
    return sampling | {"n": request.n, "seed": seed % 2**62}


def _bias(token: str, bias: float) -> tuple[int, float]:
    if not token.isdecimal() or len(token) > 20:  # Python reads no number of more than 4,300 digits
        raise bad_request(f"logit_bias has the key {token!r:.40}; keys are token ids", "logit_bias")
    return int(token), bias


def _post_thinking(llm: LLM, wanted: PostThinking, sampling: Mapping[str, Any]) -> AnswerSampling:
    base = llm.params(sampling, thinking=True)
    top_k = base.top_k if wanted.top_k is None else max(wanted.top_k, 0)
    return AnswerSampling(
        temperature=base.temperature if wanted.temperature is None else wanted.temperature,
        top_p=base.top_p if wanted.top_p is None else wanted.top_p,
        top_k=top_k,
        min_p=base.min_p if wanted.min_p is None else wanted.min_p,
    )


def _budget(llm: LLM, ids: list[int], sampling: Mapping[str, Any], thinking: Thinking) -> Json:
    if thinking.budget is None and thinking.share is None:
        return {}
    if thinking.enabled is False:
        return {}
    return {"thinking_budget": thinking.tokens(llm.request(ids, sampling).params.max_tokens)}


def _requests(llm: LLM, prompts: Sequence[list[int]], sampling: Json, thinking: bool | None) -> list[Request]:
    return [llm.request(ids, sampling, thinking=thinking) for ids in prompts]


def _prepared(
    bases: list[Request], request: SamplingFields, wanted: Wanted, names: Mapping[str, str], warnings: list[str]
) -> Prepared:
    """Engine requests for the bases: choices with stop strings end one by one, so each is a request of its own."""
    given = getattr(request, "max_completion_tokens", None) or request.max_tokens
    if given and any(base.params.max_tokens < given for base in bases):
        least = min(base.params.max_tokens for base in bases)
        warnings.append(f"max_tokens is {least}, not {given}: the model's context ends there")
    requests: list[Request] = []
    parts: list[int] = []
    prompts: list[list[int]] = []
    for base in bases:
        count = base.params.n
        apart = bool(wanted.stop) and count > 1
        for sample in range(count):
            if apart:
                params = replace(base.params, n=1, seed=base.params.seed + sample)
                requests.append(replace(base, params=params))
            elif sample == 0:
                requests.append(base)
            parts.append(len(requests) - 1)
            prompts.append(list(base.prompt_ids))
    options = request.stream_options or StreamOptions()
    if (options.include_usage or options.continuous_usage_stats) and not request.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if options.include_obfuscation:
        warnings.append("stream_options.include_obfuscation has no effect here")
    return Prepared(
        requests,
        parts,
        prompts,
        bases[0].params.n,
        sum(len(base.prompt_ids) for base in bases),
        wanted,
        names,
        warnings,
        stream=request.stream,
        usage=options.include_usage,
        usage_always=options.continuous_usage_stats,
    )


def _chat_wanted(request: ChatRequest, base: Request, plan: ToolPlan, thinking: Thinking) -> Wanted:
    return Wanted(
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        token_ids=request.return_token_ids,
        stop=_stops(request, base),
        stop_ids=frozenset(request.stop_token_ids or ()),
        hidden=thinking.hidden,
        parse=ParseOptions(
            stop=_stops(request, base),
            tools=plan.shown or None,
            early_calls=plan.strict,
            call_id=lambda index: f"call_{secrets.token_hex(12)}",
        ),
    )


def _stops(request: SamplingFields, base: Request) -> tuple[str, ...]:
    """The request's stop strings, or where it has none to say the checkpoint's."""
    if request.stop is None:
        return base.params.stop
    given = [request.stop] if isinstance(request.stop, str) else request.stop
    if not all(given):
        raise bad_request("stop has an empty string; leave it out", "stop")
    return tuple(given)


def _without_thought(request: ChatRequest, controls: Json, thinks: bool, thinking: Thinking) -> list[str]:
    """Warnings about what is said of thoughts where there are none."""
    found = []
    if request.stop_loops and (not thinks or thinking.enabled is False):
        found.append("stop_loops has no effect: there is no thought to stop")
    if not thinks:
        found += [f"{path} has no effect: this model does not think" for path in about_thoughts(controls)]
    return found
