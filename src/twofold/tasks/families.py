"""Own task families, small enough for a model of a few hundred thousand parameters.

``sum``, ``swap``, ``run`` and ``least`` need their steps; in ``top`` part of them is worth something; ``max``, ``min``
and ``last`` can be answered directly; ``pick``, a single look-up, is practice for the others; ``let`` and
``hop`` are extras. Every trace does one primitive per token with its operands close by and looks things up by unique
letters; letters always keep the spaced form (" A"), because another spelling is another token.

``run`` and ``least`` come in three reaches. "pure" items, in which every step adds or every step takes away, are shown
with their steps in training text. "mixed" ones, in which both occur, are posed to RL without any steps: the parts are
known, their combination is not. "beyond" ones are mixed and longer, for measurement alone.
Not here: wrong answers by a model, chat templates, difficulty estimates. Imports no torch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task, canonical_key, draw_size, exact_match

Reach = Literal["pure", "mixed", "beyond"]

LETTERS = "ABCDEFGHIJ"
MINUS_LETTERS = "klmnopqrst"
LICENCE = "CC0-1.0"
_LABELS = "abcdefghijklmnop"


def _different(*traces: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(traces))


def _lettered_digits(rng: random.Random, n: int) -> list[tuple[str, int]]:
    return [(letter, rng.randrange(10)) for letter in rng.sample(LETTERS, n)]


def _shown(pairs: list[tuple[str, int]]) -> str:
    return " ".join(f"{letter}{digit}" for letter, digit in pairs)


class _OneAnswer:
    """A family whose items have exactly one right answer."""

    def verify(self, item: Item, answer: str) -> float:
        """Exact match with the reference."""
        return exact_match(item, answer)


@dataclass(frozen=True)
class SumMod(_OneAnswer):
    """``sum mod 10: E1 B5 I6`` -> ``2``; trace `` E0+1=1 B1+5=6 I6+6=2``."""

    low: int = 3
    high: int = 8
    name: str = "sum"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` lettered digits to be added modulo 10."""
        n = draw_size(rng, self.low, self.high, level)
        pairs = _lettered_digits(rng, n)
        prompt = "sum mod 10: " + _shown(pairs)
        forward, total = _running_sum(pairs)
        backward, _ = _running_sum(pairs[::-1])
        traces = _different(forward, backward)
        return Item(self.name, prompt, str(total), traces, canonical_key(prompt), {"n": n})


def _running_sum(pairs: list[tuple[str, int]]) -> tuple[str, int]:
    total, steps = 0, []
    for letter, digit in pairs:
        following = (total + digit) % 10
        steps.append(f" {letter}{total}+{digit}={following}")
        total = following
    return "".join(steps), total


