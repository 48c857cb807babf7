"""The one thread that steps the engine, and the way from asyncio to it and back.

Work comes in through a thread-safe queue of functions that run between steps; events go back to the asyncio loop that
asked, one wake-up for all events of a step, into queues without a limit: a slow client holds nothing up. If a step
fails, every request fails with 503 and the loop takes no more. Not here: HTTP, texts, what a reply means.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeVar

from twofold.base.records import InputError, Request
from twofold.engine.engine import Engine
from twofold.engine.request import Event
from twofold.serve.errors import ApiError

logger = logging.getLogger("twofold.serve")
T = TypeVar("T")


class Observer(Protocol):
    """Who wants to know how long things take (the metrics)."""

    def first_token(self, seconds: float, waited: float) -> None:
        """From the request's arrival to its first token, and the part of it before its prompt was taken up."""

    def next_token(self, seconds: float) -> None:
        """From one token of a choice to the next."""


class Made(NamedTuple):
    """One event of a job: which choice it belongs to."""

    choice: int
    event: Event


class Job:
    """Some engine requests that are answered together; read it in the asyncio loop that submitted it.

    Choices are numbered over all requests: those of the first, then those of the second.
    """

    def __init__(self, loop: EngineLoop, requests: Sequence[Request]) -> None:
        self._loop, self.requests = loop, tuple(requests)
        self._aio = asyncio.get_running_loop()
        self._items: asyncio.Queue[list[Made] | ApiError] = asyncio.Queue()
        self.started = time.monotonic()
        self.ids: list[int] = []  # the engine's, in the order of ``requests``; touched by the engine's thread only
        self.ended = [0] * len(requests)  # choices of each request that have
        self.closed = False
        self.first: dict[int, float] = {}  # when a choice got its first token
        self.last: dict[int, float] = {}  # and its latest

    async def read(self) -> list[Made]:
        """What has been made since the last read; waits for at least one event.

        Raises:
            ApiError: the job has failed, or took longer than the loop allows.
        """
        limit, seconds = self._loop.limit(bool(self.last))
        try:
            async with asyncio.timeout_at(None if limit is None else self._aio.time() - self.age() + limit):
                items = [await self._items.get()]
        except TimeoutError:
            self.close()
            what = "the first token" if not self.last else "the reply"
            raise ApiError(503, f"{what} took longer than {seconds:g} seconds", "timeout", retry_after=5) from None
        while not self._items.empty():
            items.append(self._items.get_nowait())
        made: list[Made] = []
        for item in items:
            if isinstance(item, ApiError):
                raise item
            made += item
        return made

    def age(self) -> float:
        """Seconds since the job was submitted."""
        return time.monotonic() - self.started

    def decoding(self, choice: int) -> float:
        """Seconds from a choice's first token to its latest."""
        return self.last.get(choice, 0.0) - self.first.get(choice, 0.0)

    def abort(self, part: int) -> None:
        """End the choices of one engine request; its last events still come."""
        self._loop.post(lambda: self._loop.abort(self, part))

    def close(self) -> None:
        """End everything that still runs and read no more; does nothing to a job that has ended."""
        if not self.closed:
            self.closed = True
            self._loop.post(lambda: self._loop.forget(self))

    def put(self, item: list[Made] | ApiError) -> None:
        """Hand an item to the reader, from any thread."""
        try:
            self._aio.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the reader's loop is gone, and so is the reader
            self.closed = True


