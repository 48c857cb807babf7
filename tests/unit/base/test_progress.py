from __future__ import annotations

import io

import pytest
from rich.console import Console

from twofold.base import progress
from twofold.base.progress import (
    PlainProgress,
    Rate,
    RichProgress,
    SilentProgress,
    count_text,
    duration_text,
    make_progress,
    metrics_text,
)


def test_rate_starts_from_its_first_sample_so_a_resumed_job_is_not_overrated() -> None:
    rate = Rate()
    assert rate.eta_seconds(1000) is None
    rate.add(100.0, 900)
    assert rate.eta_seconds(1000) is None
    rate.add(110.0, 950)
    assert rate.eta_seconds(1000) == pytest.approx(10.0)


def test_rate_forgets_what_is_older_than_its_window() -> None:
    rate = Rate(window_seconds=10)
    for now, done in [(0, 0), (10, 1000), (20, 1010), (30, 1020)]:
        rate.add(now, done)
    assert rate.eta_seconds(1030) == pytest.approx(10.0)


def test_plain_progress_writes_a_line_at_most_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    plain = PlainProgress(stream, "pretrain", interval_seconds=10)
    plain.start(100, "step")
    for step in range(1, 51):
        clock[0] = step * 0.5
        plain.update(step, loss=2.0 / step, phase="s1")
    plain.finish()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "  pretrain: 20/100 steps  20 %  ETA 40.0s  loss 0.1  phase s1"


def test_rich_progress_shows_count_time_to_go_and_metrics_and_finishes_twice() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    bar = make_progress(console, "sft [x]")
    assert isinstance(bar, RichProgress)
    bar.start(10, "step")
    bar.update(5, loss=1.25, note="[b]")
    bar.finish()
    bar.finish()
    assert "5/10 steps" in stream.getvalue() and "loss 1.25  note [b]" in stream.getvalue()
    assert "sft [x]" in stream.getvalue()


def test_a_pipe_gets_plain_lines() -> None:
    assert isinstance(make_progress(Console(file=io.StringIO()), "x"), PlainProgress)
    silent = SilentProgress()
    silent.start(1)
    silent.update(1, loss=1.0)
    silent.finish()


def test_texts() -> None:
    assert duration_text(0.44) == "0.4s" and duration_text(59.96) == "1m00s"
    assert duration_text(80) == "1m20s" and duration_text(7500) == "2h05m"
    assert count_text(1200, 5000, "step") == "1,200/5,000 steps" and count_text(3, 0, "tokens") == "3 tokens"
    assert metrics_text({"loss": 2.34567, "n": 3, "arm": "a"}) == "loss 2.346  n 3  arm a"
