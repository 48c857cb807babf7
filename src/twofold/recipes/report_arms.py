"""The report's section about fairness: what every arm of a claim saw in training, beside its score on held-out items.

One table a claim, with the differences that its protocol declares. Not here: whether arms were equal (``claims``), or
training curves (``report_training``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.claims.fairness import unequal, what_it_saw
from twofold.recipes.claims.record import DIFFERENCES, Arm, Protocol
from twofold.recipes.evidence import (
    HARD,
    SKILLS,
    Facts,
    lacks,
    level,
    lookup,
    mean_of,
    rows,
    shown,
    skill_levels,
    stored,
)
from twofold.report.model import Cell, Section, Table
from twofold.report.text import MISSING, amount

COLUMNS = [
    *("arm", "what it is", "prompt forms", "labels", "trained tokens", "generated tokens", "TFLOP", "settings tried"),
    *("training reward", "held-out score, %"),
]


def arms_section(facts: Facts) -> Section | None:
    """A table for each claim whose arms the run has."""
    tables = [table for table in (arms_table(facts, protocol) for protocol in PROTOCOLS.values()) if table is not None]
    if not tables:
        return None
    text = (
        "What every arm says that it saw: which forms its prompts had and how many of each, what told right from "
        "wrong, how much it was trained and sampled, how many settings were tried for it on the tuning seeds. A claim "
        "whose arms differ in a way that its protocol does not declare is refused. A training reward far above the "
        "held-out score would be a sign of learning by heart."
    )
    return Section(title="What each arm saw", text=text, tables=tables)


def arms_table(facts: Facts, protocol: Protocol) -> Table | None:
    """Arms of one claim, those that the run has."""
    cells = [_row(facts, arm, saw) for arm in protocol.arms if (saw := what_it_saw(facts, arm.stage))]
    if not cells:
        return None
    notes = [
        f"`{a}` and `{b}` may differ in {', '.join(DIFFERENCES[kind] for kind in differences)}."
        for (a, b), differences in protocol.allowed_differences.items()
    ]
    notes += [f"**Not declared:** {text}" for text in unequal(facts, protocol)]
    return Table(title=protocol.title, columns=COLUMNS, rows=cells, note=" ".join(notes))


def _row(facts: Facts, arm: Arm, saw: Mapping[str, Any]) -> list[Cell]:
    tuned = saw.get("tuned", [])
    return [
        arm.stage,
        arm.what,
        ", ".join(f"{form} {amount(count)}" for form, count in saw.get("forms", {}).items()) or MISSING,
        saw.get("labels", MISSING),
        amount(saw.get("trained_tokens")),
        amount(saw.get("generated_tokens")),
        saw["flops"] / 1e12 if "flops" in saw else None,
        f"{len(tuned)}: {', '.join(f'{value:g}' for value in tuned)}" if tuned else MISSING,
        saw.get("train_reward"),
        held_out(facts, arm.scored),
    ]


def held_out(facts: Facts, path: str) -> str:
    """Score of a part in percent: the mean over skills of "general", over all replies of a budget table, over families
    that need steps where a part has others too, of a probe what it recalls; a dash where there is none."""
    part = lookup(facts, path) if path else None
    if not part:
        return MISSING
    if path.endswith("/probe"):
        return shown(stored(part, 100))
    if path.endswith("/budget"):
        return shown(level([list(values) for values in zip(*(row["correct"] for row in part), strict=True)]))
    if path.endswith("/general"):
        return MISSING if lacks(facts, path, SKILLS) else shown(mean_of(list(skill_levels(facts, path).values())))
    if path.endswith("/modes"):
        return shown(level(rows(facts, path, column="followed")))
    return shown(level(rows(facts, path, HARD if path.endswith(("/think", "/direct")) else None)))
