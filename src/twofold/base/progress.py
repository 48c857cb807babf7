"""How a long job says how far it is: a three-call protocol, a live bar for terminals and plain lines for logs.

A job calls ``start`` once a phase, ``update`` with the *absolute* amount done (so that a resumed job simply goes on)
and ``finish`` at the end. Not here: metric files (the training loop writes those) and any decision. Imports no torch.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichBars

WIDTH = 100  # columns of a line for a log, and the fewest that a terminal's line is made for
PLAIN_INTERVAL_SECONDS = 10.0
_BAR = 10
RATE_WINDOW_SECONDS = 60.0

Metric = float | int | str


class Progress(Protocol):
    """What a stage reports to.

    start: begin a phase of ``total`` units (may be called again for a next phase). update: ``done`` units are done
    in all, with the latest metrics, the most important first: those that a line has no room for are left out. finish:
    the display goes away; calling it twice is harmless.
    """

    def start(self, total: float, unit: str = "step") -> None: ...

    def update(self, done: float, **metrics: Metric) -> None: ...

    def finish(self) -> None: ...


class SilentProgress:
    """Shows nothing: for tests and for library use."""

    def start(self, total: float, unit: str = "step") -> None:
        return None

    def update(self, done: float, **metrics: Metric) -> None:
        return None

    def finish(self) -> None:
        return None


class Rate:
    """Units a second over the last minute; the first sample is only a base, so a resumed job is not overrated."""

    def __init__(self, window_seconds: float = RATE_WINDOW_SECONDS) -> None:
        self.window_seconds = window_seconds
        self.samples: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> None:
        self.samples.append((now, done))
        while len(self.samples) > 2 and now - self.samples[0][0] > self.window_seconds:
            self.samples.popleft()

    def eta_seconds(self, total: float) -> float | None:
        """Seconds to go at the present rate, or None while there is no rate yet."""
        if len(self.samples) < 2:
            return None
        (first_time, first_done), (last_time, last_done) = self.samples[0], self.samples[-1]
        if last_time <= first_time or last_done <= first_done:
            return None
        return max(0.0, total - last_done) * (last_time - first_time) / (last_done - first_done)


class PlainProgress:
    """One line every ten seconds at most: for log files, pipes and continuous integration."""

    def __init__(self, stream: TextIO, title: str, interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self.stream = stream
        self.title = title
        self.interval_seconds = interval_seconds
        self.last_line = time.monotonic()
        self.total, self.unit, self.rate = 0.0, "step", Rate()

    def start(self, total: float, unit: str = "step") -> None:
        self.total, self.unit, self.rate = total, unit, Rate()

    def update(self, done: float, **metrics: Metric) -> None:
        now = time.monotonic()
        self.rate.add(now, done)
        if now - self.last_line < self.interval_seconds:
            return
        self.last_line = now
        parts = [count_text(done, self.total, self.unit), eta_text(self.rate, self.total)]
        line = f"  {self.title}: " + "  ".join(part for part in parts if part)
        shown = metrics_text(metrics, WIDTH - len(line) - 2)
        print(f"{line}  {shown}".rstrip(), file=self.stream, flush=True)

    def finish(self) -> None:
        return None


class RichProgress:
    """A live bar with the time to go and the latest metrics; it is erased by ``finish``."""

    def __init__(self, console: Console, title: str) -> None:
        self.total, self.unit, self.rate = 0.0, "step", Rate()
        self.console, self.title = console, title
        self.bars = RichBars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[count]}", style="cyan"),
            TextColumn("{task.fields[eta]}", style="magenta"),
            TextColumn("{task.fields[metrics]}", style="dim"),
            console=console,
            refresh_per_second=2,
            transient=True,
        )
        self.task: TaskID = self.bars.add_task(escape(title), total=None, count="", eta="", metrics="")
        self.bars.start()

    def start(self, total: float, unit: str = "step") -> None:
        self.total, self.unit, self.rate = total, unit, Rate()
        self.bars.reset(self.task, total=total or None, count="", eta="", metrics="")
        self.bars.start()  # a no-op while the bar is live; a job may start again after it has finished

    def update(self, done: float, **metrics: Metric) -> None:
        self.rate.add(time.monotonic(), done)
        count, eta = count_text(done, self.total, self.unit), eta_text(self.rate, self.total)
        taken = len(self.title) + _BAR + len(count) + len(eta) + 4  # a space between columns
        shown = escape(metrics_text(metrics, self.console.width - taken))
        self.bars.update(self.task, completed=done, count=count, eta=eta, metrics=shown)

    def finish(self) -> None:
        self.bars.stop()


def make_progress(console: Console, title: str) -> Progress:
    """A live bar on a terminal, plain lines anywhere else."""
    if console.is_terminal and not console.is_dumb_terminal:
        return RichProgress(console, title)
    return PlainProgress(console.file, title)  # type: ignore[arg-type]


def count_text(done: float, total: float, unit: str) -> str:
    """``1,200/5,000 steps``; the unit gets a plural s unless it already ends in one."""
    plural = unit if unit.endswith("s") else f"{unit}s"
    return f"{done:,.0f}/{total:,.0f} {plural}" if total else f"{done:,.0f} {plural}"


def eta_text(rate: Rate, total: float) -> str:
    """``ETA 1m20s``, or nothing while the rate is unknown."""
    seconds = rate.eta_seconds(total) if total else None
    return "" if seconds is None else f"ETA {duration_text(seconds)}"


def metrics_text(metrics: dict[str, Metric], room: int | None = None) -> str:
    """``loss 2.31  lr 0.003``: numbers to four significant digits, in order, as many as fit in ``room`` characters."""
    text = ""
    for name, value in metrics.items():
        part = f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        longer = f"{text}  {part}" if text else part
        if room is None or len(longer) <= room:
            text = longer
    return text


def duration_text(seconds: float) -> str:
    """Seconds as people read them: ``0.4s``, ``12.3s``, ``1m20s``, ``2h05m``."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
