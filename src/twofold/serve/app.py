"""The web application: routes, keys, limits on bodies, request ids, and errors in the shape of the protocol.

Everything that decides what a reply says is in ``service.py`` and below. The web chat is served at ``/`` from the
folder ``web``. Not here: the process that listens (``server.py``).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import twofold
from twofold.base.records import InputError
from twofold.serve.anthropic import read_messages
from twofold.serve.anthropic_reply import MessagesReply, counted, error_body
from twofold.serve.dialect import Dialect, start
from twofold.serve.embedding import embeddings
from twofold.serve.errors import ApiError, from_input_error
from twofold.serve.protocol import Body, DetokenizeRequest, EmbeddingRequest, TokenizeRequest, read_body
from twofold.serve.rerank import RerankRequest, rerank
from twofold.serve.responses import read_responses
from twofold.serve.responses_reply import ResponsesReply
from twofold.serve.service import Reply, Service
from twofold.serve.tokens import detokenize, tokenize, tokenizer_info

logger = logging.getLogger("twofold.serve")
T = TypeVar("T")
B = TypeVar("B", bound=Body)
WEB = Path(__file__).parent / "web"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect a stream
COMMENT = b": waiting\n\n"
_PROTECTED = ("/v1/", "/v2/", "/rerank", "/tokenize", "/detokenize", "/metrics")  # need a key, where there are keys


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # an upgrade must not mix old and new modules
}


def create_app(service: Service) -> FastAPI:
    """The application that serves one model; its engine's thread runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await asyncio.to_thread(service.loop.stop)

    app = FastAPI(title="Twofold", version=twofold.__version__, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(ApiError, _on_api_error)  # type: ignore[arg-type]
    app.add_exception_handler(InputError, _on_input_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_error)  # type: ignore[arg-type]
    _add_generation(app, service)
    _add_protocols(app, service)
    _add_tokens(app, service)
    _add_facts(app, service)
    if WEB.is_dir():
        app.mount("/", _Page(directory=WEB, html=True), name="web")
    app.add_middleware(_Gate, service=service)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


class _Page(StaticFiles):
    """The web chat's files, with what keeps anything foreign out of the page."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(PAGE_HEADERS)
        return response


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        data = await _body(request, service.config.max_body_bytes)
        return await _attended(request, service, _answer(service, service.chat(data)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        data = await _body(request, service.config.max_body_bytes)
        return await _attended(request, service, _answer(service, service.completion(data)))


def _add_protocols(app: FastAPI, service: Service) -> None:
    """The same chats in other words, and reranking."""

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body, asked = read_responses(await _body(request, service.config.max_body_bytes))

        async def begun() -> Dialect:
            return ResponsesReply(await start(service, asked), body)

        return await _attended(request, service, _answer(service, begun()))

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        body, asked = read_messages(await _body(request, service.config.max_body_bytes), service.family)

        async def begun() -> Dialect:
            return MessagesReply(await start(service, asked), body.stop_sequences or [], body.max_tokens or 0)

        return await _attended(request, service, _answer(service, begun()))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        data = await _body(request, service.config.max_body_bytes)
        return _json(await asyncio.to_thread(counted, service, *read_messages(data, service.family, counting=True)))

    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    @app.post("/rerank")
    async def ranked(request: Request) -> Response:
        return await _computed(request, service, RerankRequest, rerank)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        return await _computed(request, service, EmbeddingRequest, embeddings)

    @app.post("/tokenize")
    async def to_tokens(request: Request) -> Response:
        data = await _body(request, service.config.max_body_bytes)
        body, controls, warnings = read_body(TokenizeRequest, data, thinking=True)
        return _json(await asyncio.to_thread(tokenize, service, body, controls, warnings))

    @app.post("/detokenize")
    async def from_tokens(request: Request) -> Response:
        body, _, warnings = read_body(DetokenizeRequest, await _body(request, service.config.max_body_bytes))
        return _json(detokenize(service, body, warnings))

    @app.get("/tokenizer_info")
    async def about_tokens() -> Response:
        return _json(tokenizer_info(service))


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(service.card())

    @app.get("/health")
    async def health() -> Response:
        service.loop.check_open()
        return _json({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": twofold.__version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    async def unknown(request: Request, rest: str) -> Response:
        if any(route.matches(request.scope)[0] is Match.PARTIAL for route in app.routes):
            raise HTTPException(405)
        raise ApiError(404, f"there is no /v1/{rest[:100]} here", "unknown_route")


async def _answer(service: Service, asked: Coroutine[Any, Any, Reply | Dialect]) -> Response:
    """The reply as a stream of events or in one piece."""
    reply = await asked
    if reply.prepared.stream:
        return _EventStream(service, reply)
    try:
        return _json(await reply.whole())
    finally:
        reply.close()


async def _computed(
    request: Request,
    service: Service,
    kind: type[B],
    compute: Callable[[Service, B, Sequence[str]], Coroutine[Any, Any, dict[str, Any]]],
) -> Response:
    """What is computed of a body of one kind, as long as the client waits for it."""
    body, _, warnings = read_body(kind, await _body(request, service.config.max_body_bytes))

    async def answer() -> Response:
        return _json(await compute(service, body, warnings))

    return await _attended(request, service, answer())


async def _attended(request: Request, service: Service, making: Coroutine[Any, Any, Response]) -> Response:
    """The response once it is made; a client that goes away before ends the work on it."""
    work = asyncio.ensure_future(making)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        service.metrics.aborted()
        return Response(status_code=499)  # nobody reads it
    finally:
        work.cancel()
        gone.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events; the job ends with the response, however that ends."""

    def __init__(self, service: Service, reply: Reply | Dialect) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=STREAM_HEADERS)
        self._service, self._reply = service, reply
        self._whole = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._whole:
                self._service.metrics.aborted()
            self._reply.close()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in _or_silence(self._reply.chunks(), self._service.config.comment_seconds):
                yield COMMENT if chunk is None else _event(chunk)
        except ApiError as error:
            yield self._error(error)
        except Exception:
            logger.exception("a stream has failed")
            yield self._error(ApiError(500, "an error in the server; its log says more", "internal_error"))
        self._whole = True
        yield self._reply.ending

    def _error(self, error: ApiError) -> bytes:
        self._service.metrics.error(error.status)
        return _event(self._reply.failure(error))


