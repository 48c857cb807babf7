from __future__ import annotations

import io
import re

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
    assert lines[0] == "  pretrain: 20/100 steps  ETA 40.0s  loss 0.1  phase s1"


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


TRAINING = {
    "loss": 2.3456789, "tok/s": "12,345", "MFU": "41%", "norm": "0.83", "lr": "0.0012", "GB": "12.3", "bpb": "1.88",
    "load": "1.3/1.2/1.1/1.9",
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_line_never_takes_more_than_the_terminal_has(width: int) -> None:
    stream = io.StringIO()
    bar = RichProgress(Console(file=stream, force_terminal=True, width=width, color_system=None), "general_rl")
    bar.start(10_000, "step")
    for step in (1200, 1300):
        bar.update(step, **TRAINING)
    bar.finish()
    lines = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", stream.getvalue()) if line.strip()]
    assert max(map(len, lines)) <= width and all("general_rl" in line for line in lines)
    assert "loss 2.346" in lines[-1] and ("load" in lines[-1]) == (width == 160)


def test_a_line_of_a_log_has_what_matters_in_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    plain = PlainProgress(stream, "s1", interval_seconds=10)
    plain.start(703, "step")
    for step in (0, 100):
        clock[0] += 20
        plain.update(step, **TRAINING)
    line = stream.getvalue().splitlines()[-1]
    assert len(line) <= 100 and "ETA 2m01s" in line
    assert all(name in line for name in ("loss", "tok/s", "MFU", "norm", "lr", "GB")) and "load" not in line


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
    metrics = {"loss": 2.34567, "n": 3, "arm": "a"}
    assert metrics_text(metrics) == "loss 2.346  n 3  arm a"
    assert metrics_text(metrics, 22) == "loss 2.346  n 3  arm a" and metrics_text(metrics, 21) == "loss 2.346  n 3"
    assert metrics_text({"much": "x" * 30, "n": 3}, 20) == "n 3" and metrics_text(metrics, -5) == ""
