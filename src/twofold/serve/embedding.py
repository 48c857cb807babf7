"""``/v1/embeddings``: texts or token lists to vectors, in the engine's thread, where answers go on between batches.

Not here: the model's side (``engine/embed.py``), and the form of texts (``text/retrieval.py``).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from twofold.base.records import InputError
from twofold.engine.embed import embed
from twofold.serve.errors import bad_request, from_input_error
from twofold.serve.protocol import EmbeddingRequest, count_texts
from twofold.serve.service import Service
from twofold.text.retrieval import embedding_ids, query_text


async def embeddings(service: Service, body: EmbeddingRequest, warnings: Sequence[str]) -> dict[str, Any]:
    """The reply.

    Raises:
        ApiError: 400 for an empty, too long or surplus input, or dimensions that the model does not have.
    """
    service.check_model(body.model)
    service.check_samples(count_texts(body.input), "input", "the number of inputs")
    try:
        lists = await asyncio.to_thread(_lists, service, body)
        vectors = []
        for batch in batches(lists, service.llm.engine.options.mixed_tokens):
            vectors.append(await service.loop.call(partial(_vectors, service, batch, body.dimensions)))
    except InputError as error:
        raise from_input_error(error, "input") from None
    data = []
    for index, vector in enumerate(torch.cat(vectors).numpy().astype("<f4")):
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


def _vectors(service: Service, batch: list[list[int]], dimensions: int | None) -> torch.Tensor:
    """In the engine's thread: the vectors of a batch, on the CPU."""
    return embed(service.llm.model, batch, dimensions).cpu()


def batches(lists: list[list[int]], most: int) -> Iterator[list[list[int]]]:
    """The inputs in order, together no longer than ``most`` tokens; a longer one is alone."""
    batch: list[list[int]] = []
    for ids in lists:
        if batch and sum(map(len, batch)) + len(ids) > most:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


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
                raise InputError.overflow("an input", len(item), limit)
            lists.append(list(item))
    return lists
