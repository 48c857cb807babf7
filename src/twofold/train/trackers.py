"""Rows of metrics to TensorBoard, wandb or trackio, where asked for; JSON Lines files are written without them.

The packages are looked for before a run begins and imported when it does, here alone. A tracker that fails later is
given up with one warning: it must not stop the training that it watches. Not here: what a row holds.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator

from twofold.base.config import ConfigError
from twofold.base.records import InputError

Name = Literal["tensorboard", "wandb", "trackio"]
Track = Annotated[
    tuple[Name, ...], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) and given else given)
]
PROJECT = "twofold"


class Tracker(Protocol):
    """``log`` takes finite numbers by name; ``close`` leaves all of them on disk, or sent."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run.

    Args:
        names: which. folder: for what they keep on disk; a resumed run gives the same again. run: its name.
        settings: JSON-able, shown beside the curves.

    Raises:
        InputError: one of them cannot be started; the message says what it said.
    """

    def __init__(self, names: Sequence[str], folder: Path, run: str, settings: dict[str, Any]) -> None:
        self.open: dict[str, Tracker] = {}
        for name in names:
            try:
                self.open[name] = _START[name](folder / name, run, settings)
            except Exception as error:
                self.close()
                what = " ".join(f"{type(error).__name__}: {error}".split())
                raise InputError(f"{name} cannot be started ({what}); mend that, or leave it out of track") from error

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Hand on what is a finite number; a tracker that fails is given up with a warning."""
        numbers = {name: float(value) for name, value in row.items() if name != "step" and _is_number(value)}
        self._each("log", lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Let all of them finish."""
        self._each("close", lambda tracker: tracker.close())
        self.open.clear()

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.open[name]
                warnings.warn(
                    f"{name} failed to {what} ({type(error).__name__}: {error}) and gets no more rows; metrics.jsonl "
                    "has them all",
                    RuntimeWarning,
                    stacklevel=4,
                )


def check_installed(names: Sequence[str]) -> None:
    """Look for the packages without importing them.

    Raises:
        ConfigError: one is missing; the message says how to install it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"track={missing[0]} needs a package that is missing: pip install 'twofold[track]'")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _TensorBoard:
    """Event files in ``folder``; rows that an interrupted run left there, of steps done again, are taken back."""

    def __init__(self, folder: Path, run: str, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer: Any = None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:
            self.writer = self.make(str(self.folder), purge_step=step)
            self.writer.add_text("settings", "\n".join(f"    {k} = {v}" for k, v in self.settings.items()), step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Wandb:
    """One wandb run, resumed by the id that the folder keeps; WANDB_MODE=offline needs no account."""

    def __init__(self, folder: Path, run: str, settings: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=PROJECT, name=run, id=_identity(folder), resume="allow", dir=str(folder), config=settings
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """One trackio run, resumed by its name; ``trackio show`` shows it."""

    def __init__(self, folder: Path, run: str, settings: dict[str, Any]) -> None:
        import trackio

        folder.mkdir(parents=True, exist_ok=True)
        name = f"{run}-{_identity(folder)}"
        self.run = trackio.init(project=PROJECT, name=name, resume="allow", config=settings, embed=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


_START: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _identity(folder: Path) -> str:
    """A name that a resumed run finds again."""
    path = folder / "id"
    if not path.is_file():
        path.write_text(os.urandom(4).hex(), encoding="ascii")
    return path.read_text(encoding="ascii")
