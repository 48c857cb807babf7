"""Every step of every trace is re-computed by checkers that share no code with the generators."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.base import Item, Task, sample_items
from twofold.tasks.families import (
    REACHES,
    Direct,
    Hop,
    Least,
    Let,
    Pick,
    Reach,
    Run,
    SumMod,
    Swap,
    Top,
    anytime_families,
    corrupt,
    default_families,
    easy_families,
    extra_families,
    signed_families,
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


def check_run(prompt: str, trace: str) -> str | None:
    data, total, shown = re.findall(r"([A-Jk-t])(\d)", prompt.removeprefix("run mod 10: ")), 0, []
    for letter, digit in data:
        after = (total + int(digit)) % 10 if letter.isupper() else (total + 10 - int(digit)) % 10
        shown.append(f" {letter}{total}{'+' if letter.isupper() else '-'}{digit}={after}")
        total = after
    return str(total) if trace == "".join(shown) else None


def check_top(prompt: str, trace: str) -> str | None:
    entries = re.findall(r"([A-J])(\d)(\d)", prompt.removeprefix("top: "))
    step = r" ([A-J])(\d)\+(\d)=(\d);(\d) ([A-J])"
    if not re.fullmatch(f"({step})+", trace):
        return None
    steps = re.findall(step, trace)
    if [(letter, a, b) for letter, a, b, *_ in steps] != entries:
        return None
    values = [(int(a) + int(b)) % 10 for _, a, b in entries]
    leader = ""
    for number, (*_, value, best, leader) in enumerate(steps, start=1):
        seen = values[:number]
        if int(value) != seen[-1] or int(best) != max(seen) or leader != entries[seen.index(max(seen))][0]:
            return None
    return leader


def check_least(prompt: str, trace: str) -> str | None:
    entries = re.findall(r"([A-Jk-t])(\d)(\d)", prompt.removeprefix("least: "))
    steps, values = trace[1:].split(" "), list[int]()
    if trace[:1] != " " or len(steps) != 2 * len(entries):
        return None
    for number, (letter, a, b) in enumerate(entries):
        sign = "+" if letter.isupper() else "-"
        values.append({"+": int(a) + int(b), "-": int(a) + 10 - int(b)}[sign] % 10)
        leader = entries[values.index(min(values))][0]
        if steps[2 * number :][:2] != [f"{letter}{a}{sign}{b}={values[-1]}", f"{leader}{min(values)}"]:
            return None
    return f"{leader}{min(values)}"


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
    "run": check_run,
    "top": check_top,
    "least": check_least,
    "max": check_row,
    "min": check_row,
    "last": check_row,
    "pick": check_pick,
    "hop": check_hop,
}
TASKS: list[Task] = default_families() + extra_families()
UNSHOWN: list[Task] = signed_families("mixed") + signed_families("beyond")
SIGNED: list[Task] = signed_families("pure") + UNSHOWN


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_all_traces_are_correct_and_every_corruption_is_not(seed: int, level: float) -> None:
    for task in TASKS + UNSHOWN:
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
    name = head.split()[0]
    entries = body.split()
    if name == "run":
        taken = sum(int(digit) for letter, digit in entries if letter in "klmnopqrst")
        return str((sum(int(digit) for _, digit in entries) - 2 * taken) % 10)
    if name in ("top", "least"):
        values = {
            letter: int(str(100 + int(a) + (int(b) if letter < "a" else -int(b)))[-1]) for letter, a, b in entries
        }
    if name == "top":
        return next(letter for letter in values if all(values[letter] >= other for other in values.values()))
    if name == "least":
        return min(f"{value}{place}{letter}" for place, (letter, value) in enumerate(values.items()))[::-2]
    digits = sorted(entry[1] for entry in entries) if name != "last" else [entry[1] for entry in entries]
    return digits[0] if name == "min" else digits[-1]


@pytest.mark.parametrize("task", [*SIGNED, Top(), *easy_families()], ids=repr)
def test_answers_agree_with_brute_force(task: Task) -> None:
    rng = random.Random(9)
    for _ in range(500):
        item = task.generate(rng, 1.0)
        assert solve(item.prompt) == item.answer, item.prompt
        assert item.meta["n"] == len(item.prompt.split(": ")[1].split())
        for a, sign, b, value in re.findall(r"(\d)([+-])(\d)=(\d)", item.traces[0]):
            assert (int(value) - int(a) - int(sign + b)) % 10 == 0
        assert item.traces[0].endswith(item.answer)


def test_a_thought_that_is_stopped_knows_the_best_so_far() -> None:
    rng = random.Random(10)
    for _ in range(400):
        item = Top().generate(rng, 1.0)
        head, body = item.prompt.split(": ")
        steps = re.findall(r" \S+ [A-J]", item.traces[0])
        assert len(steps) == item.meta["n"] and "".join(steps) == item.traces[0]
        for number, step in enumerate(steps, start=1):
            assert step[-1] == solve(f"{head}: {' '.join(body.split()[:number])}")


def test_where_a_thought_of_top_ends_says_nothing_of_the_answer() -> None:
    """The length of its steps depends on how many entries there are, and on nothing else."""
    rng, lengths, leaders = random.Random(19), dict[int, tuple[int, int, str]](), Counter[int]()
    for _ in range(1500):
        item = Top().generate(rng, 1.0)
        (trace,) = item.traces
        shape = (len(trace), len(trace.split()), re.sub(r"[A-J]", "A", re.sub(r"\d", "0", trace)))
        assert lengths.setdefault(item.meta["n"], shape) == shape, item
        leaders[[entry[0] for entry in item.prompt.split()[1:]].index(item.answer)] += 1
    assert set(lengths) == {4, 5, 6} and len({length for length, *_ in lengths.values()}) == 3
    assert set(leaders) == set(range(6))


@pytest.mark.parametrize("reach", REACHES)
def test_every_step_of_run_is_the_answer_so_far(reach: Reach) -> None:
    rng, (run, _) = random.Random(10), signed_families(reach)
    for _ in range(200):
        item = run.generate(rng, 1.0)
        head, body = item.prompt.split(": ")
        for number, step in enumerate(item.traces[0].split(), start=1):
            assert step[-1] == solve(f"{head}: {' '.join(body.split()[:number])}")


@pytest.mark.parametrize("task", [Top(), Least()], ids=repr)
def test_every_place_is_the_answer_as_often(task: Task) -> None:
    rng, places = random.Random(11), [0] * 4
    for _ in range(2000):
        item = task.generate(rng, 0.0)
        places[[entry[0] for entry in item.prompt.split(": ")[1].split()].index(item.answer[0])] += 1
    # the first of equals is the best, so early places gain a little
    assert all(abs(count - 500) < 0.35 * 500 for count in places), places


def content(prompt: str) -> tuple[str, ...]:
    """What a `run` or `least` item asks: its head, and sign and digits of each entry; letters are not part of it."""
    head, body = prompt.split(": ")
    return (head, *("+-"[entry[0].islower()] + entry[1:] for entry in body.split()))


def test_mixed_items_are_larger_than_pure_ones_and_beyond_is_larger_still() -> None:
    assert list(REACHES) == ["pure", "mixed", "beyond"]
    for name, (low, high) in REACHES["beyond"].items():
        assert max(REACHES["pure"][name]) < max(REACHES["mixed"][name]) < low <= high <= 10  # ten letters a sign
    rng = random.Random(12)
    for reach, sizes_of in REACHES.items():
        for task in signed_families(reach):
            low, high = sizes_of[task.name]
            assert {task.generate(rng, 1.0).meta["n"] for _ in range(300)} == set(range(low, high + 1))


@pytest.mark.parametrize("reach", REACHES)
def test_pure_items_have_one_sign_and_others_always_both(reach: Reach) -> None:
    rng = random.Random(14)
    for task in signed_families(reach):
        seen: Counter[str] = Counter()
        for number in range(1500):
            item = task.generate(rng, (number % 3) / 2)
            signs = "".join(sorted({part[0] for part in content(item.prompt)[1:]}))
            stepped = "".join(sorted(set(re.findall(r"[+-]", item.traces[0]))))
            assert stepped == signs
            seen[signs] += 1
        if reach == "pure":
            assert set(seen) == {"+", "-"} and abs(seen["+"] - 750) < 100, seen
        else:
            assert set(seen) == {"+-"}, seen


@pytest.mark.parametrize("reach", ["mixed", "beyond"])
def test_either_sign_may_stand_anywhere_in_any_number(reach: Reach) -> None:
    rng = random.Random(15)
    for task in signed_families(reach):
        items = [task.generate(rng, 1.0) for _ in range(2000)]
        shapes = Counter("".join(part[0] for part in content(item.prompt)[1:]) for item in items)
        for n in {item.meta["n"] for item in items}:
            of_size = Counter({shape: count for shape, count in shapes.items() if len(shape) == n})
            total = of_size.total()
            plus = Counter(shape.count("+") for shape in of_size.elements())
            assert set(plus) == set(range(1, n))
            for place in range(n):
                at_place = sum(count for shape, count in of_size.items() if shape[place] == "+")
                assert 0.38 < at_place / total < 0.62, (n, place, at_place, total)


def test_keys_are_the_content_and_nothing_else() -> None:
    """Signs and digits in order: other letters make no other item, another sign or digit does."""
    rng = random.Random(16)
    of_key: dict[str, set[tuple[str, ...]]] = {}
    of_content: dict[tuple[str, ...], set[str]] = {}
    items = [task.generate(rng, 0.0) for task in [*SIGNED, *signed_families("pure")] for _ in range(2500)]
    for item in items:
        of_key.setdefault(item.key, set()).add(content(item.prompt))
        of_content.setdefault(content(item.prompt), set()).add(item.key)
    assert all(len(found) == 1 for found in [*of_key.values(), *of_content.values()])
    assert len(of_key) < len({item.prompt for item in items})  # some content met again under other letters


@pytest.mark.parametrize("task", SIGNED, ids=repr)
def test_held_out_items_are_of_other_content_than_training_items(task: Task) -> None:
    for seed in range(3):
        test = [content(item.prompt) for item in sample_items([task], 80, seed, "test")]
        assert len(set(test)) == 80
        for other in SIGNED:
            train = {content(item.prompt) for item in sample_items([other], 600, seed, "train")}
            assert not train & set(test)


def test_which_families_there_are() -> None:
    assert [task.name for task in default_families()] == [
        "sum", "swap", "run", "least", "top", "max", "min", "last",
    ]  # fmt: skip
    assert [task.step_by_step for task in default_families()] == [True] * 5 + [False] * 3
    assert [task.name for task in anytime_families()] == ["top"]
    assert default_families()[2:4] == signed_families("pure") == [Run(), Least()]  # others use these defaults
    assert anytime_families() == default_families()[4:5] == [Top()]
    assert [task.name for reach in REACHES for task in signed_families(reach)] == ["run", "least"] * 3
    with pytest.raises(KeyError):
        signed_families("endless")  # type: ignore[arg-type]


PATTERNS = {
    "sum": r"sum mod 10: [A-J]\d( [A-J]\d){2,9}",
    "let": r"let mod 10: ([A-J]=( [A-J]\d|\d)(, )?){2,10} find [A-J]",
    "swap": r"swap [A-J] [A-J] [A-J]: a(12|13|23)( [b-h](12|13|23)){2,7}",
    "run": r"run mod 10: [A-Jk-t]\d( [A-Jk-t]\d){2,9}",
    "top": r"top: [A-J]\d\d( [A-J]\d\d){3,5}",
    "least": r"least: [A-Jk-t]\d\d( [A-Jk-t]\d\d){3,9}",
    "max": r"max: [A-J]\d( [A-J]\d){2,7}",
    "min": r"min: [A-J]\d( [A-J]\d){2,7}",
    "last": r"last: [A-J]\d( [A-J]\d){2,7}",
    "pick": r"pick [A-J]: [A-J]\d( [A-J]\d){2,7}",
    "hop": r"hop [A-J]: ([A-J](> [A-J]|=\d)(, )?){2,8}",
}


@pytest.mark.parametrize("task", TASKS + UNSHOWN, ids=repr)
def test_exact_surface_forms(task: Task) -> None:
    rng = random.Random(5)
    for _ in range(100):
        prompt = task.generate(rng, 1.0).prompt
        assert re.fullmatch(PATTERNS[task.name], prompt), prompt


def test_letters_are_unique_keys() -> None:
    rng = random.Random(6)
    for _ in range(200):
        for task in (SumMod(), *SIGNED, Pick(), Top(), Direct("min")):
            keys = re.findall(r"([A-Jk-t])\d+", task.generate(rng, 1.0).prompt)
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
    least = Item("least", "least: E15 k52 I60", "k3", (), "k")
    assert Least().verify(least, " k3\n") == 1.0
    assert not any(Least().verify(least, other) for other in ("k", "K3", "3", "k 3", "k4", "E3", "3k"))
    cups = Item("swap", "swap I G E: a12 b23", "G E I", (), "k")
    assert Swap().verify(cups, " G E I\n") == 1.0
    for bad in ("GEI", "g e i", "G E", "G E I I", "G, E, I", "G  E I"):
        assert Swap().verify(cups, bad) == 0.0


def test_direct_answers_of_hard_families_are_near_uniform() -> None:
    rng = random.Random(0)
    for task in (SumMod(), Run(), Run("mixed"), Let()):
        counts = [0] * 10
        for _ in range(2000):
            counts[int(task.generate(rng, 1.0).answer)] += 1
        assert max(counts) < 300 and min(counts) > 120


@pytest.mark.parametrize("task", [*SIGNED, Top()], ids=repr)
def test_corrupting_any_place_is_noticed(task: Task) -> None:
    """Every digit and letter of these traces is said by the prompt or by the steps before."""
    rng = random.Random(13)
    for _ in range(20):
        item = task.generate(rng, 1.0)
        for _ in range(40):
            assert CHECKERS[task.name](item.prompt, corrupt(item.traces[0], rng)) is None


@pytest.mark.parametrize("task", default_families(), ids=repr)
def test_answers_can_be_corrupted_too(task: Task) -> None:
    """The cold start spoils answers with it; that of `least` may be a small letter."""
    rng = random.Random(17)
    for _ in range(100):
        item = task.generate(rng, 1.0)
        assert task.verify(item, corrupt(item.answer, rng)) == 0.0


def test_corrupt_needs_something_to_change() -> None:
    with pytest.raises(InputError, match="cannot corrupt"):
        corrupt(" ?!", random.Random(0))
