"""Every step of every trace is re-computed by checkers that share no code with the generators."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task
from twofold.tasks.families import Hop, Let, Pick, SumMod, Swap, corrupt, default_families, extra_families


def check_sum(prompt: str, trace: str) -> str | None:
    data = re.findall(r"([A-J])(\d)", prompt.removeprefix("sum mod 10: "))
    steps = [re.fullmatch(r"([A-J])(\d)\+(\d)=(\d)", part) for part in trace.split()]
    if not trace.startswith(" ") or None in steps or len(steps) != len(data):
        return None
    parts = [step.groups() for step in steps if step]
    if [(p[0], p[2]) for p in parts] not in (data, data[::-1]):
        return None
    total = "0"
    for _, left, right, result in parts:
        if left != total or (int(left) + int(right)) % 10 != int(result):
            return None
        total = result
    return total


def check_let(prompt: str, trace: str) -> str | None:
    body, wanted = prompt.removeprefix("let mod 10: ").split(" find ")
    listed, _, sums = trace.partition("; ")
    given_parts = body.split(", ")
    table = dict(part.split("=") for part in given_parts)
    chain, here = [], wanted  # what the answer rests on, back to the constant
    while not table[here].isdigit():
        chain.append(f"{here}={table[here]}")
        here = table[here][1]
    chain.append(f"{here}={table[here]}")
    if not listed.startswith(" ") or sorted(listed[1:].split(", ")) != sorted(chain):
        return None
    values = {name: text for name, text in table.items() if text.isdigit()}
    for part in sums.split(", "):
        match = re.fullmatch(r"([A-J])=(\d)\+(\d)=(\d)", part)
        if not match:
            return None
        name, left, right, result = match.groups()
        source = re.fullmatch(r" ([A-J])(\d)", table[name]) if name in table else None
        if not source or values.get(source[1]) != left or source[2] != right:
            return None
        if (int(left) + int(right)) % 10 != int(result):
            return None
        values[name] = result
    return values.get(wanted)


def check_swap(prompt: str, trace: str) -> str | None:
    head, moves = prompt.removeprefix("swap ").split(": ")
    cups, words = head.split(), trace.split()
    if words[:3] == cups:
        words = words[3:]
    if not trace.startswith(" ") or len(words) != 4 * len(moves.split()):
        return None
    for number, move in enumerate(moves.split()):
        i, j = int(move[1]) - 1, int(move[2]) - 1
        cups[i], cups[j] = cups[j], cups[i]
        if words[4 * number] != move or words[4 * number + 1 : 4 * number + 4] != cups:
            return None
    return " ".join(cups)


def check_max(prompt: str, trace: str) -> str | None:
    pairs = re.fullmatch(r"max: (.*)", prompt)[1].split()  # type: ignore[index]
    digits = [int(pair[1]) for pair in pairs]
    steps = [f" {pair}={max(digits[: i + 1])}" for i, pair in enumerate(pairs)]
    return str(max(digits)) if trace == "".join(steps) else None


def check_pick(prompt: str, trace: str) -> str | None:
    wanted, pairs = re.fullmatch(r"pick ([A-J]): (.*)", prompt).groups()  # type: ignore[union-attr]
    table, shown = pairs.split(), trace.split()
    at = [pair[0] for pair in table].index(wanted)
    if shown not in ([table[at]], table[: at + 1]):
        return None
    return table[at][1]


def check_hop(prompt: str, trace: str) -> str | None:
    start, body = re.fullmatch(r"hop ([A-J]): (.*)", prompt).groups()  # type: ignore[union-attr]
    entries = {part[0]: part for part in body.split(", ")}
    here = start
    for part in trace[1:].split(", "):
        if entries.get(here) != part:
            return None
        if "=" in part:
            return part[-1]
        here = part[-1]
    return None


CHECKERS = {
    "sum": check_sum,
    "let": check_let,
    "swap": check_swap,
    "max": check_max,
    "pick": check_pick,
    "hop": check_hop,
}
TASKS: list[Task] = default_families() + extra_families()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_all_traces_are_correct_and_every_corruption_is_not(seed: int, level: float) -> None:
    for task in TASKS:
        item = task.generate(random.Random(seed), level)
        check = CHECKERS[task.name]
        assert item.family == task.name
        assert item.traces and len(set(item.traces)) == len(item.traces)
        for trace in item.traces:
            assert check(item.prompt, trace) == item.answer
            wrong = corrupt(trace, random.Random(seed + 1))
            assert wrong != trace and len(wrong) == len(trace)
            assert check(item.prompt, wrong) is None, (item.prompt, wrong)


def test_exact_surface_forms() -> None:
    rng = random.Random(5)
    patterns = {
        "sum": r"sum mod 10: [A-J]\d( [A-J]\d){2,7}",
        "let": r"let mod 10: ([A-J]=( [A-J]\d|\d)(, )?){2,8} find [A-J]",
        "swap": r"swap [A-J] [A-J] [A-J]: a(12|13|23)( [b-f](12|13|23)){1,5}",
        "max": r"max: [A-J]\d( [A-J]\d){2,7}",
        "pick": r"pick [A-J]: [A-J]\d( [A-J]\d){2,7}",
        "hop": r"hop [A-J]: ([A-J](> [A-J]|=\d)(, )?){2,8}",
    }
    for task in TASKS:
        for _ in range(100):
            prompt = task.generate(rng, 1.0).prompt
            assert re.fullmatch(patterns[task.name], prompt), prompt


def test_letters_are_unique_keys() -> None:
    rng = random.Random(6)
    for _ in range(200):
        for task in (SumMod(), Pick()):
            keys = re.findall(r"([A-J])\d", task.generate(rng, 1.0).prompt)
            assert len(keys) == len(set(keys))
        defined = re.findall(r"([A-J])=", Let().generate(rng, 1.0).prompt)
        assert len(defined) == len(set(defined))
        sources = re.findall(r"([A-J])>", Hop().generate(rng, 1.0).prompt)
        assert len(sources) == len(set(sources))


def test_let_cannot_be_answered_by_adding_every_number() -> None:
    rng, shortcut = random.Random(7), 0
    for _ in range(1000):
        item = Let().generate(rng, 1.0)
        body, _ = item.prompt.removeprefix("let mod 10: ").split(" find ")
        shortcut += str(sum(map(int, re.findall(r"\d", body))) % 10) == item.answer
    assert shortcut < 450  # about a third: nothing leads on; chance among the rest


def test_let_refers_to_every_letter_at_most_once() -> None:
    rng = random.Random(8)
    for _ in range(200):
        referred = re.findall(r"= ([A-J])\d", Let().generate(rng, 1.0).prompt)
        assert len(referred) == len(set(referred))


def test_let_key_ignores_order_and_letters() -> None:
    items = [Let().generate(random.Random(i), 0.5) for i in range(400)]
    by_key: dict[str, set[str]] = {}
    for item in items:
        by_key.setdefault(item.key, set()).add(item.answer)
    assert all(len(answers) == 1 for answers in by_key.values())
    assert len(by_key) < len(items)  # some chains met again in other letters or order


def test_there_are_several_traces() -> None:
    rng = random.Random(3)
    for task in (SumMod(), Let(), Swap()):
        assert min(len(task.generate(rng, 1.0).traces) for _ in range(50)) >= 2


def test_verifier_accepts_only_the_answer() -> None:
    item = Item("sum", "sum mod 10: E1 B5 I6", "2", (), "k")
    for good in ("2", " 2", "2\n", "\n\n2 "):
        assert SumMod().verify(item, good) == 1.0
    for bad in (
        "",
        " ",
        "12",
        "2 2",
        "2.",
        "02",
        "+2",
        "2.0",
        "٢",
        "２",
        "3",
        "0 1 2 3 4 5 6 7 8 9",
        "=2",
        "2</think>",
    ):
        assert SumMod().verify(item, bad) == 0.0
    cups = Item("swap", "swap I G E: a12 b23", "G E I", (), "k")
    assert Swap().verify(cups, " G E I\n") == 1.0
    for bad in ("GEI", "g e i", "G E", "G E I I", "G, E, I", "G  E I"):
        assert Swap().verify(cups, bad) == 0.0


def test_direct_answers_of_hard_families_are_near_uniform() -> None:
    rng = random.Random(0)
    for task in (SumMod(), Let()):
        counts = [0] * 10
        for _ in range(2000):
            counts[int(task.generate(rng, 1.0).answer)] += 1
        assert max(counts) < 300 and min(counts) > 120


def test_corrupt_needs_something_to_change() -> None:
    with pytest.raises(InputError, match="cannot corrupt"):
        corrupt(" nothing", random.Random(0))
