"""The recipe runner: a chain of stages, each a function from finished folders to one finished folder.

A stage runs when its key differs from that of its artefact. The key hashes the stage's name, version, configuration
and seed and the *contents* of the artefacts it needs, so a change re-runs the stage and whatever its result changes.
Not here: any stage, and how a stage checkpoints itself (it owns ``context.work``). Imports no torch.

On disk: ``<folder>/<stage>/`` finished artefacts; ``<folder>/.work/<stage>-<key>/`` unfinished ones, with ``out``
(emptied at the start of every attempt), ``work`` (survives a kill) and ``heartbeat.json`` (time spent so far).
"""

from __future__ import annotations

import difflib
import re
import resource
import shlex
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from rich.console import Console
from rich.markup import escape

from twofold.base.config import Config, ConfigError, digest
from twofold.base.files import read_json, write_json, write_text
from twofold.base.log import peak_memory_bytes
from twofold.base.progress import Progress, duration_text, make_progress
from twofold.base.records import InputError
from twofold.recipes.artefacts import (
    ChainError,
    Cost,
    Manifest,
    code_fingerprint,
    discard,
    discard_other_work,
    disk_errors,
    disk_problem,
    empty_folder,
    folder_lock,
    list_files,
    now_text,
    publish,
    read_manifest,
    repair,
    seal,
    verify,
    versions,
    work_folder,
)

__all__ = ["Chain", "ChainError", "PlanLine", "Stage", "StageContext", "StageResult", "command_line", "read_manifest"]

HEARTBEAT_SECONDS = 2.0
GO_ON = "run the same command to go on"

Status = Literal["done", "run", "resume"]


