"""Trackers by their own readers: TensorBoard's event files here, wandb and trackio where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from twofold.base.config import Config, ConfigError
from twofold.base.records import InputError
from twofold.train import trackers
from twofold.train.trackers import Track, Trackers, check_installed

ROW = {"step": 3, "loss": 1.5, "flag": True, "text": "x", "bad": float("nan"), "max_expert_load/layer_1": 2}


class Recipe(Config):
    track: Track = ()


def test_names_come_from_the_command_line() -> None:
    assert Recipe().override(["track=tensorboard"]).track == ("tensorboard",)
    assert Recipe().override(["track=tensorboard,wandb"]).track == ("tensorboard", "wandb")
    assert (
        Recipe().override(['track=["trackio"]']).track == ("trackio",) and Recipe().override(["track=[]"]).track == ()
    )
    with pytest.raises(ConfigError, match=r"track.*'tensorboard', 'wandb' or 'trackio'.*'tensorbored'"):
        Recipe().override(["track=tensorbored"])
    with pytest.raises(ValidationError):
        TypeAdapter(Track).validate_python(3)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    check_installed(["tensorboard"])
    with pytest.raises(
        ConfigError, match=r"^track=wandb needs a package that is missing: pip install 'twofold\[track\]'$"
    ):
        check_installed(["tensorboard", "wandb"])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_also_after_an_interruption(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    opened = Trackers(["tensorboard"], tmp_path, "s1", {"seed": 0})
    for step in range(4):
        opened.log(step, ROW | {"step": step, "loss": 10.0 + step})
    opened.close()
    again = Trackers(["tensorboard"], tmp_path, "s1", {"seed": 0})  # the last state was that of two steps
    for step in (2, 3):
        again.log(step, ROW | {"loss": 20.0 + step})
    again.close()
    again.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(0, 10.0), (1, 11.0), (2, 22.0), (3, 23.0)]
    assert found.keys() == {"loss", "max_expert_load/layer_1"}  # finite numbers alone
    Trackers(["tensorboard"], tmp_path / "none", "s1", {}).close()
    assert not (tmp_path / "none").exists()  # nothing logged, nothing written


class Fragile:
    """A tracker whose third row finds no disk."""

    def __init__(self, *_: Any) -> None:
        self.rows: list[int] = []
        self.closed = False

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise OSError("no space left")
        self.rows.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_fails_is_given_up_once_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Solid(Fragile):
        def log(self, step: int, values: dict[str, float]) -> None:
            self.rows.append(step)

    monkeypatch.setattr(trackers, "_START", {"wandb": Fragile, "trackio": Solid})
    opened = Trackers(["wandb", "trackio"], tmp_path, "s1", {})
    solid = opened.open["trackio"]
    with pytest.warns(RuntimeWarning, match=r"wandb failed to log \(OSError: no space left\).*metrics.jsonl") as seen:
        for step in range(5):
            opened.log(step, ROW)
    assert len(seen) == 1 and list(opened.open) == ["trackio"] and solid.rows == [0, 1, 2, 3, 4]
    opened.close()
    assert solid.closed


def test_one_that_cannot_start_is_an_error_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("api_key not configured\n(run wandb login)")

    monkeypatch.setattr(trackers, "_START", {"wandb": refuse, "trackio": Fragile})
    words = r"^wandb cannot be started \(RuntimeError: api_key not configured \(run wandb login\)\); mend that"
    with pytest.raises(InputError, match=words):
        Trackers(["trackio", "wandb"], tmp_path, "s1", {})


SCRIPT = """
import json, sys
from pathlib import Path
from twofold.train.trackers import Trackers
for begin in (0, 2):
    tracker = Trackers([sys.argv[1]], Path(sys.argv[2]), "s1", {"seed": 0})
    assert list(tracker.open) == [sys.argv[1]]
    for step in range(begin, begin + 2):
        tracker.log(step, {"loss": 10.0 + step})
    assert list(tracker.open) == [sys.argv[1]]
    tracker.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_take_rows_without_an_account(name: str, tmp_path: Path) -> None:
    """Offline, in a process of its own: what they print and start is theirs."""
    pytest.importorskip(name)
    changes = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT, name, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    if name == "wandb":
        assert len(list(tmp_path.rglob("*.wandb"))) == 2  # one a session, of the same id
        assert len({path.stem for path in tmp_path.rglob("*.wandb")}) == 1
    else:
        sqlite = __import__("sqlite3").connect(next((tmp_path / "store").rglob("twofold.db")))
        rows = sqlite.execute("select step, metrics from metrics order by step").fetchall()
        assert [(step, json.loads(values)["loss"]) for step, values in rows] == [(n, 10.0 + n) for n in range(4)]
