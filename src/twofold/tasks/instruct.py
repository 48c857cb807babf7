"""Instructions around a base item: reply in a given format, or a given number of times.

They give general RL something to follow that is checked by rule. The split key is the base item's, so a held-out
item is held out under every instruction. Not here: mode switches (/think, /no_think), judged quality. No torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task, exact_match

# surface of the request -> (text before, text after) the bare answer
FORMATS: dict[str, tuple[str, str]] = {"[x]": ("[", "]"), "ans=x": ("ans=", ""), '"x"': ('"', '"')}
MAX_REPEATS = 4


def with_format(item: Item, surface: str) -> Item:
    """Ask for the answer of ``item`` in one of FORMATS: ``… reply as [x]`` -> ``[7]``.

    Raises:
        InputError: unknown surface form.
    """
    if surface not in FORMATS:
        raise InputError(f"unknown answer format {surface!r}; known: {', '.join(FORMATS)}")
    before, after = FORMATS[surface]
    meta = {**item.meta, "instruction": surface, "base": item.family, "base_answer": item.answer}
    prompt = f"{item.prompt} reply as {surface}"
    return Item("format", prompt, f"{before}{item.answer}{after}", item.traces, item.key, meta)


def with_length(item: Item, times: int) -> Item:
    """Ask for the answer of ``item`` ``times`` times: ``… reply 3 times`` -> ``7 7 7``.

    Raises:
        InputError: ``times`` outside 1..4.
    """
    if not 1 <= times <= MAX_REPEATS:
        raise InputError(f"an answer can be asked for 1 to {MAX_REPEATS} times, got {times}")
    meta = {**item.meta, "instruction": times, "base": item.family, "base_answer": item.answer}
    prompt = f"{item.prompt} reply {times} times"
    return Item("length", prompt, " ".join([item.answer] * times), item.traces, item.key, meta)


def follows_instruction(item: Item, answer: str) -> bool:
    """Whether the form is as asked, right or wrong in content (a rule-based reward of its own).

    Raises:
        InputError: the item carries no instruction of this module.
    """
    text = answer.strip()
    if item.family == "format":
        before, after = FORMATS[item.meta["instruction"]]
        inner = text[len(before) : len(text) - len(after)]
        fits = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
        asked = len(item.meta["base_answer"].split(" "))
        return fits and len(inner.split(" ")) == asked and not any(mark in inner for mark in '[]"=')
    if item.family == "length":
        words = text.split(" ")
        each, rest = divmod(len(words), item.meta["instruction"])
        asked = len(item.meta["base_answer"].split(" "))
        return rest == 0 and each == asked and "" not in words and words == words[:each] * item.meta["instruction"]
    raise InputError(f"item of family {item.family!r} carries no instruction; wrap it with with_format or with_length")


@dataclass(frozen=True)
class AnswerFormat:
    """Items of ``bases`` with a randomly drawn answer format."""

    bases: tuple[Task, ...]
    name: str = "format"
    version: int = 1

    @property
    def step_by_step(self) -> bool:
        """True when any base needs steps."""
        return any(task.step_by_step for task in self.bases)

    @property
    def licence(self) -> str:
        """Licences of the bases."""
        return _licences(self.bases)

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw a base item and a format."""
        item = _base_item(self.bases, rng, level)
        return with_format(item, rng.choice(sorted(FORMATS)))

    def verify(self, item: Item, answer: str) -> float:
        """Exact match, form included."""
        return exact_match(item, answer)


@dataclass(frozen=True)
class AnswerLength:
    """Items of ``bases`` whose answer is to be repeated 1 to 4 times."""

    bases: tuple[Task, ...]
    name: str = "length"
    version: int = 1

    @property
    def step_by_step(self) -> bool:
        """True when any base needs steps."""
        return any(task.step_by_step for task in self.bases)

    @property
    def licence(self) -> str:
        """Licences of the bases."""
        return _licences(self.bases)

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw a base item and a number of repeats."""
        item = _base_item(self.bases, rng, level)
        return with_length(item, rng.randint(1, MAX_REPEATS))

    def verify(self, item: Item, answer: str) -> float:
        """Exact match, number of repeats included."""
        return exact_match(item, answer)


def _base_item(bases: Sequence[Task], rng: random.Random, level: float) -> Item:
    if not bases:
        raise InputError("an instruction task needs at least one base task")
    return rng.choice(bases).generate(rng, level)


def _licences(bases: Sequence[Task]) -> str:
    return ", ".join(sorted({task.licence for task in bases}))