@dataclass
class StageContext:
    """What a stage function gets.

    inputs: finished artefact folders of the stages it needs, by name; read only. out: write the artefact's files
    here; it is empty at the start of every attempt and becomes the artefact on success. work: resumable state; it
    survives a kill, is removed on success, and whatever must outlive an interruption belongs there. Files under
    ``out/volatile/`` are kept and checked but do not count as content (timings, throughput). track: trackers that get
    the rows of training.
    """

    name: str
    config: Any
    seed: int
    inputs: dict[str, Path]
    out: Path
    work: Path
    progress: Progress
    track: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage: ``run`` reads ``context.inputs`` and writes ``context.out``.

    title: one line for people. needs: names of earlier stages. version: raised when the algorithm changes, so that
    old artefacts no longer count.
    """

    name: str
    title: str
    config: Config
    needs: tuple[str, ...]
    run: Callable[[StageContext], None]
    version: int = 1


class PlanLine(NamedTuple):
    """What would happen to a stage. The key is empty while a stage it needs is still to run."""

    stage: Stage
    status: Status
    key: str


class StageResult(NamedTuple):
    """What happened to a stage: "done" was found finished, "ran" ran now. seconds: over all attempts."""

    name: str
    status: Literal["done", "ran"]
    seconds: float


class Chain:
    """An ordered list of stages and a seed.

    config: the recipe's whole configuration, only shown by a dry run; a stage depends on its own alone.
    """

    def __init__(self, name: str, stages: Sequence[Stage], seed: int, config: Config | None = None) -> None:
        self.name = name
        self.stages = list(stages)
        self.seed = seed
        self.config = config
        seen: set[str] = set()
        for stage in self.stages:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", stage.name) or stage.name in seen:
                raise ValueError(f"stage name {stage.name!r} is malformed or used twice")
            missing = [need for need in stage.needs if need not in seen]
            if missing:
                raise ValueError(f"stage {stage.name!r} needs {missing}, which do not come before it")
            seen.add(stage.name)

    def key(self, stage: Stage, folder: Path) -> str:
        """Hash of all that decides the stage's result; empty while a stage it needs has no artefact."""
        contents: dict[str, str] = {}
        for need in stage.needs:
            manifest = read_manifest(folder / need)
            if manifest is None:
                return ""
            contents[need] = manifest.content
        return digest([stage.name, stage.version, stage.config.digest(), self.seed, contents])

    def plan(self, folder: Path, only: str | None = None, redo: Collection[str] = ()) -> list[PlanLine]:
        """What ``run`` with the same arguments would do; changes nothing on disk.

        A stage behind one that is still to run is called "run"; it will turn out "done" if the result it needs
        comes out with the contents it had.

        Raises:
            ChainError: an unknown stage in ``only`` or ``redo``, or an unreadable manifest.
        """
        lines: list[PlanLine] = []
        finished: set[str] = set()
        with disk_errors(folder):
            for stage in self._selected(only, redo):
                known = all(need in finished for need in stage.needs)
                line = self._line(stage, folder, redo) if known else PlanLine(stage, "run", "")
                if line.status == "done":
                    finished.add(stage.name)
                lines.append(line)
        return lines

    def run(
        self,
        folder: Path,
        only: str | None = None,
        redo: Collection[str] = (),
        console: Console | None = None,
    ) -> list[StageResult]:
        """Bring the folder up to date.

        Args:
            only: this stage and what it needs, nothing else. redo: stages made afresh even if finished; their
                unfinished work is dropped. console: where to report; None shows nothing.

        Raises:
            ChainError: anything that stops the run, one line. KeyboardInterrupt passes through with all work kept.
        """
        console = console or Console(quiet=True)
        stages = self._selected(only, redo)
        results: list[StageResult] = []
        with disk_errors(folder), folder_lock(folder):
            repair(folder)
            done = [line.stage for line in self.plan(folder, only, redo) if line.status == "done"]
            _check_finished(done, folder, console)
            for stage in stages:
                line = self._line(stage, folder, redo)
                if line.status == "done":
                    manifest = read_manifest(folder / stage.name)
                    if stage not in done:  # what it needs was made again and came out the same
                        _check_finished([stage], folder, console)
                    seconds = manifest.cost.seconds if manifest else 0.0
                    results.append(StageResult(stage.name, "done", seconds))
                else:
                    seconds = self._execute(stage, folder, line.key, stage.name in redo, console)
                    results.append(StageResult(stage.name, "ran", seconds))
                _report_stage(console, stage, results[-1])
        return results

    def _selected(self, only: str | None, redo: Collection[str]) -> list[Stage]:
        by_name = {stage.name: stage for stage in self.stages}
        for name in [*redo, *([only] if only is not None else [])]:
            if name not in by_name:
                near = difflib.get_close_matches(name, by_name, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"its stages: {', '.join(by_name)}"
                raise ChainError(f"recipe {self.name!r} has no stage {name!r}; {hint}")
        if only is None:
            return self.stages
        wanted = {only}
        for stage in reversed(self.stages):
            if stage.name in wanted:
                wanted.update(stage.needs)
        outside = sorted(set(redo) - wanted)
        if outside:
            raise ChainError(f"--redo {outside[0]} has no effect with --only {only}, which does not need it")
        return [stage for stage in self.stages if stage.name in wanted]

    def _line(self, stage: Stage, folder: Path, redo: Collection[str]) -> PlanLine:
        key = self.key(stage, folder)
        if stage.name in redo or not key:
            return PlanLine(stage, "run", key)
        if (work_folder(folder, stage.name, key) / "out").exists():
            return PlanLine(stage, "resume", key)
        manifest = read_manifest(folder / stage.name)
        return PlanLine(stage, "done" if manifest is not None and manifest.key == key else "run", key)

    def _execute(self, stage: Stage, folder: Path, key: str, afresh: bool, console: Console) -> float:
        workdir = work_folder(folder, stage.name, key)
        if afresh:
            discard(workdir)
        resumed = (workdir / "out").exists()
        (workdir / "out").mkdir(parents=True, exist_ok=True)
        (workdir / "work").mkdir(exist_ok=True)
        empty_folder(workdir / "out")
        if resumed or not console.is_terminal:
            _print(console, f"[bold]{stage.name}[/]  {escape(stage.title)}{'  (going on)' if resumed else ''}")
        progress = make_progress(console, stage.name)
        inputs = {need: folder / need for need in stage.needs}
        context = StageContext(stage.name, stage.config, self.seed, inputs, workdir / "out", workdir / "work", progress)
        with _Clock(workdir / "heartbeat.json") as clock:
            try:
                stage.run(context)
                files = list_files(context.out)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise _stage_error(stage, workdir, error, afresh) from error
            finally:
                progress.finish()
        if not files:
            raise ChainError(f"stage {stage.name} wrote no files, so there is nothing to keep")
        manifest = Manifest(
            stage=stage.name,
            key=key,
            files=files,
            cost=clock.cost(),
            finished=now_text(),
            versions=versions(),
            code=code_fingerprint(),
            seed=self.seed,
            config=stage.config.model_dump(mode="json"),
        )
        seal(workdir, manifest)
        publish(workdir, folder / stage.name)
        discard_other_work(folder, stage.name, key)
        return manifest.cost.seconds


class _Clock:
    """Adds up the time a stage takes over its attempts, on disk every two seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = Cost()
        with suppress(OSError, ValueError):  # a heartbeat lost to a power cut costs a figure, not the run
            self.before = Cost.model_validate(read_json(path))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.final: Cost | None = None

    def __enter__(self) -> Self:
        self.wall, self.cpu = time.monotonic(), _cpu_seconds()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.final = self.cost()
        self.stop.set()
        self.thread.join()
        self._write()

    def cost(self) -> Cost:
        """Cost of all attempts up to now, or up to the end of the block."""
        if self.final is not None:
            return self.final
        return Cost(
            seconds=round(self.before.seconds + time.monotonic() - self.wall, 3),
            cpu_seconds=round(self.before.cpu_seconds + _cpu_seconds() - self.cpu, 3),
            peak_memory_bytes=max(self.before.peak_memory_bytes, peak_memory_bytes()),
            attempts=self.before.attempts + 1,
        )

    def _beat(self) -> None:
        self._write()
        while not self.stop.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # the stage itself reports a full disk
            write_json(self.path, self.cost().model_dump())


def command_line(recipe: str, overrides: Sequence[str], seed: int) -> str:
    """What to type to make the same run."""
    settings = "".join(f" --set {shlex.quote(assignment)}" for assignment in overrides)
    return f"twofold run {recipe}{f' --seed {seed}' if seed else ''}{settings}"


def _check_finished(stages: Sequence[Stage], folder: Path, console: Console) -> None:
    other: list[str] = []
    for stage in stages:
        manifest = read_manifest(folder / stage.name)
        if manifest is not None:
            verify(folder / stage.name, manifest)
            if manifest.code != code_fingerprint():
                other.append(stage.name)
    if other:
        names = ", ".join(other)
        _print(
            console,
            f"[yellow]warning:[/] made by another version of the code: {names} (kept; --redo STAGE makes one afresh)",
        )


def _stage_error(stage: Stage, workdir: Path, error: BaseException, afresh: bool) -> ChainError:
    line = disk_problem(error, workdir.parent.parent)
    if line is not None:
        return ChainError(f"stage {stage.name}: {line}; nothing finished is lost")
    text = " ".join(str(error).split())
    if isinstance(error, (ChainError, ConfigError, InputError)):
        return ChainError(f"stage {stage.name}: {text}")
    trace = workdir / "traceback.txt"
    with suppress(OSError):
        write_text(trace, "".join(traceback.format_exception(error)))
    go_on = f"{GO_ON} (without --redo)" if afresh else GO_ON
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return ChainError(f"stage {stage.name} failed: {what}; its work is kept, {go_on} (details: {trace})")


def _report_stage(console: Console, stage: Stage, result: StageResult) -> None:
    mark = "✓" if console.encoding.lower().startswith("utf") else "ok"
    note = "[dim]finished earlier[/]" if result.status == "done" else ""
    took = duration_text(result.seconds)
    _print(console, f"[green]{mark}[/] {stage.name:<18} {escape(stage.title)}  [cyan]{took}[/]  {note}".rstrip())


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
