"""Every step of every trace is re-computed by checkers that share no code with the generators."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task
from twofold.tasks.families import (
    REACHES,
    Direct,
    Find,
    Hop,
    Let,
    Pick,
    SubtractMod,
    SumMod,
    Swap,
    Top,
    anytime_families,
    corrupt,
    default_families,
    easy_families,
    extra_families,
    growing_families,
)


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


def check_sub(prompt: str, trace: str) -> str | None:
    data, total, shown = re.findall(r"([A-J])(\d)", prompt.removeprefix("sub mod 10: ")), 0, []
    for letter, digit in data:
        after = (total + 10 - int(digit)) % 10
        shown.append(f" {letter}{total}-{digit}={after}")
        total = after
    return str(total) if trace == "".join(shown) else None


def check_roll(prompt: str, trace: str) -> str | None:
    head, turns = prompt.removeprefix("roll ").split(": ")
    cups, shown = head.split(), []
    for turn in turns.split():
        a, b, c = cups
        cups = {"L": [b, c, a], "R": [c, a, b], "X": [c, b, a], "P": [b, a, c], "Q": [a, c, b]}[turn[1]]
        shown += [turn, *cups]
    return " ".join(cups) if trace == " " + " ".join(shown) else None


def check_top(prompt: str, trace: str) -> str | None:
    entries = re.findall(r"([A-J])(\d)(\d)", prompt.removeprefix("top: "))
    step = r" ([A-J])(\d)\+(\d)=(\d);(\d) ([A-J])"
    if not re.fullmatch(f"({step})+", trace):
        return None
    steps = re.findall(step, trace)
    if [part[:3] for part in steps] != entries:
        return None
    sums = [(int(a) + int(b)) % 10 for _, a, b in entries]
    leader = ""
    for number, (*_, value, best, leader) in enumerate(steps, start=1):
        seen = sums[:number]
        if int(value) != seen[-1] or int(best) != max(seen) or leader != entries[seen.index(max(seen))][0]:
            return None
    return leader


def check_find(prompt: str, trace: str) -> str | None:
    wanted, body = re.fullmatch(r"find (\d): (.*)", prompt).groups()  # type: ignore[union-attr]
    entries = re.findall(r"([A-J])(\d)(\d)", body)
    sums = [str((int(a) + int(b)) % 10) for _, a, b in entries]
    if sums.count(wanted) != 1:
        return None
    place = sums.index(wanted)
    shown = [f"{c}{a}+{b}={value}" for (c, a, b), value in zip(entries, sums, strict=True)][: place + 1]
    return entries[place][0] if trace == " " + " ".join([*shown, entries[place][0]]) else None


def check_row(prompt: str, trace: str) -> str | None:
    name, body = prompt.split(": ")
    pairs = body.split()
    digits = [int(pair[1]) for pair in pairs]
    so_far = [
        {"max": max(digits[:i]), "min": min(digits[:i]), "last": digits[i - 1]}[name] for i in range(1, 1 + len(pairs))
    ]
    steps = [f" {pair}={value}" for pair, value in zip(pairs, so_far, strict=True)]
    return str(so_far[-1]) if trace == "".join(steps) else None


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
    "sub": check_sub,
    "roll": check_roll,
    "top": check_top,
    "find": check_find,
    "max": check_row,
    "min": check_row,
    "last": check_row,
    "pick": check_pick,
    "hop": check_hop,
}
TASKS: list[Task] = default_families() + extra_families()
LONGER: list[Task] = growing_families("long") + growing_families("beyond")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_all_traces_are_correct_and_every_corruption_is_not(seed: int, level: float) -> None:
    for task in TASKS + LONGER:
        item = task.generate(random.Random(seed), level)
        check = CHECKERS[task.name]
        assert item.family == task.name
        assert item.traces and len(set(item.traces)) == len(item.traces)
        for trace in item.traces:
            assert check(item.prompt, trace) == item.answer
            wrong = corrupt(trace, random.Random(seed + 1))
            assert wrong != trace and len(wrong) == len(trace)
            assert check(item.prompt, wrong) is None, (item.prompt, wrong)


def solve(prompt: str) -> str:
    """Answers of the families without letters that refer to others, from the prompt alone."""
    head, body = prompt.split(": ")
    name, *argument = head.split()
    entries = body.split()
    if name in ("top", "find"):
        sums = {entry[0]: sum(map(int, entry[1:])) % 10 for entry in entries}
        if name == "top":
            return next(letter for letter in sums if all(sums[letter] >= other for other in sums.values()))
        (found,) = [letter for letter, value in sums.items() if str(value) == argument[0]]
        return found
    digits = sorted(entry[1] for entry in entries) if name != "last" else [entry[1] for entry in entries]
    return digits[0] if name == "min" else digits[-1]


@pytest.mark.parametrize("task", [Top(), Find(), *easy_families()], ids=lambda task: task.name)
def test_answers_agree_with_brute_force(task: Task) -> None:
    rng = random.Random(9)
    for _ in range(500):
        item = task.generate(rng, 1.0)
        assert solve(item.prompt) == item.answer, item.prompt
        assert item.meta["n"] == len(item.prompt.split(": ")[1].split())
        for a, b, value in re.findall(r"(\d)\+(\d)=(\d)", item.traces[0]):
            assert (int(a) + int(b)) % 10 == int(value)
        assert item.traces[0].endswith(item.answer)


def test_a_thought_that_is_stopped_knows_the_best_so_far() -> None:
    rng = random.Random(10)
    for _ in range(200):
        item = Top().generate(rng, 1.0)
        head, body = item.prompt.split(": ")
        steps = re.findall(r" \S+ [A-J]", item.traces[0])
        for number, step in enumerate(steps, start=1):
            assert step[-1] == solve(f"{head}: {' '.join(body.split()[:number])}")
        found = Find().generate(rng, 1.0)
        assert found.traces[0].count("=") == 1 + [e[0] for e in found.prompt.split()[2:]].index(found.answer)


@pytest.mark.parametrize("task", [Top(), Find()], ids=lambda task: task.name)
def test_every_place_is_the_answer_as_often(task: Task) -> None:
    rng, places = random.Random(11), [0] * 4
    for _ in range(2000):
        item = task.generate(rng, 0.0)
        places[[entry[0] for entry in item.prompt.split(": ")[1].split()].index(item.answer)] += 1
    spread = 0.12 if task.name == "find" else 0.35  # the first of equals is the best, so early places gain a little
    assert all(abs(count - 500) < spread * 500 for count in places), places


def test_reaches_do_not_overlap_and_need_at_most_ten_letters() -> None:
    assert list(REACHES) == ["short", "long", "beyond"]
    for name in REACHES["short"]:
        spans = [REACHES[reach][name] for reach in REACHES]
        sizes = [size for low, high in spans for size in range(low, high + 1)]
        assert sizes == sorted(set(sizes)) and all(low <= high for low, high in spans)
        assert max(sizes) <= 10
    rng = random.Random(12)
    for reach, sizes_of in REACHES.items():
        for task in growing_families(reach):
            low, high = sizes_of[task.name]
            seen = set()
            for _ in range(300):
                item = task.generate(rng, 1.0)
                seen.add(item.meta["n"])
                assert len(set(re.findall(r"[A-J]", item.prompt))) <= 10
            assert seen == set(range(low, high + 1))


def test_which_families_there_are() -> None:
    assert [task.name for task in default_families()] == [
        "sum", "swap", "sub", "roll", "top", "find", "max", "min", "last",
    ]  # fmt: skip
    assert [task.step_by_step for task in default_families()] == [True] * 6 + [False] * 3
    assert [task.name for task in anytime_families()] == ["top", "find"]
    assert default_families()[2:4] == growing_families("short")
    with pytest.raises(KeyError):
        growing_families("endless")  # type: ignore[arg-type]


PATTERNS = {
    "sum": r"sum mod 10: [A-J]\d( [A-J]\d){2,9}",
    "let": r"let mod 10: ([A-J]=( [A-J]\d|\d)(, )?){2,10} find [A-J]",
    "swap": r"swap [A-J] [A-J] [A-J]: a(12|13|23)( [b-j](12|13|23)){1,9}",
    "sub": r"sub mod 10: [A-J]\d( [A-J]\d){2,9}",
    "roll": r"roll [A-J] [A-J] [A-J]: a[LRXPQ]( [b-i][LRXPQ]){2,8}",
    "top": r"top: [A-J]\d\d( [A-J]\d\d){3,5}",
    "find": r"find \d: [A-J]\d\d( [A-J]\d\d){3,5}",
    "max": r"max: [A-J]\d( [A-J]\d){2,7}",
    "min": r"min: [A-J]\d( [A-J]\d){2,7}",
    "last": r"last: [A-J]\d( [A-J]\d){2,7}",
    "pick": r"pick [A-J]: [A-J]\d( [A-J]\d){2,7}",
    "hop": r"hop [A-J]: ([A-J](> [A-J]|=\d)(, )?){2,8}",
}


@pytest.mark.parametrize("task", TASKS + LONGER, ids=repr)
def test_exact_surface_forms(task: Task) -> None:
    rng = random.Random(5)
    for _ in range(100):
        prompt = task.generate(rng, 1.0).prompt
        assert re.fullmatch(PATTERNS[task.name], prompt), prompt


def test_letters_are_unique_keys() -> None:
    rng = random.Random(6)
    for _ in range(200):
        for task in (SumMod(), SubtractMod(), Pick(), Top(), Find(), Direct("min")):
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


@pytest.mark.parametrize("task", [Top(), Find()], ids=lambda task: task.name)
def test_corrupting_any_place_is_noticed(task: Task) -> None:
    """Every digit and letter of these traces is said by the prompt or by the steps before."""
    rng = random.Random(13)
    for _ in range(20):
        item = task.generate(rng, 1.0)
        for _ in range(40):
            assert CHECKERS[task.name](item.prompt, corrupt(item.traces[0], rng)) is None


def test_corrupt_needs_something_to_change() -> None:
    with pytest.raises(InputError, match="cannot corrupt"):
        corrupt(" nothing", random.Random(0))
