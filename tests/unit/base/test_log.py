"""Metric files survive an interruption at any byte."""

from __future__ import annotations

from pathlib import Path

from twofold.base.log import MetricsLog, peak_memory_bytes


def test_rewind_drops_rows_that_will_be_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    assert log.rows() == []
    log.rewind(3)
    for step in range(5):
        log.write({"step": step, "loss": step / 2})
    with open(log.path, "a", encoding="utf-8") as handle:
        handle.write('{"step": 5, "lo')  # the process died here
    log.rewind(3)
    assert log.rows() == [{"step": step, "loss": step / 2} for step in range(3)]
    log.write({"step": 3})
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3]


def test_only_half_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"st', encoding="utf-8")
    log.rewind(0)
    assert log.rows() == []


def test_peak_memory_is_plausible() -> None:
    assert 2**20 < peak_memory_bytes() < 2**45
