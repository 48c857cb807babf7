"""Streams over HTTP: signs of life while they wait, and headers that keep proxies from collecting them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from twofold.serve.app import STREAM_HEADERS, _or_silence


async def slow(pauses: list[float], fail: bool = False) -> AsyncIterator[int]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number
    if fail:
        raise ValueError("late")


async def collected(pauses: list[float], seconds: float, fail: bool = False) -> list[int | None]:
    return [item async for item in _or_silence(slow(pauses, fail), seconds)]


def test_silence_is_broken_and_nothing_is_lost() -> None:
    got = asyncio.run(collected([0.0, 0.3, 0.0], 0.05))
    assert [item for item in got if item is not None] == [0, 1, 2]
    assert None in got[1:-2] and got[-2:] == [1, 2]


def test_without_a_setting_nothing_is_added() -> None:
    assert asyncio.run(collected([0.0, 0.1], 0.0)) == [0, 1]


def test_an_error_of_the_stream_comes_through() -> None:
    with pytest.raises(ValueError, match="late"):
        asyncio.run(collected([0.0], 0.05, fail=True))


def test_who_stops_reading_ends_the_wait() -> None:
    async def leave() -> bool:
        ended = asyncio.Event()

        async def endless() -> AsyncIterator[int]:
            try:
                await asyncio.sleep(60)
                yield 0
            finally:
                ended.set()

        signs = _or_silence(endless(), 0.01)
        assert await anext(signs) is None
        await signs.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(ended.wait(), 5)
        return ended.is_set()

    assert asyncio.run(leave())


def test_headers_for_proxies() -> None:
    assert STREAM_HEADERS["X-Accel-Buffering"] == "no" and "no-cache" in STREAM_HEADERS["Cache-Control"]
