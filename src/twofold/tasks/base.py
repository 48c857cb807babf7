"""What a task is: an item with a checkable answer, a protocol, and the train/test split by content.

The same object makes training queries, evaluation items and rewards, so a score and a reward cannot disagree.
The split is a hash of a canonical form of the item, so a held-out item under other letter names is held out too.
Not here: any concrete family (families.py), chat rendering, or sampling from a model. Imports no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from twofold.base.records import InputError
from twofold.base.split import held_out

Split = Literal["train", "test"]

_MAX_TRIES = 20_000
_SIZE_TRIES = 600  # draws at one size before any size will do
_LONE_CAPITAL = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


@dataclass(frozen=True)
class Item:
    """One query with its reference answer.

    family: name of the task that made it. traces: different correct solutions, each the text inside a think block
    (the first is the canonical one; empty when the family has none). key: canonical form for splitting.
    """

    family: str
    prompt: str
    answer: str
    traces: tuple[str, ...]
    key: str
    meta: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A family of items and its verifier. ``version`` rises whenever items or verdicts change."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def step_by_step(self) -> bool:
        """Whether the answer needs steps that a direct reply cannot hold."""
        ...

    @property
    def licence(self) -> str: ...

    def generate(self, rng: random.Random, level: float) -> Item:
        """Make one item; ``level`` in [0, 1] is the curriculum position (0 = only the smallest size)."""
        ...

    def verify(self, item: Item, answer: str) -> float:
        """1.0 when ``answer`` (the text after thinking) is right, else 0.0; surrounding white space is ignored."""
        ...


def canonical_key(text: str) -> str:
    """Normalise a prompt so that near-copies collide.

    Capital letters that stand alone are renamed by first appearance, then case and white space are normalised.
    """
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        return names.setdefault(match.group(), f"<{len(names)}>")

    return " ".join(_LONE_CAPITAL.sub(rename, text).lower().split())


def exact_match(item: Item, answer: str) -> float:
    """1.0 when the stripped answer is exactly the reference, else 0.0."""
    return 1.0 if answer.strip() == item.answer else 0.0


def draw_size(rng: random.Random, low: int, high: int, level: float) -> int:
    """Draw a size uniformly from [low, low + level * (high - low)].

    Raises:
        InputError: ``level`` outside [0, 1].
    """
    if not 0.0 <= level <= 1.0:
        raise InputError(f"level must be between 0 and 1, got {level}")
    return rng.randint(low, low + round(level * (high - low)))


def draw_item(
    task: Task, rng: random.Random, split: Split, level: float = 1.0, fresh: Callable[[Item], bool] | None = None
) -> Item:
    """Draw a size (``meta["n"]``, where the family has one), then items of that size until one falls into ``split``.

    Without the size first, sizes with many held-out keys would crowd out the others. A size that gives no item in 600
    tries is let go.

    Raises:
        InputError: no such item in 20,000 tries (too few distinct items at this level).
    """
    size = task.generate(rng, level).meta.get("n")
    for number in range(_MAX_TRIES):
        item = task.generate(rng, level)
        if item.meta.get("n") != size and number < _SIZE_TRIES:
            continue
        if held_out(item.key) == (split == "test") and (fresh is None or fresh(item)):
            return item
    raise InputError(
        f"task {task.name!r} has no further {split} item at level {level}; ask for fewer items or use a higher level"
    )


def sample_items(tasks: Sequence[Task], count: int, seed: int, split: Split, level: float = 1.0) -> list[Item]:
    """Draw ``count`` items with distinct prompts, round-robin over ``tasks``, as a function of the arguments alone.

    Each task has its own random stream, so adding a task does not change the items of the others. Test items also
    have distinct keys within their task: one question under other letters is no second question.

    Raises:
        InputError: no tasks, an unknown split, two tasks of one name, or more items asked for than a task has.
    """
    if not tasks:
        raise InputError("sample_items needs at least one task")
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', got {split!r}")
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise InputError(f"task names must be distinct, got {names}")
    streams = [random.Random(f"{seed}:{split}:{name}") for name in names]
    seen: set[tuple[str, str]] = set()
    items: list[Item] = []
    for index in range(count):
        task, rng = tasks[index % len(tasks)], streams[index % len(tasks)]
        item = draw_item(task, rng, split, level, lambda item: _identity(item, split) not in seen)
        seen.add(_identity(item, split))
        items.append(item)
    return items


def _identity(item: Item, split: Split) -> tuple[str, str]:
    """What no two items of a sample share."""
    return (item.family, item.key) if split == "test" else ("", item.prompt)
