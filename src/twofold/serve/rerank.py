"""``/v1/rerank``: documents by how likely the model says that they answer a query, likeliest first.

The form is that of Jina, Cohere and vLLM; the question to the model is that of Qwen3-Reranker. Not here: the model's
side (``engine/embed.py``), and the question's form (``text/retrieval.py``).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from twofold.base.records import InputError
from twofold.engine.embed import relevance
from twofold.serve.asked import read_mapping, read_string
from twofold.serve.embedding import batches
from twofold.serve.errors import bad_request, from_input_error
from twofold.serve.protocol import Body
from twofold.serve.service import Service
from twofold.text.retrieval import DEFAULT_TASK, rerank_ids, yes_no_ids


class RerankRequest(Body):
    """``POST /v1/rerank``. ``instruction`` says in a sentence what a query looks for.

    documents: texts, or objects with ``text``. top_n: how many results to give; all without. return_documents: each
    result has its text. truncate_prompt_tokens: cut the ends of documents off, so that query and document have no more
    tokens than that; -1 stands for the model's context; without, what does not fit is an error.
    """

    model: str | None = None
    query: str = Field(min_length=1)
    documents: list[Any] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    instruction: str = DEFAULT_TASK
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)


async def rerank(service: Service, body: RerankRequest, warnings: Sequence[str]) -> dict[str, Any]:
    """The reply.

    Raises:
        ApiError: 400 for a document that is no text, is too long or too many, or a tokenizer without "yes" and "no".
    """
    service.check_model(body.model)
    service.check_samples(len(body.documents), "documents", "the number of documents")
    texts = [_text(f"documents[{number}]", given) for number, given in enumerate(body.documents)]
    try:
        lists = await asyncio.to_thread(_lists, service, body, texts)
        yes, no = yes_no_ids(service.llm.tokenizer)
        scores: list[float] = []
        for batch in batches(lists, service.llm.engine.options.mixed_tokens):
            scores += await service.loop.call(partial(_scores, service, batch, yes, no))
    except InputError as error:
        raise from_input_error(error, "documents") from None
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    results: list[dict[str, Any]] = []
    for index in order[: body.top_n]:
        shown = {"document": {"text": texts[index]}} if body.return_documents else {}
        results.append({"index": index, "relevance_score": scores[index], **shown})
    count = sum(map(len, lists))
    reply: dict[str, Any] = {
        "id": f"rerank-{secrets.token_hex(12)}",
        "object": "list",
        "model": service.name,
        "results": results,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return reply | ({"warnings": list(warnings)} if warnings else {})


def _text(where: str, given: Any) -> str:
    text = given if isinstance(given, str) else read_string(where, read_mapping(where, given), "text")
    if not text:
        raise bad_request(f"{where} is empty; give at least one character", where)
    return text


def _lists(service: Service, body: RerankRequest, texts: Sequence[str]) -> list[list[int]]:
    """The question about each document, as ids."""
    limit, asked = service.llm.model.config.longest, body.truncate_prompt_tokens
    most = limit if asked is None or asked == -1 else min(limit, asked)
    ask = partial(rerank_ids, service.llm.tokenizer, body.query, task=body.instruction)
    if asked is None:
        return [ask(text, max_tokens=most) for text in texts]
    least = len(ask("", max_tokens=limit))
    if least >= most:
        where = "truncate_prompt_tokens"
        raise bad_request(f"{where} is {asked}, and the query alone takes {least}; allow more", where)
    return [ask(text, max_tokens=most, truncate=True) for text in texts]


def _scores(service: Service, batch: list[list[int]], yes: int, no: int) -> list[float]:
    """In the engine's thread: the relevance of a batch."""
    scores: list[float] = relevance(service.llm.model, batch, yes, no).tolist()
    return scores
