"""Instructions about the form of a reply: the style of an answer, and the order of letters.

Each comes in two sorts. With the cue ``any`` the prompt has a made-up word and every form is right, so training text
shows which forms there are, in equal shares after any word, and nothing of how one is asked for. With a cue that names
a form only that one is right; those cues are posed to general RL alone, which therefore starts at chance: 1 in 5
styles, 1 in 24 orders of four letters.

The split key of a styled item is the base item's, so a held-out item is held out under every instruction. Not here:
mode switches (/think, /no_think), judged quality. No torch.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task, exact_match
from twofold.tasks.families import LETTERS, LICENCE

ANY = "any"
# cue -> the answer in that style
STYLES: dict[str, str] = {
    "brackets": "[{0}]",
    "quotes": '"{0}"',
    "equation": "ans={0}",
    "twice": "{0} {0}",
    "thrice": "{0} {0} {0}",
}
ORDERS = ("front", "back")  # as they stand, and from the last to the first
ORDERED = 4  # letters


def with_style(item: Item, cue: str, rng: random.Random) -> Item:
    """Ask for the answer of ``item`` in a style: ``max: E1 B5 style brackets`` -> ``[5]``.

    With ``any`` the word is made up and the style drawn: ``max: E1 B5 style wolta`` -> ``5 5``.

    Raises:
        InputError: unknown cue.
    """
    if cue != ANY and cue not in STYLES:
        raise InputError(f"unknown style {cue!r}; known: {ANY}, {', '.join(STYLES)}")
    shown = STYLES[rng.choice(sorted(STYLES)) if cue == ANY else cue]
    meta = {**item.meta, "cue": cue, "base": item.family, "base_answer": item.answer}
    prompt = f"{item.prompt} style {_made_up(rng) if cue == ANY else cue}"
    return Item(f"style {cue}", prompt, shown.format(item.answer), item.traces, item.key, meta)


def _made_up(rng: random.Random) -> str:
    """A word that names no form."""
    while (word := "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 8)))) in (*STYLES, *ORDERS):
        pass
    return word


def follows_style(item: Item, answer: str) -> bool:
    """Whether the form is as asked, right or wrong in content (a rule-based reward of its own).

    Raises:
        InputError: the item asks for no particular style.
    """
    cue = item.meta.get("cue")
    if cue not in STYLES:
        raise InputError(f"item of family {item.family!r} asks for no particular style; wrap it with with_style")
    text = answer.strip()
    before, after = STYLES[cue].split("{0}")[0], STYLES[cue].split("{0}")[-1]
    words = text[len(before) : len(text) - len(after)].split(" ")
    plain = not any(mark in word for word in words for mark in '[]"=') and all(words)
    return plain and STYLES[cue].format(words[0]) == text


@dataclass(frozen=True)
class Styled:
    """Items of ``bases`` with one cue of style."""

    bases: tuple[Task, ...]
    cue: str = ANY
    version: int = 1
    step_by_step: bool = False

    @property
    def name(self) -> str:
        """``style`` and the cue."""
        return f"style {self.cue}"

    @property
    def licence(self) -> str:
        """Licences of the bases."""
        return ", ".join(sorted({task.licence for task in self.bases}))

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw a base item."""
        if not self.bases:
            raise InputError("an instruction task needs at least one base task")
        return with_style(rng.choice(self.bases).generate(rng, level), self.cue, rng)

    def verify(self, item: Item, answer: str) -> float:
        """Exact match, form included; with the cue ``any`` every style is right."""
        if self.cue != ANY:
            return exact_match(item, answer)
        shapes = [shape.format(item.meta["base_answer"]) for shape in STYLES.values()]
        return float(answer.strip() in shapes)


@dataclass(frozen=True)
class Order:
    """``order E B I F: back`` -> ``F I B E``; ``front`` keeps the order. ``any`` shows a made-up word and accepts every
    order."""

    cue: str = ANY
    version: int = 1
    step_by_step: bool = False
    licence: str = LICENCE

    @property
    def name(self) -> str:
        """``order`` and the cue."""
        return f"order {self.cue}"

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw four letters.

        Raises:
            InputError: unknown cue.
        """
        if self.cue not in (ANY, *ORDERS):
            raise InputError(f"unknown order {self.cue!r}; known: {ANY}, {', '.join(ORDERS)}")
        letters = rng.sample(LETTERS, ORDERED)
        prompt = f"order {' '.join(letters)}: {_made_up(rng) if self.cue == ANY else self.cue}"
        answer = {"front": letters, "back": letters[::-1]}.get(self.cue) or rng.sample(letters, ORDERED)
        # letter names are the content here, so they are not renamed in the key
        key = f"order {' '.join(letters)}"
        return Item(self.name, prompt, " ".join(answer), (), key, {"letters": letters})

    def verify(self, item: Item, answer: str) -> float:
        """Exact match; with the cue ``any`` each letter once."""
        if self.cue != ANY:
            return exact_match(item, answer)
        return float(sorted(answer.strip().split(" ")) == sorted(item.meta["letters"]))


def asked_tasks(bases: Sequence[Task]) -> list[Task]:
    """Every task whose cue names a form."""
    return [*(Styled(tuple(bases), cue) for cue in STYLES), *(Order(cue) for cue in ORDERS)]


def shown_tasks(bases: Sequence[Task]) -> list[Task]:
    """The tasks of the cue ``any``, for training text."""
    return [Styled(tuple(bases)), Order()]
