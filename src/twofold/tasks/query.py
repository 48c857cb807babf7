"""A query: one task item posed as a conversation in one mode, with what a good reply must look like.

Evaluation, rewards, distillation and synthetic data all start from queries, so they agree on what was asked.
Soft switches are plain text; what mode a query calls for is worked out from the last one. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from twofold.base.records import Message
from twofold.tasks.base import Item, Task
from twofold.tasks.tools import ToolTask
from twofold.text.messages import last_flag

Mode = Literal["think", "no_think"]
FLAG = {"think": " /think", "no_think": " /no_think"}
MODE_KIND = "mode: "


@dataclass(frozen=True)
class Query:
    """``messages`` end with the user turn to be answered. ``kind`` names the query's sort for balance and reports.

    hard_switch: the prompt pre-fills the empty think block (``enable_thinking=False``). tools: offered, or None.
    """

    kind: str
    messages: tuple[Message, ...]
    item: Item
    task: Task
    hard_switch: bool = False
    tools: ToolTask | None = field(default=None)

    @property
    def mode(self) -> Mode:
        """The mode the model must use: the hard switch, else the last soft switch, else thinking."""
        if self.hard_switch:
            return "no_think"
        return last_flag(self.messages) or "think"

    @property
    def form(self) -> str:
        """How the mode is asked for: a pattern of flags, one flag, none, or the hard switch; with tools or without."""
        if self.kind.startswith(MODE_KIND):
            pattern = self.kind.removeprefix(MODE_KIND)
            form = pattern if pattern in FLAG_PATTERNS or pattern == "hard switch" else "random flags"
        else:
            flag = last_flag(self.messages)
            form = "hard switch" if self.hard_switch else f"/{flag}" if flag else "no flag"
        return f"tool, {form}" if self.tools else form


def single(item: Item, task: Task, flag: Mode | None = None, hard_switch: bool = False, kind: str = "") -> Query:
    """One user turn, with a soft switch after it if ``flag`` is given."""
    text = item.prompt + (FLAG[flag] if flag else "")
    return Query(kind or item.family, (Message("user", text),), item, task, hard_switch)


def with_tools(item: Item, task: ToolTask, flag: Mode | None = None) -> Query:
    """One user turn with the task's tools on offer."""
    text = item.prompt + (FLAG[flag] if flag else "")
    return Query("tool", (Message("user", text),), item, task, False, task)


# Flag patterns over turns: "u" a user turn, "s" a system turn; "+" /think, "-" /no_think, in order.
FLAG_PATTERNS: dict[str, tuple[str, ...]] = {
    "no flag": ("u",),
    "/think": ("u+",),
    "/no_think": ("u-",),
    "conflict, last /no_think": ("u+-",),
    "conflict, last /think": ("u-+",),
    "three flags": ("u-+-",),
    "earlier turn /no_think": ("u-", "u"),
    "earlier turn /think": ("u+", "u"),
    "turned on again": ("u-", "u+"),
    "turned off again": ("u+", "u-"),
    "three turns": ("u-", "u+", "u-"),
    "system /no_think": ("s-", "u"),
    "system /think": ("s+", "u"),
    "system against user": ("s-", "u+"),
    "system against user, off": ("s+", "u-"),
    "off, kept for two turns": ("u-", "u", "u"),
    "on again, then kept": ("u-", "u+", "u"),
    "off again, then kept": ("u+", "u-", "u"),
    "on again after a pause": ("u-", "u", "u+"),
    "four turns": ("u+", "u-", "u+", "u"),
    "system /no_think, then kept": ("s-", "u", "u"),
}
# Never trained on, so that following them is following the rule.
HELD_OUT_PATTERNS = (
    "conflict, last /think",
    "three turns",
    "off, kept for two turns",
    "on again, then kept",
    "off again, then kept",
    "on again after a pause",
    "four turns",
    "system /no_think, then kept",
)
_MOST_TURNS = 4
_FLAGS = ("", "", "", "", "", "", "+", "+", "-", "-", "+-", "-+")  # half of the turns keep the mode that was asked for
TAUGHT_PATTERNS = tuple(name for name in FLAG_PATTERNS if name not in HELD_OUT_PATTERNS)
SYSTEM_PATTERNS = tuple(name for name, turns in FLAG_PATTERNS.items() if turns[0].startswith("s"))


def turns_of(pattern: str) -> tuple[str, ...]:
    """The turns of a named pattern, or of one spelled out: ``u- u u+``."""
    return FLAG_PATTERNS.get(pattern) or tuple(pattern.split())


def random_pattern(rng: random.Random) -> str:
    """One to four user turns with flags or without, spelled out, a third of them after a system turn with a flag;
    never a held-out pattern."""
    while True:
        system = (f"s{rng.choice('+-')}",) if rng.random() < 1 / 3 else ()
        turns = (*system, *(f"u{rng.choice(_FLAGS)}" for _ in range(rng.randint(1, _MOST_TURNS))))
        if turns not in {FLAG_PATTERNS[name] for name in HELD_OUT_PATTERNS}:
            return " ".join(turns)


def flagged(items: Sequence[tuple[Item, Task]], pattern: str) -> Query:
    """A conversation with the flags of ``pattern``; its last user turn asks the last item.

    Args:
        items: one (item, task) for each user turn. Earlier turns are answered by the solver (thinking is stripped
            from history, so only answers show).
    """
    turns = turns_of(pattern)
    messages: list[Message] = []
    asked = iter(items)
    item, task = items[0]
    for number, turn in enumerate(turns):
        flags = "".join(FLAG["think" if sign == "+" else "no_think"] for sign in turn[1:])
        if turn[0] == "s":
            messages.append(Message("system", flags.strip()))
            continue
        item, task = next(asked)
        messages.append(Message("user", item.prompt + flags))
        if number < len(turns) - 1:
            messages.append(Message("assistant", item.answer))
    name = next((name for name, named in FLAG_PATTERNS.items() if named == turns), pattern)
    return Query(MODE_KIND + name, tuple(messages), item, task)


def user_turns(pattern: str) -> int:
    """How many items ``flagged`` needs for a pattern."""
    return sum(turn[0] == "u" for turn in turns_of(pattern))
