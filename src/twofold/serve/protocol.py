"""Bodies of requests: their fields, how they are checked, and what becomes of fields that are not supported.

A field is honoured, or has no effect and is named in the reply's ``warnings``, or is an error. Values are checked
strictly: "1" is no number. Not here: thinking controls (``controls.py``), messages (``text``), and what fields mean.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twofold.serve.controls import ROOTS
from twofold.serve.errors import ApiError, bad_request
from twofold.serve.wire import read_object

Json = dict[str, Any]

# Fields about accounting, caching or routing elsewhere: the reply is the same without them.
NO_EFFECT = frozenset(
    [
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    ]
)
# Fields of which some values say what happens anyway, in bodies that have no such field.
ONLY: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (False,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "reasoning_format": ("deepseek",),
    "modalities": (["text"], []),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "guided_decoding_backend": ("auto",),
    "verbosity": ("medium",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "documents": ([],),
    "prompt_logprobs": (False,),
}
INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is served",
    "prediction": "use speculate, the number of tokens drafted by prompt lookup",
    "web_search_options": "offer a search tool",
    "moderation": "nothing is moderated here",
    "verbosity": "ask for short answers in the system message",
    "suffix": "there is no fill-in-the-middle; put the text into prompt",
    "chat_template": "the checkpoint's own template is used",
    "documents": "put them into messages",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "grammar": "use structured_outputs.grammar",
    "json_schema": "use response_format",
    "mirostat": "use temperature, top_p and min_p",
    "typical_p": "use top_p and min_p",
}


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_null_as_absent(cls, data: Any) -> Any:
        return _without_nulls(data) if isinstance(data, dict) else data


class StreamOptions(Body):
    """What a stream carries besides deltas: a last chunk with usage, or usage in every chunk; no padding is made."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class PostThinking(Body):
    """Sampling after ``</think>``; what is not given stays as it is before."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)


class JsonSchema(Body):
    """The schema inside ``response_format``."""

    name: str = "answer"
    description: str | None = None
    model_schema: Json = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way of asking for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way of constraining the answer: exactly one of these."""

    json_: Json | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None


class SamplingFields(Body):
    """What chats and plain completions share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: dict[str, float] | None = None
    n: int = Field(default=1, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    speculate: int | None = Field(default=None, ge=0)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = None


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``; thinking controls are read by ``controls.py`` before this."""

    messages: list[Json]
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    post_thinking: PostThinking | None = None
    stop_loops: bool | None = None


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``: plain text is continued. add_special_tokens: after the model's BOS, if it has one."""

    prompt: str | list[str] | list[int] | list[list[int]]
    add_special_tokens: bool = True
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)


def count_texts(given: str | list[str] | list[int] | list[list[int]]) -> int:
    """How many texts a ``prompt`` or ``input`` holds: a text or a list of ids is one."""
    return 1 if isinstance(given, str) or (given and isinstance(given[0], int)) else len(given)


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``. ``instruction`` says in a sentence what a query looks for; documents have none."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    instruction: str | None = None


class TokenizeRequest(Body):
    """``POST /tokenize``: a text, after the model's BOS if it has one, or a conversation as it would be rendered."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], data: bytes, thinking: bool = False) -> tuple[B, Json, list[str]]:
    """Check the JSON body of a request.

    Args:
        kind: what it is. data: the bytes. thinking: thinking controls are welcome.

    Returns:
        The body, its thinking controls, and one warning for each field that has no effect.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _without_nulls(_merge_extra_body(read_object(data)))
    controls = {name: fields.pop(name) for name in sorted(ROOTS & fields.keys())} if thinking else {}
    idle = sorted(NO_EFFECT & fields.keys())
    fields = {name: value for name, value in fields.items() if name not in idle}
    for name in sorted((ONLY.keys() & fields.keys()).difference(_names(kind))):
        if (value := fields.pop(name)) not in ONLY[name]:
            if name in INSTEAD:
                raise _unknown(kind, name)
            raise bad_request(f"{name} can only be {json.dumps(ONLY[name][0])}, got {value!r:.40}", name)
    for name in fields:
        if name not in _names(kind):
            raise _unknown(kind, name)
    try:
        return kind.model_validate(fields), controls, [f"{name} has no effect here" for name in idle]
    except ValidationError as error:
        raise _invalid(error) from None


def _merge_extra_body(fields: Json) -> Json:
    """OpenAI's client merges ``extra_body`` before it sends; a literal one is merged here."""
    extra = fields.pop("extra_body", None)
    if extra is None:
        return fields
    if not isinstance(extra, Mapping):
        raise bad_request("extra_body must be an object", "extra_body")
    for name, value in extra.items():
        if fields.get(name) is not None and fields[name] != value:
            raise bad_request(f"{name} and extra_body.{name} differ; keep one of them", name, "conflicting_controls")
    return {**fields, **extra}


def _without_nulls(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _names(kind: type[Body]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _unknown(kind: type[Body], name: str) -> ApiError:
    if name in INSTEAD:
        return bad_request(f"{name} is not supported; {INSTEAD[name]}", name, "unsupported_field")
    if name in ROOTS:
        return bad_request(f"{name} belongs to chats: there is no think block here", name, "unsupported_field")
    near = difflib.get_close_matches(name, [*_names(kind), *ROOTS], n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out"
    return bad_request(f"unknown field {name[:60]!r}; {hint}", name[:60], "unknown_field")


def _invalid(error: ValidationError) -> ApiError:
    """The first fault. Alternatives of a union each report one; the place they share is what counts."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    root, at = where[0] if where else None, ".".join(where[:1] + [part for part in where[1:] if _is_place(part)])
    if first["type"] == "missing":
        return bad_request(f"{at} is missing", root, "missing_field")
    if first["type"] == "extra_forbidden":
        return bad_request(f"{at} is not a field; leave it out", root, "unknown_field")
    return bad_request(f"{at}: {first['msg'].lower()}, got {_shown(first['input'])}", root)


def _is_place(part: str) -> bool:
    """Whether a part of pydantic's location is a key or index of the body, not the name of an alternative."""
    return part not in ("str", "int", "float", "bool") and "[" not in part


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
