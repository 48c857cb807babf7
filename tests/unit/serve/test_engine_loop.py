"""The engine's thread, with a scripted engine: order, refusals, time limits, failures, and an orderly end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Coroutine
from typing import Any

import pytest

from twofold.base.records import Completion, InputError, Request, SamplingParams
from twofold.engine.request import EngineStats, Event
from twofold.serve.engine_loop import EngineLoop, Job
from twofold.serve.errors import ApiError


class FakeEngine:
    """Gives every running sample the tokens 0, 1, 2, … up to max_tokens, one a step; ``gate`` holds steps back."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[Request, list[list[int]]]] = {}
        self.aborted: set[int] = set()
        self.aborts: list[list[int]] = []
        self.counters = EngineStats()
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.threads: set[str] = set()
        self.added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> int:
        if not request.prompt_ids:
            raise InputError("the prompt is empty")
        self.added += 1
        self.running[self.added] = (request, [[] for _ in range(request.params.n)])
        return self.added

    def abort(self, request_ids: int | Collection[int]) -> None:
        self.aborts.append([request_ids] if isinstance(request_ids, int) else list(request_ids))
        self.aborted.update(self.aborts[-1])

    def step(self) -> list[Event]:
        self.threads.add(threading.current_thread().name)
        if not self.gate.is_set():
            time.sleep(0.002)
            return []
        if self.fail:
            raise RuntimeError("out of memory")
        events = []
        for request_id, (request, samples) in list(self.running.items()):
            if request_id in self.aborted:
                done = Completion(0, 0, [], finish_reason="aborted")
                events += [Event(request_id, n, None, completion=done) for n in range(len(samples))]
                del self.running[request_id]
                continue
            for number, tokens in enumerate(samples):
                tokens.append(len(tokens))
                last = len(tokens) == request.params.max_tokens
                done = Completion(0, number, list(tokens), finish_reason="length") if last else None
                events.append(Event(request_id, number, tokens[-1], completion=done, begun_at=time.monotonic()))
            if len(samples[0]) == request.params.max_tokens:
                del self.running[request_id]
        return events


