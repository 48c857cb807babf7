"""Adapter for the reasoning-gym package: its procedural data sets as tasks.

Items come from the gym's own generators, and its own scorers judge the answers (only a full score counts).
The families chosen here have short questions. Not here: solver traces (the gym has none), other suites.
reasoning-gym is an optional extra and is imported only when a task is used. Imports no torch.
"""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task, canonical_key

_INDEX_RANGE = 2**30  # items of one gym data set; each is generated from (seed, index) on demand
_LEVELS = 4  # the curriculum position is rounded to this many steps


@dataclass(frozen=True)
class GymTask:
    """One reasoning-gym data set.

    dataset: its name in the gym. fixed: settings as they are. ranges: settings that grow with the curriculum, as
    (name, value at level 0, value at level 1).
    """

    dataset: str
    fixed: tuple[tuple[str, Any], ...] = ()
    ranges: tuple[tuple[str, int, int], ...] = ()
    step_by_step: bool = True
    version: int = 1
    licence: str = "Apache-2.0"

    @property
    def name(self) -> str:
        """``gym_`` and the name of the data set."""
        return f"gym_{self.dataset}"

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw one entry of the gym's data set.

        Raises:
            InputError: the extra is not installed, the data set or a setting is unknown, or a bad level.
        """
        if not 0.0 <= level <= 1.0:
            raise InputError(f"level must be between 0 and 1, got {level}")
        step = round(level * _LEVELS) / _LEVELS
        grown = tuple((name, low + round(step * (high - low))) for name, low, high in self.ranges)
        entry = _open_dataset(self.dataset, self.fixed + grown)[rng.randrange(_INDEX_RANGE)]
        prompt = " ".join(entry["question"].split())
        meta = {"dataset": self.dataset, "entry": entry}
        # upper-casing makes every lone letter (variable names, letters asked for) subject to renaming
        key = f"{self.name} {canonical_key(prompt.upper())}"
        return Item(self.name, prompt, str(entry["answer"]), (), key, meta)

    def verify(self, item: Item, answer: str) -> float:
        """1.0 when the gym's scorer gives a full score to the stripped answer, else 0.0."""
        text = answer.strip()
        if not text:
            return 0.0
        score = _open_dataset(self.dataset, self.fixed).score_answer(text, item.meta["entry"])
        return 1.0 if score >= 1.0 else 0.0


@lru_cache(maxsize=128)
def _open_dataset(name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise InputError("this task needs reasoning-gym; install it with: pip install 'twofold[tasks]'") from error
    try:
        return gym.create_dataset(name, size=_INDEX_RANGE, seed=0, **dict(settings))
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"reasoning-gym cannot make {name!r} with {dict(settings)}: {error}") from None


def gym_families() -> list[Task]:
    """Families with short questions that a small model can partly learn."""
    return [
        GymTask("spell_backward", (("min_word_len", 3),), (("max_word_len", 3, 6),), step_by_step=False),
        GymTask("chain_sum", (("min_terms", 2), ("max_digits", 1), ("min_digits", 1)), (("max_terms", 2, 4),)),
        GymTask("basic_arithmetic", (("min_terms", 2), ("min_digits", 1), ("max_digits", 1)), (("max_terms", 2, 4),)),
        GymTask("letter_counting", (("min_words", 1),), (("max_words", 1, 4),)),
        GymTask("gcd", (("min_value", 1),), (("max_value", 10, 60),)),
        GymTask("simple_equations", (("min_terms", 2), ("max_terms", 2), ("min_value", 1)), (("max_value", 5, 20),)),
    ]