@dataclass(frozen=True)
class Run(_OneAnswer):
    """``run mod 10: E1 k5 I6`` -> ``2``: capitals add their digit, small letters take it away.

    Trace `` E0+1=1 k1-5=6 I6+6=2``. reach "pure": all signs are one; "mixed": both occur.
    """

    reach: Reach = "pure"
    low: int = 3
    high: int = 6
    name: str = "run"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` lettered digits with their signs."""
        n = draw_size(rng, self.low, self.high, level)
        entries = [(letter, rng.randrange(10)) for letter in _signed_letters(rng, n, self.reach)]
        total, steps = 0, []
        for letter, digit in entries:
            following = _signed(letter, total, digit)
            steps.append(f" {letter}{total}{_sign(letter)}{digit}={following}")
            total = following
        key = "run " + "".join(f"{_sign(letter)}{digit}" for letter, digit in entries)
        return Item(self.name, "run mod 10: " + _shown(entries), str(total), ("".join(steps),), key, {"n": n})


def _signed_letters(rng: random.Random, n: int, reach: Reach) -> list[str]:
    """Distinct letters: capitals A-J add, small letters k-t take away."""
    pure = reach == "pure"
    plus = rng.choice((0, n)) if pure else rng.randint(1, n - 1)
    letters = rng.sample(LETTERS, plus) + rng.sample(MINUS_LETTERS, n - plus)
    return rng.sample(letters, n)


def _sign(letter: str) -> str:
    return "+" if letter in LETTERS else "-"


def _signed(letter: str, value: int, digit: int) -> int:
    return (value + digit if letter in LETTERS else value - digit) % 10


@dataclass(frozen=True)
class Let(_OneAnswer):
    """``let mod 10: C= D7, G= C8, D=8, A= G2 find G`` -> ``3``; ``C= D7`` reads "C is D plus 7".

    Trace: `` G= C8, C= D7, D=8; C=8+7=5, G=5+8=3`` (look-ups back to the constant, then sums forward). Up to two
    definitions lead on past the one asked for: without them the answer would be the sum of every number shown,
    whatever refers to what. Every letter is referred to at most once, and its number follows it at once, so that a
    look-up has one key.
    """

    low: int = 2
    high: int = 6
    name: str = "let"
    version: int = 2
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw a chain of ``low``..``high`` definitions and up to two that lead on, in shuffled order."""
        n = draw_size(rng, self.low, self.high, level)
        letters = rng.sample(LETTERS, n + rng.randint(0, 2))
        constant, steps = rng.randrange(10), [rng.randint(1, 9) for _ in letters[1:]]
        defined = [f"{letters[0]}={constant}"]
        links = zip(letters[:-1], letters[1:], steps, strict=True)
        defined += [f"{letter}= {before}{step}" for before, letter, step in links]
        chain, steps = defined[:n], steps[: n - 1]
        shuffled = rng.sample(defined, len(defined))
        prompt = f"let mod 10: {', '.join(shuffled)} find {letters[n - 1]}"
        value, sums = constant, []
        for letter, step in zip(letters[1:n], steps, strict=True):
            following = (value + step) % 10
            sums.append(f"{letter}={value}+{step}={following}")
            value = following
        tail = "; " + ", ".join(sums)
        as_shown = [definition for definition in shuffled if definition in chain]
        traces = _different(*(" " + ", ".join(order) + tail for order in (chain[::-1], chain, as_shown)))
        key = "let " + "+".join(map(str, [constant, *steps]))  # order, letters and what leads on do not matter
        return Item(self.name, prompt, str(value), traces, key, {"n": n})


@dataclass(frozen=True)
class Swap(_OneAnswer):
    """``swap I G E: a12 b23`` -> ``G E I``; trace `` a12 G I E b23 G E I`` (three cups, labelled exchanges)."""

    low: int = 3
    high: int = 8
    name: str = "swap"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw three cups and ``low``..``high`` exchanges of two places."""
        n = draw_size(rng, self.low, self.high, level)
        start = rng.sample(LETTERS, 3)
        moves = [rng.choice(("12", "13", "23")) for _ in range(n)]
        cups, steps, shown = list(start), [], []
        for label, move in zip(_LABELS, moves, strict=False):
            i, j = int(move[0]) - 1, int(move[1]) - 1
            cups[i], cups[j] = cups[j], cups[i]
            shown.append(f"{label}{move}")
            steps.append(f" {label}{move} {' '.join(cups)}")
        prompt = f"swap {' '.join(start)}: {' '.join(shown)}"
        trace = "".join(steps)
        traces = (trace, f" {' '.join(start)}{trace}")
        return Item(self.name, prompt, " ".join(cups), traces, canonical_key(prompt), {"n": n})


@dataclass(frozen=True)
class Top(_OneAnswer):
    """``top: E15 B52 I60`` -> ``B``: the letter whose two digits have the largest sum modulo 10, the first of equals.

    Trace, each sum with the largest so far and its letter: `` E1+5=6;6 E B5+2=7;7 B I6+0=6;7 B``. A thought that is
    stopped after some entries knows the best of those, and where it is stopped says nothing of the answer.
    """

    low: int = 4
    high: int = 6
    name: str = "top"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` letters with two digits each."""
        n = draw_size(rng, self.low, self.high, level)
        entries = _with_two_digits(rng, rng.sample(LETTERS, n))
        best, leader, steps = -1, "", []
        for letter, a, b in entries:
            value = (a + b) % 10
            if value > best:
                best, leader = value, letter
            steps.append(f" {letter}{a}+{b}={value};{best} {leader}")
        prompt = "top: " + _two_digits_shown(entries)
        return Item(self.name, prompt, leader, ("".join(steps),), canonical_key(prompt), {"n": n})


@dataclass(frozen=True)
class Least(_OneAnswer):
    """``least: E15 k52 I61`` -> ``k3``: the letter with the smallest value, the first of equals, and that value. A
    capital's value is the sum of its digits modulo 10, a small letter's their difference. The letter alone would often
    be right by wrong steps.

    Trace, each value with the least so far: `` E1+5=6 E6 k5-2=3 k3 I6+1=7 k3``. ``reach`` is as for ``Run``.
    """

    reach: Reach = "pure"
    low: int = 4
    high: int = 6
    name: str = "least"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` letters with two digits each and their signs."""
        n = draw_size(rng, self.low, self.high, level)
        entries = _with_two_digits(rng, _signed_letters(rng, n, self.reach))
        least, leader, steps = 10, "", []
        for letter, a, b in entries:
            value = _signed(letter, a, b)
            if value < least:
                least, leader = value, letter
            steps.append(f" {letter}{a}{_sign(letter)}{b}={value} {leader}{least}")
        prompt = "least: " + _two_digits_shown(entries)
        key = "least " + " ".join(f"{a}{_sign(letter)}{b}" for letter, a, b in entries)
        return Item(self.name, prompt, f"{leader}{least}", ("".join(steps),), key, {"n": n})


