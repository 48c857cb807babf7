from __future__ import annotations

import math
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.report.model import Claim, Condition, StageCost
from twofold.report.text import (
    amount,
    cell_markdown,
    claim_target,
    condition_line,
    fence,
    inline_html,
    interval,
    memory,
    number,
    prose_html,
    short,
    slug,
    tokens_per_second,
    verdict_line,
    wanted,
)


def test_numbers() -> None:
    assert [number(value) for value in (70.23, 0.9641, 5, 1234567.8, 0, 0.00012, None, math.nan, -math.inf)] == [
        "70.2",
        "0.964",
        "5",
        "1,234,568",
        "0",
        "1.20e\u221204",
        "–",
        "n/a",
        "\u2212∞",
    ]
    assert number(-2.4, "points") == "\u22122.40\u00a0points"
    assert short(30.0) == "30" and short(-0.5, "%") == "\u22120.5\u00a0%"
    assert amount(1_720_000) == "1.72\u00a0M" and amount(370) == "370" and amount(None) == "–"
    assert memory(2**30) == "1.00\u00a0GiB" and memory(3 * 2**20) == "3\u00a0MiB"
    assert interval(1.0, 2.0) == "[1.00, 2.00]" and interval(None, 2.0) == ""
    assert tokens_per_second(StageCost(name="a", title="", seconds=2, tokens=10)) == 5
    assert tokens_per_second(StageCost(name="a", title="", seconds=0, tokens=10)) is None


def test_verdict_line_counts_judged_claims_only() -> None:
    def claim(holds: bool, judged: bool = True) -> Claim:
        return Claim(name="", statement="", holds=holds, judged=judged)

    assert verdict_line([claim(True), claim(False), claim(True)]) == "2 of 3 claims hold in this run"
    assert verdict_line([claim(True), claim(True, judged=False)]) == "1 of 1 claims holds in this run, 1 not judged"
    over_seeds = claim(True).model_copy(update={"seeds": [3, 4]})
    assert verdict_line([over_seeds]) == "1 of 1 claims holds"


def test_conditions_in_words() -> None:
    def condition(sense: str, value: float | None = 2.0, met: bool = True, unit: str = "points") -> Condition:
        fields = {"name": "n", "text": "t", "value": value, "target": 1.0, "sense": sense, "met": met, "unit": unit}
        return Condition.model_validate(fields)

    assert [wanted(condition(sense)).replace("\u00a0", " ") for sense in ("above", "at least", "at most", "level")] == [
        "lower end above 1 points",
        "lower end at least 1 points",
        "upper end at most 1 points",
        "estimate at least 1 points",
    ]
    assert condition_line(condition("exact", 1.0, unit="")) == "met: t: yes; wanted: yes"
    assert condition_line(condition("exact", 0.0, False, "")) == "**not met**: t: no; wanted: yes"
    assert condition_line(condition("exact", None, False, "")) == "not measured: t: –; wanted: yes"
    claim = Claim(name="", statement="", target=3, direction="at most", unit="%")
    assert claim_target(claim) == "≤\u00a03\u00a0%" and claim_target(Claim(name="", statement="")) == ""
    assert claim_target(claim.model_copy(update={"conditions": [condition("exact")]})) == "yes"


def test_slugs_are_unique() -> None:
    used: set[str] = set()
    assert [slug(text, used) for text in ("A b!", "a-b", "预训练", "")] == ["a-b", "a-b-2", "part", "part-2"]


def test_prose_draws_its_three_marks_and_nothing_else() -> None:
    drawn = prose_html("One **bold** `a<b **no**`\nsame.\n\n- x\n- <y>")
    assert drawn == ("<p>One <b>bold</b> <code>a&lt;b **no**</code> same.</p>\n<ul><li>x</li><li>&lt;y&gt;</li></ul>")


@given(st.text())
@settings(deadline=None, max_examples=60)
def test_no_text_becomes_markup(text: str) -> None:
    assert set(re.findall(r"<[^>]*>?", inline_html(text))) <= {"<code>", "</code>", "<b>", "</b>"}
    cell = cell_markdown(text)
    assert "\n" not in cell and not re.search(r"(?<!\\)\|", cell.replace("\\\\", ""))


@given(st.text(alphabet="`\na", max_size=30))
@settings(deadline=None, max_examples=60)
def test_a_fence_cannot_be_left(text: str) -> None:
    opening, *inside, closing = fence(text).split("\n")
    assert opening == f"{closing}text" and "\n".join(inside) == text
    assert not any(line.strip().startswith(closing) for line in inside)
