"""The protocols as a document for people: ``python -m twofold.recipes.claims.protocol`` writes docs/claims.md.

A test keeps the document equal to the data. Not here: the data (``declared``) and the record's fields (``record``).
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from twofold.base.files import write_text
from twofold.base.records import InputError
from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.claims.fairness import TOLERANCE
from twofold.recipes.claims.record import DIFFERENCES, Protocol
from twofold.report.model import Condition
from twofold.report.text import cell_markdown, wanted

TUNING_SEEDS = (10, 11, 12)
CONFIRMING_SEEDS = (100, 200, 300, 400, 500)  # far apart: a stage draws with its run's seed plus a small number
DOCUMENT = Path("docs/claims.md")
_WIDTH = 120


def page() -> str:
    """The whole document."""
    return "\n\n".join([*_opening(), *(section(protocol) for protocol in PROTOCOLS.values())]) + "\n"


def _opening() -> list[str]:
    tuning, confirming = (", ".join(map(str, seeds)) for seeds in (TUNING_SEEDS, CONFIRMING_SEEDS))
    rules = [
        f"Settings are chosen on the tuning seeds {tuning}. An attack on the tuning run before freezing belongs to the "
        "protocol: an opponent looks there for what else could explain a claim, and what is found is mended in the "
        "recipe or in this document. Then settings, code and protocols are frozen. The confirming runs, on the seeds "
        f"{confirming}, which no setting was chosen with, are made from one commit after that attack, and each claim "
        "is judged once.",
        "Items, probes and held-out documents are drawn anew for every training seed. They come from the test split: "
        "no stage trains on them. Sizes are drawn first, so that no family consists of a few items. Some families "
        "(calc, swap, orders) have so few held-out items all the same that training seeds share some.",
        "The unit within a run is the item. Several samples of an item are averaged first, and two arms are compared "
        "item by item. The unit over runs is the training seed: each gives one estimate, and Student's t over these "
        "estimates holds the luck of training and of items that differ. As seeds may share items, the error over items "
        "is taken in once more: the half width over seeds is the root of the squared half width by Student's t plus "
        "the mean of the runs' squared half widths over items, where runs have them. That is right when all items are "
        "shared and too wide when none is. All intervals are two-sided, 95 %.",
        "“Lower end above” and “lower end at least” are judged on the lower end of the interval, “upper end at most” "
        "on its upper end. “Estimate at least” asks for a level: it is judged on the estimate, and the worst seed is "
        "shown. A yes must be a yes on every seed. A figure that has no interval within a run is judged there by its "
        "estimate.",
        "A claim holds when all its conditions are met. It is not judged when an arm or a figure is missing on any "
        "seed. A single run has a verdict of its own, “holds in this run”, over its items alone. That is not the "
        "verdict of the claim.",
        "Compared arms must be equal in what they say that they saw: *prompt forms* (of pre-training arms the sources "
        "of text), *tokens* (trained and generated together), floating-point *operations*, *labels* (what told right "
        "from wrong) and *tuning* (how many settings were tried). Amounts count as equal when they differ by at most "
        f"{100 * TOLERANCE:.0f} %. A difference that is not declared below refuses the claim: it is not judged, and "
        "the report says why. So does an arm that does not say what it saw. The report prints for each claim what "
        "every arm saw, and its reward in training beside its score on held-out items.",
    ]
    return [
        "# What is claimed, and how it is judged",
        "<!-- Made by `python -m twofold.recipes.claims.protocol` from src/twofold/recipes/claims/declared.py. -->",
        _wrapped(
            f"The tiny recipe makes {len(PROTOCOLS)} claims. This document states each of them before the runs that "
            "count: the question, the arms, the control that an opponent would ask for, the items, the conditions with "
            "their targets, and what would refute it. A claim that does not hold stays in the table as not holding."
        ),
        "## Rules for all claims",
        "\n".join(textwrap.fill(rule, _WIDTH, initial_indent="- ", subsequent_indent="  ") for rule in rules),
    ]


def section(protocol: Protocol) -> str:
    """One claim: question, arms, control, items, conditions, what is shown, allowed differences, refutation."""
    conditions = [["Condition", "Text", "Wanted"]]
    for rule in protocol.rules:
        fields = {"name": rule.name, "text": rule.text, "unit": rule.unit, "target": rule.target, "sense": rule.sense}
        conditions.append([f"`{rule.name}`", rule.text, wanted(Condition.model_validate(fields))])
    return "\n\n".join(
        [
            f"## {protocol.title}",
            _wrapped(f"`{protocol.key}`. **{protocol.question}**"),
            _grid([["Arm", "What it is"], *([f"`{arm.stage}`", arm.what] for arm in protocol.arms)]),
            _wrapped(f"**Control.** {protocol.control}"),
            _wrapped(f"**Items.** {protocol.items[0].upper()}{protocol.items[1:]} New ones for every training seed."),
            "**Unit of resampling.** The item within a run, the training seed over runs.",
            _grid(conditions),
            *_shown(protocol),
            *_compared(protocol),
            _wrapped(f"**Refuted by.** {protocol.refuted}"),
        ]
    )


def _shown(protocol: Protocol) -> list[str]:
    said = "; ".join(f"{extra.text}{f' ({extra.unit})' if extra.unit else ''}" for extra in protocol.shown)
    return [_wrapped(f"**Shown, not judged.** {said}.")] if said else []


def _compared(protocol: Protocol) -> list[str]:
    """Which arms must be equal, and a table of what they may differ in, differences of one reason together."""
    if not protocol.comparisons:
        return []
    pairs = "; ".join(f"`{a}` and `{b}`" for a, b in protocol.comparisons)
    rows = []
    for (a, b), differences in protocol.allowed_differences.items():
        for reason in dict.fromkeys(differences.values()):
            kinds = [DIFFERENCES[kind] for kind, why in differences.items() if why == reason]
            rows.append([f"`{a}`, `{b}`", ", ".join(kinds), reason])
    table = [_grid([["Arms", "May differ in", "Why"], *rows])] if rows else []
    return [_wrapped(f"**Compared arms.** {pairs}."), *table]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _grid(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *([cell_markdown(cell) for cell in row] for row in rows[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the document; run at the top of the source tree."""
    if not DOCUMENT.parent.is_dir():
        raise InputError(f"no folder {DOCUMENT.parent} here; run this at the top of the source tree")
    write_text(DOCUMENT, page())
    print(f"{DOCUMENT}: {len(PROTOCOLS)} claims")


if __name__ == "__main__":
    main()