class EngineLoop:
    """Owns the engine: nothing else may touch it while the loop runs.

    Args:
        max_queue: jobs are refused with 429 while this many samples wait in the engine. first_token_seconds,
            request_seconds: limits of a job, 0 for none. observer: told the times of tokens.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        max_queue: int = 256,
        first_token_seconds: float = 0.0,
        request_seconds: float = 0.0,
    ) -> None:
        self.engine, self.observer, self.max_queue = engine, observer, max_queue
        self._seconds = (first_token_seconds, request_seconds)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int, tuple[Job, int]] = {}  # engine id -> job and its first choice there
        self._stop = False
        self.failure: str | None = None
        self.closing = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Queue requests; returns when the engine has taken them.

        Raises:
            ApiError: 429 with a full queue, 503 while closing or after a failure. InputError: from the engine.
        """
        self.check_open()
        job = Job(self, requests)
        taken: Future[None] = Future()
        self.post(lambda: _settle(taken, lambda: self._add(job)))
        try:
            await asyncio.wrap_future(taken)
        except BaseException:
            job.close()
            raise
        return job

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between steps.

        Raises:
            ApiError: 503 while closing or after a failure. Whatever the function raises.
        """
        self.check_open()
        done: Future[T] = Future()
        self.post(lambda: _settle(done, function))
        return await asyncio.wrap_future(done)

    def post(self, work: Callable[[], None]) -> None:
        """Have something done between steps, from any thread."""
        self._inbox.put(work)

    def check_open(self) -> None:
        """Raise ApiError 503 if no new work is taken."""
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed ({self.failure}); restart the server", "engine_failed")
        if self.closing:
            raise ApiError(503, "the server is shutting down", "shutting_down", retry_after=10)

    def limit(self, begun: bool) -> tuple[float | None, float]:
        """Age in seconds at which a job fails, before or after its first token (None: never), and the setting."""
        first, whole = self._seconds
        limits = [seconds for seconds in ((whole,) if begun else (first, whole)) if seconds]
        return (min(limits), min(limits)) if limits else (None, 0.0)

    def drain(self, seconds: float) -> None:
        """Take no new work; what still runs after ``seconds`` fails with 503. From any thread."""
        if self.closing:
            return
        self.closing = True
        error = ApiError(503, "the server is shutting down", "shutting_down", retry_after=10)
        timer = threading.Timer(seconds, lambda: self.post(lambda: self._fail_all(error)))
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """End the thread; jobs that still run fail. Returns when the thread has ended."""
        self.closing = True
        error = ApiError(503, "the server is shutting down", "shutting_down", retry_after=10)

        def last() -> None:
            self._fail_all(error)
            self._stop = True

        self.post(last)
        if self._thread.is_alive():
            self._thread.join()

    def abort(self, job: Job, part: int) -> None:
        """In the engine's thread: end one request of a job."""
        if part < len(job.ids) and job.ids[part] in self._jobs:
            self.engine.abort(job.ids[part])

    def forget(self, job: Job) -> None:
        """In the engine's thread: end all requests of a job that nobody reads."""
        self.engine.abort([engine_id for engine_id in job.ids if engine_id in self._jobs])

    def _run(self) -> None:
        while not self._stop:
            self._work()
            if self._stop or self.failure is not None or not self.engine.has_work:
                continue
            try:
                events = self.engine.step()
                self._deliver(events)
                self.steps += 1
            except Exception as error:
                self._fail(error)

    def _work(self) -> None:
        """Run what was posted; waits for it while the engine has nothing to do.

        What is posted meanwhile waits for a step, or somebody who always posts the next piece would stop all answers.
        """
        idle = self.failure is not None or not self.engine.has_work
        try:
            for _ in range(max(1, self._inbox.qsize())):
                self._inbox.get(block=idle)()
                idle = False
        except queue.Empty:
            return
        except Exception as error:
            self._fail(error)

    def _add(self, job: Job) -> None:
        if job.closed:
            return
        self.check_open()
        if self.max_queue <= self.engine.counters.waiting and self.engine.has_work:
            raise ApiError(429, f"{self.max_queue} requests wait already", "queue_full", retry_after=1)
        choice = 0
        try:
            for request in job.requests:
                job.ids.append(self.engine.add(request))
                self._jobs[job.ids[-1]] = (job, choice)
                choice += request.params.n
        except InputError:
            self.forget(job)
            raise

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hand every job its events of one step."""
        now = time.monotonic()
        batches: dict[Job, list[Made]] = {}
        for event in events:
            job, first = self._jobs[event.request_id]
            choice = first + event.sample_index
            batches.setdefault(job, []).append(Made(choice, event))
            if event.token_id is not None:
                self._observe(job, choice, now, event.begun_at)
            if event.completion is not None:
                self._ended(job, event.request_id)
        for job, made in batches.items():
            if not job.closed:
                job.put(made)

    def _ended(self, job: Job, engine_id: int) -> None:
        """One choice of a request has ended; forget the request with its last one."""
        part = job.ids.index(engine_id)
        job.ended[part] += 1
        if job.ended[part] == job.requests[part].params.n:
            del self._jobs[engine_id]

    def _observe(self, job: Job, choice: int, now: float, begun: float) -> None:
        if not job.last:
            self.observer.first_token(now - job.started, begun - job.started)
        elif choice in job.last:
            self.observer.next_token(now - job.last[choice])
        job.first.setdefault(choice, now)
        job.last[choice] = now

    def _fail(self, error: Exception) -> None:
        """The engine's state cannot be trusted any more: everything fails, and the server says so."""
        logger.exception("the engine has failed", exc_info=error)
        self.failure = f"{type(error).__name__}: {error}"[:200]
        self._fail_all(ApiError(503, f"the engine has failed ({self.failure}); restart the server", "engine_failed"))

    def _fail_all(self, error: ApiError) -> None:
        for job in dict.fromkeys(job for job, _ in self._jobs.values()):
            job.put(error)
            if self.failure is None:
                self.forget(job)
            job.closed = True
        if self.failure is not None:
            self._jobs.clear()


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    """Run a function and put what comes of it into a future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