def _with_two_digits(rng: random.Random, letters: list[str]) -> list[tuple[str, int, int]]:
    return [(letter, rng.randrange(10), rng.randrange(10)) for letter in letters]


def _two_digits_shown(entries: list[tuple[str, int, int]]) -> str:
    return " ".join(f"{letter}{a}{b}" for letter, a, b in entries)


@dataclass(frozen=True)
class Direct(_OneAnswer):
    """Questions about a row of digits that are answered without thinking: ``max: E1 B5 I3`` -> ``5``.

    name: ``max`` the largest digit, ``min`` the smallest, ``last`` the last one. Trace: each entry with the answer so
    far, `` E1=1 B5=5 I3=5``.
    """

    name: Literal["max", "min", "last"] = "max"
    low: int = 3
    high: int = 8
    version: int = 2
    step_by_step: bool = False
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` lettered digits."""
        n = draw_size(rng, self.low, self.high, level)
        pairs = _lettered_digits(rng, n)
        prompt = f"{self.name}: {_shown(pairs)}"
        so_far, steps = pairs[0][1], []
        for letter, digit in pairs:
            so_far = self._better(so_far, digit)
            steps.append(f" {letter}{digit}={so_far}")
        return Item(self.name, prompt, str(so_far), ("".join(steps),), canonical_key(prompt), {"n": n})

    def _better(self, so_far: int, digit: int) -> int:
        if self.name == "last":
            return digit
        return max(so_far, digit) if self.name == "max" else min(so_far, digit)


@dataclass(frozen=True)
class Pick(_OneAnswer):
    """``pick B: E1 B5 I6`` -> ``5``: one look-up; trace `` B5``.

    The smallest models learn it with the trace and hardly without, so it is practice, not a family to be judged by.
    """

    low: int = 3
    high: int = 8
    name: str = "pick"
    version: int = 1
    step_by_step: bool = False
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw ``low``..``high`` lettered digits and ask for one of them."""
        n = draw_size(rng, self.low, self.high, level)
        pairs = [f"{letter}{rng.randrange(10)}" for letter in rng.sample(LETTERS, n)]
        index = rng.randrange(n)
        wanted = pairs[index]
        prompt = f"pick {wanted[0]}: {' '.join(pairs)}"
        traces = _different(f" {wanted}", " " + " ".join(pairs[: index + 1]))
        return Item(self.name, prompt, wanted[1], traces, canonical_key(prompt), {"n": n})


@dataclass(frozen=True)
class Hop(_OneAnswer):
    """``hop H: A> F, H> D, J=4, D> J`` -> ``4``; trace `` H> D, D> J, J=4``.

    A pointer chase that ends at a digit, so no step has to be counted. An extra: its learnability at the smallest
    sizes is not established, so it is not among the default families.
    """

    low: int = 2
    high: int = 6
    name: str = "hop"
    version: int = 1
    step_by_step: bool = True
    licence: str = LICENCE

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw a chain of ``low``..``high`` entries plus up to two distractors."""
        n = draw_size(rng, self.low, self.high, level)
        letters = rng.sample(LETTERS, len(LETTERS))
        path, spare = letters[:n], letters[n:]
        digit = rng.randrange(10)
        chain = [f"{path[i]}> {path[i + 1]}" for i in range(n - 1)] + [f"{path[-1]}={digit}"]
        distractors = [f"{spare[2 * i]}> {spare[2 * i + 1]}" for i in range(min(2, len(spare) // 2))]
        shuffled = rng.sample(chain + distractors, n + len(distractors))
        prompt = f"hop {path[0]}: {', '.join(shuffled)}"
        trace = " " + ", ".join(chain)
        return Item(self.name, prompt, str(digit), (trace,), canonical_key(prompt), {"n": n})


# Sizes by reach: where signs are mixed also larger than where they are not, then larger than any that is trained on.
REACHES: dict[Reach, dict[str, tuple[int, int]]] = {
    "pure": {"run": (3, 6), "least": (4, 6)},
    "mixed": {"run": (4, 8), "least": (6, 8)},
    "beyond": {"run": (9, 10), "least": (9, 10)},
}


def signed_families(reach: Reach) -> list[Task]:
    """The families that come in every reach, at one of them."""
    sizes = REACHES[reach]
    return [Run(reach, *sizes["run"]), Least(reach, *sizes["least"])]


def first_is_best(n: int) -> float:
    """How often the first of ``n`` entries is the answer of ``top``: the best guess, as the first of equals counts."""
    return sum(((value + 1) / 10) ** (n - 1) for value in range(10)) / 10


def anytime_families() -> list[Task]:
    """Families in which part of the steps is worth something, wherever they are stopped."""
    return [Top()]


def easy_families() -> list[Task]:
    """Families that can be answered without steps."""
    return [Direct("max"), Direct("min"), Direct("last")]


def default_families() -> list[Task]:
    """The families of the small recipes as training text shows them: five that need steps, three that do not."""
    return [SumMod(), Swap(), *signed_families("pure"), *anytime_families(), *easy_families()]


def extra_families() -> list[Task]:
    """Families that are offered but not used by default."""
    return [Let(), Pick(), Hop()]


def corrupt(trace: str, rng: random.Random) -> str:
    """Return a wrong trace or answer: one digit or one letter of an item replaced by another of its sort.

    For testing response filters. Every solver trace of this module becomes wrong by any such change.

    Raises:
        InputError: the trace holds no digit and no letter of A-J or k-t.
    """
    sorts = ("0123456789", LETTERS, MINUS_LETTERS)
    places = [(i, sort) for i, char in enumerate(trace) for sort in sorts if char in sort]
    if not places:
        raise InputError("cannot corrupt a trace without digits or letters A-J and k-t; pass a solver trace")
    place, sort = rng.choice(places)
    return trace[:place] + rng.choice(sort.replace(trace[place], "")) + trace[place + 1 :]
