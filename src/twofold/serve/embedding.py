"""``/v1/embeddings``: texts or token lists to vectors, in the engine's thread.

Not here: the model's side (``engine/embed.py``), and the form of texts (``text/retrieval.py``).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from twofold.base.records import InputError
from twofold.engine.embed import embed
from twofold.serve.errors import bad_request, from_input_error
from twofold.serve.protocol import EmbeddingRequest
from twofold.serve.service import Service
from twofold.text.retrieval import embedding_ids, query_text


async def embeddings(service: Service, body: EmbeddingRequest, warnings: Sequence[str]) -> dict[str, Any]:
    """The reply.

    Raises:
        ApiError: 400 for an empty or too long input, or dimensions that the model does not have.
    """
    service.check_model(body.model)
    try:
        lists = _lists(service, body)
        vectors = await service.loop.call(lambda: embed(service.llm.model, lists, body.dimensions))
    except InputError as error:
        raise from_input_error(error, "input") from None
    data = []
    for index, vector in enumerate(vectors.cpu().numpy().astype("<f4")):
        shown = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    count = sum(map(len, lists))
    reply: dict[str, Any] = {
        "object": "list",
        "data": data,
        "model": service.name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    if warnings:
        reply["warnings"] = list(warnings)
    return reply


def _lists(service: Service, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of every input, ended by the token whose state is the vector."""
    tokenizer, limit = service.llm.tokenizer, service.llm.model.config.longest
    given: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    if given and all(isinstance(item, int) for item in given):
        given = [given]
    if not given or not all(given):
        raise bad_request("there is an empty input; give at least one character", "input")
    lists = []
    for item in given:
        if isinstance(item, str):
            text = item if body.instruction is None else query_text(item, body.instruction)
            lists.append(embedding_ids(tokenizer, text, limit))
        elif body.instruction is not None:
            raise bad_request("instruction goes with texts; token lists are used as they are", "instruction")
        else:
            service.llm.check_tokens(item)
            if len(item) > limit:
                raise bad_request(f"an input has {len(item)} tokens, the model's context {limit}", "input")
            lists.append(list(item))
    return lists
