"""Keys, sizes, queues, time limits, failures and shutdown of a server that really runs."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

Running = Any  # of conftest.py
FOREVER = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}


def status(server: Running, path: str = "/v1/models", **options: Any) -> int:
    return httpx.get(server.base + path, **options).status_code


@pytest.fixture(scope="module")
def guarded(served_folder: Path, serving: Any) -> Iterator[Running]:
    settings = {
        "api_keys": ("first", "second"), "cors_origins": ("https://chat.example",), "max_body_bytes": 2000,
        "max_queue": 1, "name": "guarded", "metrics_prefix": "tf:",
    }  # fmt: skip
    with serving(served_folder, key="second", max_rows=1, **settings) as server:
        yield server


def test_a_key_is_needed(guarded: Running) -> None:
    assert guarded.chat(max_tokens=2).model == "guarded"
    for key in ("", "third", "firs", "first2"):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as caught:
            guarded.client.with_options(api_key=key or "none").models.list()
        assert caught.value.code == "invalid_api_key"
    assert status(guarded, headers={"Authorization": "Bearer first"}) == 200
    assert status(guarded) == status(guarded, "/metrics") == 401
    assert status(guarded, headers={"Authorization": "Basic first"}) == 401
    assert status(guarded, "/health") == status(guarded, "/version") == status(guarded, "/") == 200
    assert "x-request-id" in httpx.get(guarded.base + "/v1/models").headers
    text = httpx.get(guarded.base + "/metrics", headers={"Authorization": "Bearer first"}).text
    assert (
        "\ntf:num_requests_running{" in text
        and 'twofold:request_errors_total{model_name="guarded",status="401"}' in text
    )


def test_other_origins_have_to_be_allowed(guarded: Running) -> None:
    ask = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(guarded.base + "/v1/chat/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    refused = httpx.options(guarded.base + "/v1/chat/completions", headers={**ask, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_bodies_have_a_size(guarded: Running) -> None:
    with pytest.raises(openai.APIStatusError, match="more than 2000 bytes") as caught:
        guarded.chat("x" * 3000)
    assert caught.value.status_code == 413 and caught.value.code == "request_too_large"

    def pieces() -> Iterator[bytes]:  # without a length in the header
        for _ in range(10):
            yield b" " * 500

    answer = httpx.post(
        guarded.base + "/v1/chat/completions", content=pieces(), headers={"Authorization": "Bearer first"}
    )
    assert answer.status_code == 413


def test_a_full_queue_is_refused(guarded: Running) -> None:
    streams = [guarded.chat(stream=True, **FOREVER)]
    next(iter(streams[0]))
    streams.append(guarded.chat(stream=True, **FOREVER))  # waits: one row decodes at a time
    with pytest.raises(openai.RateLimitError, match="1 requests wait already") as caught:
        guarded.chat(max_tokens=2)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
    for stream in streams:
        stream.close()
    guarded.wait_until_idle()
    assert guarded.chat(max_tokens=2).choices


def test_a_request_has_a_number_of_samples(served_folder: Path, serving: Any) -> None:
    with serving(served_folder, max_samples=4) as server:
        create = server.client.completions.create
        assert len(create(model=server.name, prompt=["a", "b"], n=2, max_tokens=1).choices) == 4
        for many in ({"prompt": ["a"] * 5}, {"prompt": [[300]] * 3, "n": 2}, {"prompt": ["a", "b"], "best_of": 3}):
            with pytest.raises(openai.BadRequestError, match=r"prompts times n is \d, at most 4 \(max_samples\)"):
                create(model=server.name, max_tokens=1, **many)
        embed = server.client.embeddings.create
        assert len(embed(model=server.name, input=["a"] * 4).data) == 4
        with pytest.raises(openai.BadRequestError, match="the number of inputs is 5, at most 4"):
            embed(model=server.name, input=["a"] * 5)


def test_replies_have_a_time(served_folder: Path, serving: Any) -> None:
    with serving(served_folder, request_seconds=0.5) as server:
        with pytest.raises(openai.InternalServerError, match=r"took longer than 0\.5 seconds") as caught:
            server.chat(n=8, **FOREVER)
        assert caught.value.status_code == 503 and caught.value.code == "timeout"
        with pytest.raises(openai.APIError, match=r"took longer than 0\.5 seconds"):  # in the middle of the stream
            for _ in server.chat(n=8, stream=True, **FOREVER):
                pass
        server.wait_until_idle()


def test_a_failing_engine_is_no_silent_one(served_folder: Path, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(served_folder) as server:
        stream = iter(server.chat(stream=True, **FOREVER))
        next(stream)

        def broken() -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(server.service.llm.engine, "step", broken)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="RuntimeError: no memory"):
            server.chat()
        health = httpx.get(server.base + "/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "engine_failed"


def test_shutdown_lets_short_replies_finish_and_ends_long_ones_cleanly(
    served_folder: Path, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(served_folder, grace_seconds=2.0) as server:
        engine, outcomes = server.service.llm.engine, {}
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())

        def short() -> None:
            outcomes["short"] = server.chat(max_tokens=8, extra_body={"ignore_eos": True}).usage.completion_tokens

        def long() -> None:
            try:
                for _ in server.chat(stream=True, n=8, **FOREVER):
                    pass
            except openai.APIError as error:
                outcomes["long"] = str(error)

        threads = [threading.Thread(target=long), threading.Thread(target=short)]
        for thread in threads:
            thread.start()
        while engine.counters.running < 9 and "short" not in outcomes:
            time.sleep(0.002)
        server.server.begin_shutdown()
        for thread in threads:
            thread.join(20)
        assert outcomes == {"short": 8, "long": "the server is shutting down"}
        server.thread.join(20)
        assert not server.thread.is_alive() and server.idle()


def test_malformed_http_bodies_do_no_harm(guarded: Running) -> None:
    headers = {"Authorization": "Bearer first"}
    for body in (b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 1500, b'{"messages": 3}', b'{"messages": [1]}'):
        answer = httpx.post(guarded.base + "/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
    with socket.create_connection(("127.0.0.1", guarded.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert guarded.chat(max_tokens=2).choices


CODE = """
import sys
from pathlib import Path
from twofold.serve_cli import serve
serve(Path(sys.argv[1]), port=int(sys.argv[2]), overrides=["grace_seconds=0.2"], log_level="warning")
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_as_a_process_that_is_told_to_stop(served_folder: Path, told: signal.Signals) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", CODE, str(served_folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert httpx.get(base + "/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                time.sleep(0.1)
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "n": 8,
            "max_tokens": 1000,
            "ignore_eos": True,
        }
        with httpx.stream("POST", base + "/v1/chat/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(told)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["error"]["code"] == "shutting_down"
        process.wait(30)
        output = process.stdout.read() if process.stdout else ""
        assert f"http://127.0.0.1:{port}/v1" in output and "Traceback" not in output, output
    finally:
        process.kill()
        process.wait()


def test_the_page_lets_nothing_foreign_in_and_knows_the_defaults(guarded: Running) -> None:
    page = httpx.get(guarded.base + "/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-cache"
    card = httpx.get(guarded.base + "/v1/models", headers={"Authorization": "Bearer first"}).json()["data"][0]
    assert card["defaults"]["on"]["temperature"] == 0.6 and card["defaults"]["off"]["top_p"] == 0.8
    assert card["about"] is None
