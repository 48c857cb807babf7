"""The chain runner. Run as a program, this file is the small chain that the tests kill."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from twofold.base.config import Config
from twofold.base.files import read_json, write_json, write_text
from twofold.recipes import artefacts
from twofold.recipes.artefacts import read_manifest, seal, work_folder
from twofold.recipes.chain import Chain, ChainError, Stage, StageContext

RUNS: list[str] = []


class CountConfig(Config):
    steps: int = 40
    pause: float = 0.0
    label: str = "x"


def count(context: StageContext) -> None:
    """Hash ``steps`` times over the inputs, saving the state after every step."""
    RUNS.append(context.name)
    config: CountConfig = context.config
    state_path = context.work / "state.json"
    if state_path.exists():
        state = read_json(state_path)
    else:
        parts = [(folder / "result.txt").read_text() for folder in context.inputs.values()]
        state = {"step": 0, "value": f"{context.seed} {config.label} {parts}"}
    context.progress.start(config.steps, "step")
    while state["step"] < config.steps:
        state["value"] = hashlib.sha256(f"{state['value']}{state['step']}".encode()).hexdigest()
        state["step"] += 1
        write_json(state_path, state)
        context.progress.update(state["step"], loss=1 / state["step"])
        time.sleep(config.pause)
    write_text(context.out / "result.txt", state["value"])
    write_text(context.out / "deep" / "half.txt", state["value"][:32])
    write_json(context.out / "volatile" / "time.json", {"time": time.time()})


def build(seed: int = 0, pause: float = 0.0, steps: int = 40, label: str = "x", version: int = 1) -> Chain:
    """a -> b -> d and a -> c; the keywords configure b."""
    plain = CountConfig(steps=3)
    return Chain(
        "fake",
        [
            Stage("a", "First", plain, (), count),
            Stage("b", "Second", CountConfig(steps=steps, pause=pause, label=label), ("a",), count, version),
            Stage("c", "Side", plain, ("a",), count),
            Stage("d", "Last", plain, ("b",), count),
        ],
        seed,
    )


@pytest.fixture(autouse=True)
def fresh_runs() -> None:
    RUNS.clear()


def contents(folder: Path) -> dict[str, str]:
    found = {}
    for name in "abcd":
        manifest = read_manifest(folder / name)
        assert manifest is not None
        found[name] = manifest.content
    return found


def statuses(chain: Chain, folder: Path, **options: object) -> dict[str, str]:
    return {line.stage.name: line.status for line in chain.plan(folder, **options)}  # type: ignore[arg-type]


def failing(error: BaseException) -> Chain:
    def fail(context: StageContext) -> None:
        write_text(context.work / "kept.txt", "kept")
        raise error

    config = CountConfig(steps=2)
    return Chain("fake", [Stage("a", "First", config, (), count), Stage("bad", "Bad", config, ("a",), fail)], 0)


def test_a_second_run_does_nothing_and_is_quick(tmp_path: Path) -> None:
    chain = build()
    assert statuses(chain, tmp_path) == dict.fromkeys("abcd", "run")
    assert not list(tmp_path.iterdir())
    first = chain.run(tmp_path)
    assert RUNS == ["a", "b", "c", "d"]
    assert [result.status for result in first] == ["ran"] * 4
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    started = time.monotonic()
    second = chain.run(tmp_path)
    assert time.monotonic() - started < 1
    assert RUNS == ["a", "b", "c", "d"]
    assert [result.status for result in second] == ["done"] * 4
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert not list((tmp_path / ".work").iterdir())


def test_manifest_records_files_cost_and_origin(tmp_path: Path) -> None:
    build(seed=7).run(tmp_path)
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    assert set(manifest.files) == {"result.txt", "deep/half.txt", "volatile/time.json"}
    assert manifest.files["deep/half.txt"].size == 32
    assert manifest.seed == 7 and manifest.config["steps"] == 40
    assert manifest.cost.seconds > 0 and manifest.cost.attempts == 1 and manifest.cost.peak_memory_bytes > 2**20
    assert manifest.versions["python"].startswith("3.")


def test_a_changed_stage_reruns_itself_and_what_follows_only(tmp_path: Path) -> None:
    build().run(tmp_path)
    before = contents(tmp_path)
    RUNS.clear()
    changed = build(label="y")
    assert statuses(changed, tmp_path) == {"a": "done", "b": "run", "c": "done", "d": "run"}
    changed.run(tmp_path)
    assert RUNS == ["b", "d"]
    after = contents(tmp_path)
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    assert after["b"] != before["b"] and after["d"] != before["d"]
    RUNS.clear()
    build(label="y", version=2).run(tmp_path)
    assert RUNS == ["b"]  # the new algorithm gave the same result, so nothing that follows is stale
    RUNS.clear()
    build(label="y", version=2, seed=1).run(tmp_path)
    assert RUNS == ["a", "b", "c", "d"]


def test_only_runs_the_stage_and_what_it_needs(tmp_path: Path) -> None:
    build().run(tmp_path, only="b")
    assert RUNS == ["a", "b"]
    with pytest.raises(ChainError, match="--redo c has no effect"):
        build().run(tmp_path, only="b", redo={"c"})
    with pytest.raises(ChainError, match="no stage 'e'"):
        build().run(tmp_path, only="e")


def test_redo_makes_a_stage_afresh_and_equal_results_stop_there(tmp_path: Path) -> None:
    build().run(tmp_path)
    before = contents(tmp_path)
    RUNS.clear()
    build().run(tmp_path, redo={"b"})
    assert RUNS == ["b"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no-manifest"])
def test_a_damaged_artefact_is_named_with_its_remedy(tmp_path: Path, damage: str) -> None:
    build().run(tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "b" / "result.txt"
    text = path.read_text()
    if damage == "flip":
        path.write_text("0" + text[1:] if text[0] != "0" else "1" + text[1:])
    elif damage == "cut":
        path.write_text(text[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "manifest":
        (tmp_path / "b" / "manifest.json").write_text("{")
    else:
        (tmp_path / "b" / "manifest.json").unlink()
    RUNS.clear()
    with pytest.raises(ChainError) as caught:
        build().run(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "b") in message and "--redo b" in message and "\n" not in message
    assert RUNS == []
    build().run(tmp_path, redo={"b"})
    assert contents(tmp_path) == before


def test_kill_9_then_resume_is_bit_identical(tmp_path: Path) -> None:
    build(pause=0.02).run(tmp_path / "whole")
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for attempt in range(1, 3):
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), "0.02"], env=environment, stdout=subprocess.DEVNULL
        )
        target = attempt * 12
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and process.poll() is None:
            states = list((folder / ".work").glob("b-*/work/state.json"))
            if states and read_json(states[0])["step"] >= target:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    chain = build(pause=0.02)
    assert statuses(chain, folder) == {"a": "done", "b": "resume", "c": "run", "d": "run"}
    RUNS.clear()
    chain.run(folder)
    assert RUNS == ["b", "c", "d"]
    assert contents(folder) == contents(tmp_path / "whole")
    manifest = read_manifest(folder / "b")
    assert manifest is not None and manifest.cost.attempts == 3
    assert not list((folder / ".work").iterdir())


def test_out_is_empty_at_every_attempt_and_work_survives(tmp_path: Path) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def run(context: StageContext) -> None:
        seen.append(
            (sorted(p.name for p in context.out.iterdir()), sorted(p.name for p in context.work.iterdir())),
        )
        write_text(context.work / "state", "1")
        write_text(context.out / f"part{len(seen)}", "1")
        if len(seen) == 1:
            raise KeyboardInterrupt

    chain = Chain("fake", [Stage("s", "S", CountConfig(), (), run)], 0)
    with pytest.raises(KeyboardInterrupt):
        chain.run(tmp_path)
    assert statuses(chain, tmp_path) == {"s": "resume"}
    chain.run(tmp_path)
    assert seen == [([], []), ([], ["state"])]
    assert not (tmp_path / "s" / "part1").exists() and (tmp_path / "s" / "part2").exists()


@pytest.mark.parametrize("moment", ["sealed", "old moved", "published", "removing"])
def test_an_interruption_while_publishing_is_repaired(tmp_path: Path, moment: str) -> None:
    chain = build()
    chain.run(tmp_path)
    before = contents(tmp_path)
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    work = work_folder(tmp_path, "b", manifest.key)
    if moment in ("sealed", "old moved"):  # as after --redo b: the same files, finished but not yet in place
        for name in manifest.files:
            write_text(work / "out" / name, (tmp_path / "b" / name).read_text())
        seal(work, manifest)
    if moment == "old moved":
        os.rename(tmp_path / "b", work / "old")
    if moment == "published":
        write_text(work / "old" / "result.txt", "older")
        write_text(work / "work" / "state.json", "{}")
    if moment == "removing":
        write_text(tmp_path / ".work" / f".trash-{work.name}-1-1" / "work" / "state.json", "{}")
    RUNS.clear()
    chain.run(tmp_path)
    assert RUNS == []
    assert contents(tmp_path) == before
    assert not list((tmp_path / ".work").iterdir())


def test_an_interrupted_redo_goes_on_without_the_option(tmp_path: Path) -> None:
    build(label="z").run(tmp_path)
    interrupted = build(label="z")
    stage = interrupted.stages[1]

    def stop(context: StageContext) -> None:
        write_text(context.work / "state.json", json.dumps({"step": 39, "value": "halfway"}))
        raise KeyboardInterrupt

    interrupted.stages[1] = Stage(stage.name, stage.title, stage.config, stage.needs, stop)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(tmp_path, redo={"b"})
    assert statuses(build(label="z"), tmp_path)["b"] == "resume"


def test_a_second_run_at_the_same_time_is_refused_by_process_id(tmp_path: Path) -> None:
    messages: list[str] = []

    def nested(context: StageContext) -> None:
        try:
            build().run(tmp_path)
        except ChainError as error:
            messages.append(str(error))
        write_text(context.out / "x", "x")

    Chain("fake", [Stage("outer", "Outer", CountConfig(), (), nested)], 0).run(tmp_path)
    assert len(messages) == 1 and f"process {os.getpid()}" in messages[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission for /x/file"),
        (errno.EROFS, "read-only file system"),
    ],
)
def test_disk_errors_inside_a_stage_are_one_line(tmp_path: Path, code: int, words: str) -> None:
    error = OSError(code, os.strerror(code), "/x/file")
    with pytest.raises(ChainError, match=words) as caught:
        failing(error).run(tmp_path)
    assert "stage bad" in str(caught.value) and "\n" not in str(caught.value)
    assert read_manifest(tmp_path / "a") is not None


def test_a_full_disk_wrapped_by_a_native_writer_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="the disk is full"):
        failing(RuntimeError("write failed: No space left on device (os error 28)")).run(tmp_path)


def test_a_full_disk_while_publishing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = artefacts.write_json

    def full(path: Path, value: object) -> None:
        if path.parent.name == "out":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, value)

    monkeypatch.setattr(artefacts, "write_json", full)
    with pytest.raises(ChainError, match=r"the disk is full \(writing .*manifest.json\)"):
        build().run(tmp_path)
    monkeypatch.undo()
    build().run(tmp_path)
    assert RUNS == ["a", "a", "b", "c", "d"]


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ChainError, match="file"):
        build().run(tmp_path / "file" / "run")


def test_a_crash_names_stage_reason_and_where_the_details_are(tmp_path: Path) -> None:
    with pytest.raises(ChainError) as caught:
        failing(ZeroDivisionError("loss\nis nan")).run(tmp_path)
    message = str(caught.value)
    assert "stage bad failed: ZeroDivisionError: loss is nan" in message and "run the same command" in message
    (trace,) = (tmp_path / ".work").glob("bad-*/traceback.txt")
    assert "in fail" in trace.read_text() and str(trace) in message
    assert (trace.parent / "work" / "kept.txt").exists()


def test_a_stage_without_files_is_an_error(tmp_path: Path) -> None:
    chain = Chain("fake", [Stage("s", "S", CountConfig(), (), lambda context: None)], 0)
    with pytest.raises(ChainError, match="stage s wrote no files"):
        chain.run(tmp_path)


def test_other_code_is_a_warning_not_a_rerun(tmp_path: Path) -> None:
    build().run(tmp_path)
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace(artefacts.code_fingerprint(), "0" * 16))
    RUNS.clear()
    stream = io.StringIO()
    build().run(tmp_path, console=Console(file=stream, width=60))
    lines = stream.getvalue().splitlines()
    assert RUNS == [] and lines[0].startswith("warning: made by another version of the code: a ")
    assert len(lines) == 5 and all("finished earlier" in line for line in lines[1:])


def test_unfinished_work_of_an_older_configuration_is_cleared_on_success(tmp_path: Path) -> None:
    old = work_folder(tmp_path, "b", "0123456789abcdef")
    write_text(old / "out" / "x", "x")
    build().run(tmp_path)
    assert not old.exists()


def test_malformed_chains_are_refused_when_built() -> None:
    config = CountConfig()
    with pytest.raises(ValueError, match="used twice"):
        Chain("x", [Stage("a", "", config, (), count), Stage("a", "", config, (), count)], 0)
    with pytest.raises(ValueError, match="do not come before"):
        Chain("x", [Stage("a", "", config, ("b",), count), Stage("b", "", config, (), count)], 0)
    with pytest.raises(ValueError, match="malformed"):
        Chain("x", [Stage("A b", "", config, (), count)], 0)


def test_the_runner_imports_no_torch() -> None:
    code = "import sys, twofold.recipes.chain; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


if __name__ == "__main__":
    build(pause=float(sys.argv[2])).run(Path(sys.argv[1]), console=Console(force_terminal=False))
