"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: what the model sees, as ids and back.

Not here: anything that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from twofold.base.records import InputError
from twofold.serve.constraints import plan_tools
from twofold.serve.controls import places, read_thinking
from twofold.serve.errors import bad_request, from_input_error
from twofold.serve.prepare import prompt_ids
from twofold.serve.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest
from twofold.serve.replies import token_name
from twofold.serve.service import Service


def tokenize(
    service: Service, body: TokenizeRequest, controls: dict[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """Ids of a text (control tokens count as such) or of a conversation as a chat would render it.

    Raises:
        ApiError: 400 unless exactly one of ``prompt`` and ``messages`` is given.
    """
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give prompt or messages, and not both", "prompt")
    try:
        if body.messages is None:
            if controls or body.tools or body.continue_final_message or body.add_generation_prompt:
                raise bad_request("tools and thinking controls go with messages, not with prompt", "prompt")
            ids = service.llm.tokenizer.encode_prompt(body.prompt or "", body.add_special_tokens)
        else:
            if "add_special_tokens" in body.model_fields_set and body.add_special_tokens:
                what = "add_special_tokens goes with prompt; the chat template writes a beginning of its own"
                raise bad_request(what, "add_special_tokens")
            chat = ChatRequest(
                messages=body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            ids, notes = chat_ids(service, chat, controls)
            warnings = [*warnings, *notes]
    except InputError as error:
        param = "prompt" if body.messages is None else "messages"
        raise from_input_error(error, param, places(controls)) from None
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": service.llm.model.config.longest, "tokens": ids}
    if body.return_token_strs:
        reply["token_strs"] = [token_name(service.llm.tokenizer, token) for token in ids]
    if warnings:
        reply["warnings"] = list(warnings)
    return reply


def chat_ids(service: Service, chat: ChatRequest, controls: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Ids of a conversation as it would be rendered for a reply, and warnings about its messages.

    Raises:
        ApiError, InputError: it cannot be.
    """
    return prompt_ids(service.llm, chat, plan_tools(chat), read_thinking(controls), controls)


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Tokens with a role, as text and ids (null without one), and the chat template (null without one)."""
    llm, tokenizer = service.llm, service.llm.tokenizer
    ends = tokenizer.role_id("eos")
    if ends is None:
        with suppress(InputError):
            ends = tokenizer.eos_ids[0]
    ids = {"bos": tokenizer.bos_id, "eos": ends, "pad": tokenizer.role_id("pad")}
    return {
        **{f"{role}_token": None if known is None else tokenizer.token_text(known) for role, known in ids.items()},
        **{f"{role}_token_id": known for role, known in ids.items()},
        "add_bos_token": tokenizer.bos_id is not None,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": llm.model.config.longest,
        "chat_template": llm.renderer.chat_template if llm.has_renderer else None,
    }


def detokenize(service: Service, body: DetokenizeRequest, warnings: Sequence[str]) -> dict[str, Any]:
    """Text of ids, control tokens included.

    Raises:
        ApiError: 400 for an id outside the vocabulary.
    """
    service.check_model(body.model)
    try:
        text = service.llm.tokenizer.decode(body.tokens)
    except InputError as error:
        raise from_input_error(error, "tokens") from None
    return {"prompt": text, **({"warnings": list(warnings)} if warnings else {})}
