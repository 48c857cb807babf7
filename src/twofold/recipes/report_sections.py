"""Report sections about what the checkpoints can do: accuracies, modes, budget, distillation, samples, data.

Each function turns facts into one section, or None where the run has nothing to show. Numbers in prose are computed.
Not here: training curves (``report_training``) and verdicts (``claims``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twofold.recipes.claims import UNTAUGHT, untaught_gains
from twofold.recipes.evidence import (
    HARD,
    SYSTEM_KINDS,
    Facts,
    difference,
    level,
    lookup,
    missing,
    pass_at_level,
    rows,
    samples_per_item,
    shown,
    stored,
)
from twofold.recipes.report_training import (
    agreement_section,
    cold_start_section,
    fusion_section,
    moe_section,
    pretraining_section,
    rl_section,
)
from twofold.report.model import Cell, Plot, Sample, Section, Series, Table
from twofold.report.text import MISSING, amount, number, seconds

CHECKPOINTS = {
    "eval_cold_start": "1 cold start",
    "eval_rl": "2 reasoning RL",
    "eval_fusion": "3 fusion",
    "eval_final": "4 general RL (final)",
    "eval_direct": "control: direct answers only",
    "eval_student_sft": "student, off-policy",
    "eval_student_opd": "student, on-policy",
    "eval_student_rl": "student, RL",
}
STUDENTS = {"student_sft": "off-policy", "student_opd": "+ on-policy", "student_rl": "+ RL"}
RIGHT_SHOWN, WRONG_SHOWN = 2, 1  # samples of each sort
DROPPED_ARE = {
    "exact-duplicate": "exact copies",
    "near-duplicate": "near copies",
    "held-out-prompt": "held-out prompts",
    "held-out-overlap": "overlaps with held-out text",
}


def build_sections(facts: Facts) -> list[Section]:
    """All sections the run has material for, in the order of the recipe."""
    builders: list[Callable[[Facts], Section | None]] = [
        checkpoints_section,
        pretraining_section,
        cold_start_section,
        rl_section,
        fusion_section,
        general_section,
        modes_section,
        budget_section,
        distillation_section,
        moe_section,
        agreement_section,
        samples_section,
    ]
    return [section for section in (build(facts) for build in builders) if section is not None]


def checkpoints_section(facts: Facts) -> Section | None:
    """One row a checkpoint: accuracy in both modes, thinking tokens, cut-off replies."""
    found = [name for name in CHECKPOINTS if not missing(facts, f"{name}/items/think", f"{name}/items/direct")]
    if not found:
        return None
    table: list[list[Cell]] = []
    for name in found:
        think = facts[name]["items"]["think"]
        tokens = [t for row in rows(facts, f"{name}/items/think", HARD, "thinking_tokens") for t in row]
        easy = rows(facts, f"{name}/items/no_think", ("max",)) if lookup(facts, f"{name}/items/no_think") else []
        table.append(
            [
                CHECKPOINTS[name],
                shown(level(rows(facts, f"{name}/items/think", HARD))),
                shown(level(rows(facts, f"{name}/items/direct", HARD))),
                shown(level(easy)) if easy else MISSING,
                sum(tokens) / max(1, len(tokens)),
                100 * think["truncated"],
            ]
        )
    last = found[-1] if "eval_final" not in found else "eval_final"
    best, at_once = (level(rows(facts, f"{last}/items/{part}", HARD)) for part in ("think", "direct"))
    text = (
        f"Held-out tasks that need several steps ({', '.join(f'`{name}`' for name in HARD)}), the same items for every "
        f"checkpoint, at T = 0.6. The checkpoint “{CHECKPOINTS[last]}” solves {number(best.value, '%')} of them "
        f"thinking and {number(at_once.value, '%')} answering at once."
    )
    columns = ["checkpoint", "thinking, %", "hard switch, %", "max with /no_think, %", "thinking tokens", "cut off, %"]
    return Section(title="Checkpoints", text=text, tables=[Table(title="", columns=columns, rows=table)])


def general_section(facts: Facts) -> Section | None:
    """Each kind of general RL before and after, what the claim counts marked."""
    pair = ("eval_final/items/general", "eval_fusion/items/general")
    if missing(facts, *pair):
        return None
    kinds = list(dict.fromkeys(lookup(facts, f"{pair[0]}/kinds")))
    groups = {kind: ((kind,), "correct") for kind in kinds if not kind.startswith("mode: ")}
    taught = tuple(kind for kind in kinds if kind.startswith("mode: ") and kind not in SYSTEM_KINDS)
    if taught:
        groups["flags in user turns"] = (taught, "followed")
    groups |= {kind: ((kind,), "followed") for kind in kinds if kind in SYSTEM_KINDS}
    counted = {kind for group, _ in UNTAUGHT.values() for kind in group}
    table: list[list[Cell]] = []
    for name, (group, column) in groups.items():
        before, after = (level(rows(facts, path, group, column)) for path in (pair[1], pair[0]))
        change = difference(facts, *pair, group, column)
        what = "in the right mode" if column == "followed" else "right answer"
        table.append([name, what, shown(before), shown(after), shown(change), name in counted])
    said = ", ".join(f"{name} {number(value.value)}" for name, value in untaught_gains(facts).items())
    text = (
        "General RL trains many kinds of tasks at once. Fusion left three sorts untaught; points gained on them: "
        f"{said}. The other kinds show what else moved."
    )
    columns = ["kind", "counted", "before, %", "after, %", "change, points", "in the claim"]
    return Section(title="General RL", text=text, tables=[Table(title="", columns=columns, rows=table)])


def modes_section(facts: Facts) -> Section | None:
    """Mode following of the final model by pattern of soft switches, beside the model before general RL."""
    if missing(facts, "eval_final/items/modes"):
        return None
    part = "eval_final/items/modes"
    kinds = list(dict.fromkeys(lookup(facts, f"{part}/kinds")))
    before = lookup(facts, "eval_fusion/items/modes") is not None
    table: list[list[Cell]] = []
    for kind in kinds:
        followed = rows(facts, part, (kind,), "followed")
        earlier = rows(facts, "eval_fusion/items/modes", (kind,), "followed") if before else []
        table.append(
            [
                kind.removeprefix("mode: "),
                len(followed),
                shown(level(earlier)) if earlier else MISSING,
                shown(level(followed)),
            ]
        )
    overall = level(rows(facts, part, column="followed"))
    text = (
        "A reply follows its mode when it has a closed, non-empty thought under `/think`, an empty one under "
        f"`/no_think` and none under the hard switch; the last flag counts. The final model follows in "
        f"{shown(overall, '%')}."
    )
    columns = ["pattern", "conversations", "after fusion, %", "final, %"]
    return Section(title="Mode following", text=text, tables=[Table(title="", columns=columns, rows=table)])


def budget_section(facts: Facts) -> Section | None:
    """Accuracy against the thinking budget, forced stop and plain truncation."""
    table: list[Mapping[str, Any]] = sorted(lookup(facts, "eval_final/scores/budget") or [], key=lambda r: r["budget"])
    if not table:
        return None
    series = []
    for arm, title in (("forced", "forced stop"), ("truncated", "plain truncation")):
        values = [stored(row[arm], 100) for row in table]
        series.append(
            Series(
                name=title,
                x=[float(row["budget"]) for row in table],
                y=[value.value for value in values],
                low=[value.low for value in values],
                high=[value.high for value in values],
            )
        )
    first, last = (stored(table[place]["forced"], 100) for place in (0, -1))
    text = (
        "At the budget's end the engine closes the thought with a fixed text and the model answers from what it has. "
        f"Accuracy goes from {number(first.value, '%')} at {table[0]['budget']} tokens to {number(last.value, '%')} at "
        f"{table[-1]['budget']}. Plain truncation cuts the same samples without letting the model answer."
    )
    cells: list[list[Cell]] = [
        [
            row["budget"],
            shown(stored(row["forced"], 100)),
            shown(stored(row["truncated"], 100)),
            100 * row["forced_share"],
            row["max_thinking_tokens"],
        ]
        for row in table
    ]
    columns = ["budget", "forced stop, %", "truncation, %", "replies stopped, %", "longest thought, tokens"]
    plot = Plot(
        title="Accuracy by thinking budget",
        x_label="thinking budget, tokens",
        y_label="accuracy, %",
        series=series,
        y_min=0,
        y_max=100,
        note="Bands are 95 % intervals over items.",
    )
    numbers = Table(title="", columns=columns, rows=cells)
    return Section(title="Thinking budget", text=text, plots=[plot], tables=[numbers])


def distillation_section(facts: Facts) -> Section | None:
    """The student after each arm: quality at T = 1 and cost."""
    found = [name for name in STUDENTS if not missing(facts, f"eval_{name}/items/hot", f"{name}/result")]
    if not found:
        return None
    k = min(8, samples_per_item(facts, *(f"eval_{name}/items/hot" for name in found)))
    scores = {name: _pass_scores(facts, f"eval_{name}/items/hot", k) for name in found}
    table: list[list[Cell]] = []
    for name in found:
        result = facts[name]["result"]
        table.append(
            [
                STUDENTS[name],
                *(shown(value) for value in scores[name]),
                shown(level(rows(facts, f"eval_{name}/items/think", HARD))),
                seconds(facts[name]["manifest"]["cost"]["seconds"]),
                amount(result.get("tokens")),
                amount(result.get("generated_tokens")),
                result["flops"] / 1e12 if "flops" in result else None,
            ]
        )
    said = ", ".join(f"{number(scores[name][0].value, '%')} ({STUDENTS[name]})" for name in found)
    text = (
        "A smaller model learns from the finished one: first from its answers, then on its own samples against the "
        "teacher's distribution. RL on the same off-policy student is the comparison. "
        f"Pass@1 is {said}."
    )
    columns = ["arm", "pass@1, %", f"pass@{k}, %", "T = 0.6, %", "time", "trained tokens", "generated", "TFLOP"]
    plot = Plot(
        title="Student at T = 1",
        x_label="",
        y_label="%",
        kind="bar",
        x_names=[STUDENTS[name] for name in found],
        y_min=0,
        y_max=100,
        series=[
            Series(
                name=title,
                x=[float(place) for place in range(len(found))],
                y=[scores[name][index].value for name in found],
                low=[scores[name][index].low for name in found],
                high=[scores[name][index].high for name in found],
            )
            for index, title in enumerate(("pass@1", f"pass@{k}"))
        ],
    )
    note = "Time and operations of the arm itself; both second arms stand on the first."
    tables = [Table(title="Arms", columns=columns, rows=table, note=note)]
    return Section(title="Strong to weak", text=text, plots=[plot], tables=tables)


def _pass_scores(facts: Facts, path: str, k: int) -> list[Any]:
    values = rows(facts, path, HARD)
    return [level(values), pass_at_level(values, k)]


def samples_section(facts: Facts) -> Section | None:
    """Replies of the final model, chosen by rule: of each sort the first right ones and the first wrong one."""
    source = lookup(facts, "eval_final/samples")
    if not source:
        return None
    samples = []
    for title in dict.fromkeys(row["title"] for row in source):
        of_title = [row for row in source if row["title"] == title]
        chosen = [row for row in of_title if row["correct"]][:RIGHT_SHOWN]
        chosen += [row for row in of_title if not row["correct"]][:WRONG_SHOWN]
        samples += [_sample(row) for row in chosen]
    text = (
        f"Replies of the final model at T = 0.6, chosen by rule: of each sort the first {RIGHT_SHOWN} right ones and "
        "the first wrong one among a fixed few."
    )
    return Section(title="Samples", text=text, samples=samples)


def _sample(row: Mapping[str, Any]) -> Sample:
    thinking = row["mode"] == "think"
    notes = [f"expected: `{row['expected']}`"] if not row["correct"] else []
    notes += [f"called {call}, got `{result}`" for call, result in zip(row["calls"], row["tool_results"], strict=False)]
    if not row["followed"]:
        notes.append("not in the mode that was called for")
    return Sample(
        title=f"{row['title']}: {row['kind'].removeprefix('mode: ')}",
        mode="thinking" if thinking else "not thinking",
        prompt=row["prompt"],
        reasoning=row["reasoning"] if thinking or row["reasoning"].strip() else None,
        answer=row["answer"],
        correct=row["correct"],
        note="; ".join(notes),
    )


def data_card(facts: Facts) -> Section | None:
    """Sources with licences, sizes, what was dropped or held out, and the share of tokens each stage drew from them."""
    card = lookup(facts, "data/card")
    if card is None:
        return None
    stages = [name for name in ("s1", "s2", "s3") if lookup(facts, f"{name}/result/tokens_by_source")]
    used = {name: facts[name]["result"]["tokens_by_source"] for name in stages}
    table: list[list[Cell]] = []
    for row in card["sources"]:
        shares = [100 * used[name].get(row["name"], 0) / max(1, sum(used[name].values())) for name in stages]
        table.append([row["name"], row["licence"], row["documents"], row["tokens"], row["bytes_per_token"], *shares])
    totals = card["totals"]
    dropped = totals["dropped"]
    reasons = ", ".join(f"{number(count)} {DROPPED_ARE.get(kind, kind)}" for kind, count in dropped.items())
    text = (
        f"{amount(totals['documents'])} documents with {amount(totals['tokens'])} tokens, generated or shipped with "
        f"the Python interpreter; licences: {', '.join(card['licences'])}. {number(totals['held_out'])} documents of "
        f"text are held out for measurement. Dropped from training text: {reasons or 'nothing'}. The hash of the "
        f"whole card is `{card['hash']}`."
    )
    columns = ["source", "licence", "documents", "tokens", "bytes/token", *(f"% of {name}" for name in stages)]
    sources = Table(title="Sources and the tokens drawn from them", columns=columns, rows=table)
    return Section(title="Data card", text=text, tables=[sources])