class Times:
    """An observer that counts."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.next: list[float] = []

    def first_token(self, seconds: float, waited: float) -> None:
        assert 0 <= waited <= seconds
        self.first.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.next.append(seconds)


def with_loop(play: Any, engine: FakeEngine | None = None, **settings: Any) -> tuple[Any, EngineLoop, FakeEngine]:
    """Run ``play(loop, engine)`` beside a started loop, which is stopped afterwards."""
    fake = engine or FakeEngine()
    loop = EngineLoop(fake, Times(), **settings)  # type: ignore[arg-type]
    loop.start()

    async def body() -> Any:
        result: Coroutine[Any, Any, Any] = play(loop, fake)
        return await asyncio.wait_for(result, 20)

    try:
        return asyncio.run(body()), loop, fake
    finally:
        fake.gate.set()
        loop.stop()


def ask(tokens: int = 3, n: int = 1) -> Request:
    return Request((1, 2), SamplingParams(max_tokens=tokens, n=n))


async def read_all(job: Job, choices: int) -> list[tuple[int, int | None]]:
    made: list[tuple[int, int | None]] = []
    while choices:
        for choice, event in await job.read():
            made.append((choice, event.token_id))
            choices -= event.completion is not None
    return made


def test_events_find_their_choice_and_only_one_thread_steps() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> Any:
        jobs = [await loop.submit([ask(n=2), ask(2)]), await loop.submit([ask(4)])]
        return await asyncio.gather(read_all(jobs[0], 3), read_all(jobs[1], 1))

    (first, second), loop, fake = with_loop(play)
    by_choice = {c: [token for choice, token in first if choice == c] for c in range(3)}
    assert by_choice == {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1]}
    assert second == [(0, token) for token in range(4)]
    assert fake.threads == {"engine"}
    times: Any = loop.observer
    assert len(times.first) == 2 and len(times.next) == 2 + 2 + 1 + 3


def test_the_engine_refuses_and_the_rest_of_the_job_ends() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        fake.gate.clear()
        with pytest.raises(InputError, match="prompt is empty"):
            await loop.submit([ask(), Request(())])
        assert fake.aborted == {1}

    with_loop(play)


def test_a_full_queue_is_429() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        fake.gate.clear()
        await loop.submit([ask()])
        fake.counters.waiting = 2
        fake.gate.set()
        fake.running[99] = (ask(10**6), [[]])  # keeps it busy
        with pytest.raises(ApiError, match="2 requests wait already") as caught:
            await loop.submit([ask()])
        assert (caught.value.status, caught.value.retry_after) == (429, 1)

    class Lenient(FakeEngine):
        def step(self) -> list[Event]:
            return [event for event in super().step() if event.request_id != 99]

    with_loop(play, Lenient(), max_queue=2)


def test_a_closed_job_is_aborted() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        job = await loop.submit([ask(10**6)])
        await job.read()
        job.close()
        while fake.running:
            await asyncio.sleep(0.01)

    _, loop, fake = with_loop(play)
    assert fake.aborted == {1} and not loop._jobs


def test_all_parts_of_a_job_are_aborted_at_once_and_only_those_that_run() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        job = await loop.submit([ask(10**6), ask(1), ask(10**6)])
        while 2 in fake.running:
            await asyncio.sleep(0.01)
        job.close()
        while fake.running:
            await asyncio.sleep(0.01)

    _, loop, fake = with_loop(play)
    assert fake.aborts == [[1, 3]] and not loop._jobs


@pytest.mark.parametrize(("limits", "what"), [((0.1, 0.0), "the first token"), ((0.0, 0.1), "the first token")])
def test_waiting_has_a_limit(limits: tuple[float, float], what: str) -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        fake.gate.clear()
        job = await loop.submit([ask()])
        with pytest.raises(ApiError, match=f"{what} took longer than 0.1 seconds") as caught:
            await job.read()
        assert (caught.value.status, caught.value.code) == (503, "timeout")
        fake.gate.set()
        while fake.running:
            await asyncio.sleep(0.01)
        assert fake.aborted == {1}

    with_loop(play, first_token_seconds=limits[0], request_seconds=limits[1])


def test_a_failing_step_fails_every_request_and_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        fake.gate.clear()
        jobs = [await loop.submit([ask()]) for _ in range(3)]
        fake.fail = True
        fake.gate.set()
        for job in jobs:
            with pytest.raises(ApiError, match="RuntimeError: out of memory") as caught:
                await job.read()
            assert (caught.value.status, caught.value.code) == (503, "engine_failed")
        with pytest.raises(ApiError, match="restart the server"):
            await loop.submit([ask()])
        with pytest.raises(ApiError, match="restart the server"):
            await loop.call(lambda: 1)

    with_loop(play)
    assert "out of memory" in caplog.text


def test_functions_run_in_the_engines_thread() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        assert await loop.call(lambda: threading.current_thread().name) == "engine"
        with pytest.raises(ZeroDivisionError):
            await loop.call(lambda: 1 // 0)
        assert loop.failure is None

    with_loop(play)


def test_a_step_is_made_between_functions_that_follow_each_other() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> list[int]:
        job = await loop.submit([ask(10**6)])
        await job.read()

        def piece() -> int:
            time.sleep(0.005)  # long enough for the next one to be posted before this one is done with
            return loop.steps

        steps: list[int] = []

        def again() -> None:
            steps.append(piece())
            if len(steps) < 5:
                loop.post(again)

        loop.post(again)
        while len(steps) < 5:
            await asyncio.sleep(0.01)
        job.close()
        return steps

    steps, _, _ = with_loop(play)
    assert sorted(set(steps)) == steps


def test_draining_lets_requests_finish_and_then_fails_them() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        short, long = await loop.submit([ask(2)]), await loop.submit([ask(10**7)])
        loop.drain(0.2)
        with pytest.raises(ApiError, match="shutting down"):
            await loop.submit([ask()])
        assert len(await read_all(short, 1)) == 2
        with pytest.raises(ApiError, match="shutting down") as caught:
            while True:
                await long.read()
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
        while fake.running:
            await asyncio.sleep(0.01)

    with_loop(play)


def test_stopping_fails_what_runs() -> None:
    async def play(loop: EngineLoop, fake: FakeEngine) -> None:
        job = await loop.submit([ask(10**7)])
        await asyncio.to_thread(loop.stop)
        with pytest.raises(ApiError, match="shutting down"):
            while True:
                await job.read()

    with_loop(play)
