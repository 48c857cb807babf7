"""Pre-training text made of task items: ``{q}\\n{think}\\n\\n{answer}`` or ``{q}\\n{answer}``.

Only items of the train split are written. Tasks are taken by their shape (anything with ``generate``), so this
module depends on no particular family. Not here: chat markup, end-of-document tokens, tokenisation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from twofold.base.records import InputError
from twofold.base.split import held_out

_MAX_TRIES = 20_000
_RAMP_SHARE = 0.5  # of the documents; afterwards sizes are drawn from the whole range


class ItemLike(Protocol):
    """What is needed of an item."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def traces(self) -> tuple[str, ...]: ...

    @property
    def key(self) -> str: ...


class TaskLike(Protocol):
    """What is needed of a task."""

    @property
    def name(self) -> str: ...

    def generate(self, rng: random.Random, level: float) -> ItemLike: ...


def item_text(item: ItemLike, trace: str | None) -> str:
    """Text of one item, with the trace when there is one."""
    if trace is None:
        return f"{item.prompt}\n{item.answer}"
    return f"{item.prompt}\n{trace}\n\n{item.answer}"


def task_documents(
    tasks: Sequence[TaskLike],
    count: int,
    seed: int,
    think_share: float,
    curriculum: bool,
    all_traces: bool = False,
) -> Iterator[str]:
    """Yield ``count`` documents, tasks in turn; document i depends on (seed, i) and the settings alone.

    Args:
        think_share: probability that a document shows a trace (items without traces never do).
        curriculum: sizes grow from the smallest to the full range over the first half; keep the order when training.
        all_traces: draw one of the item's traces instead of its canonical first one.

    Raises:
        InputError: no tasks, a share outside [0, 1], or a task without train items at some level.
    """
    if not tasks:
        raise InputError("task_documents needs at least one task")
    if not 0.0 <= think_share <= 1.0:
        raise InputError(f"think_share must be between 0 and 1, got {think_share}")
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        level = min(1.0, index / (_RAMP_SHARE * count)) if curriculum else 1.0
        item = _train_item(tasks[index % len(tasks)], rng, level)
        trace = None
        if item.traces and rng.random() < think_share:
            trace = rng.choice(item.traces) if all_traces else item.traces[0]
        yield item_text(item, trace)


def _train_item(task: TaskLike, rng: random.Random, level: float) -> ItemLike:
    for _ in range(_MAX_TRIES):
        item = task.generate(rng, level)
        if not held_out(item.key):
            return item
    raise InputError(f"task {task.name!r} has no train item at level {level}; raise its smallest size")