async def _or_silence(items: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """The items as they come, and None each time that ``seconds`` pass without one (0: never)."""
    source = aiter(items)
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source))
            await asyncio.wait({coming}, timeout=seconds or None)
            if not coming.done():
                yield None
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield item
    finally:
        if coming is not None:
            coming.cancel()


class _Gate:
    """Outermost layer: request ids, keys, and errors that nothing else caught."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._keys = [key.encode() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        if self._keys and scope["path"].startswith(_PROTECTED) and not self._allowed(headers):
            what = "the API key is missing or wrong; send Authorization: Bearer KEY, or x-api-key: KEY"
            error = ApiError(401, what, "invalid_api_key")
            self.service.metrics.error(401)
            await _error(error, scope["path"])(scope, receive, tagged)
            return
        try:
            await self.app(scope, receive, tagged)
        except Exception:
            logger.exception("request %s has failed", request_id)
            self.service.metrics.error(500)
            if begun:
                raise
            error = ApiError(500, "an error in the server; its log says more", "internal_error")
            await _error(error, scope["path"])(scope, receive, tagged)

    def _allowed(self, headers: dict[bytes, str]) -> bool:
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        given = [key.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get(b"x-api-key", ""))
        return any([hmac.compare_digest(key.encode(), known) for key in given for known in self._keys])


async def _body(request: Request, limit: int) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413 for more than ``limit`` bytes; the rest is not read.
    """
    error = ApiError(413, f"the body has more than {limit} bytes; send less", "request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise error
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise error
        parts.append(part)
    return b"".join(parts)


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_api_error(request: Request, error: ApiError) -> Response:
    request.app.state.service.metrics.error(error.status)
    return _error(error, request.url.path)


async def _on_input_error(request: Request, error: InputError) -> Response:
    return await _on_api_error(request, from_input_error(error))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    status = error.status_code
    what = {404: f"there is no {request.url.path[:100]} here", 405: "this path does not take that method"}
    return await _on_api_error(request, ApiError(status, what.get(status, str(error.detail)), "http_error"))


def _error(error: ApiError, path: str) -> Response:
    """An error in the shape that clients of the path expect."""
    body = error_body(error) if path.startswith("/v1/messages") else error.body()
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    return _json(body, error.status, headers)


def _event(body: dict[str, Any]) -> bytes:
    """A server-sent event; it has a name where its body says one."""
    name = f"event: {body['type']}\n".encode() if "type" in body else b""
    return name + b"data: " + _encode(body) + b"\n\n"


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(body), status, headers, "application/json")


def _encode(body: Any) -> bytes:
    """JSON as UTF-8; text from outside may hold lone surrogates, which UTF-8 cannot."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
