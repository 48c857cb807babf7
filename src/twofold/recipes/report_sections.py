"""Report sections about what the checkpoints can do: accuracies, modes, budget, distillation, samples, data.

Each function turns facts into one section, or None where the run has nothing to show. Numbers in prose are computed.
Not here: training curves (``report_training``), what arms saw (``report_arms``), verdicts (``claims``). No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twofold.eval.stats import Interval
from twofold.recipes.claims.students import PARTS
from twofold.recipes.evidence import (
    EASY,
    HARD,
    HELD_OUT_KINDS,
    SKILLS,
    Facts,
    difference,
    lacks,
    level,
    lookup,
    mean_of,
    missing,
    pass_at_level,
    rows,
    samples_per_item,
    shown,
)
from twofold.recipes.report_arms import arms_section
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
    "eval_rl_more_sft": "control: more SFT on traces",
    "eval_rl_rejection": "control: SFT on own right samples",
    "eval_think_only": "control: thinking alone",
    "eval_general_sft_24": "control: 24 solved examples",
    "eval_general_sft_240": "control: 240 solved examples",
    "eval_student_sft": "student, off-policy",
    "eval_student_opd": "student, on-policy",
    "eval_student_rl": "student, RL",
    "eval_student_more_sft": "student, more teacher texts",
}
STUDENTS = {
    "student_sft": "off-policy",
    "student_opd": "+ on-policy",
    "student_rl": "+ RL",
    "student_more_sft": "+ more teacher texts",
}
BUDGETS = {"eval_final": "final", "eval_fusion": "fusion", "eval_uncut": "without cut thoughts"}
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
        arms_section,
        agreement_section,
        samples_section,
    ]
    return [section for section in (build(facts) for build in builders) if section is not None]


def checkpoints_section(facts: Facts) -> Section | None:
    """One row a checkpoint: accuracy in both modes and at every size, thinking tokens, cut-off replies."""
    found = [name for name in CHECKPOINTS if not missing(facts, f"{name}/items/think")]
    if not found:
        return None
    table: list[list[Cell]] = []
    for name in found:
        think = facts[name]["items"]["think"]
        tokens = [t for row in rows(facts, f"{name}/items/think", HARD, "thinking_tokens") for t in row]
        parts = (("think", HARD), ("direct", HARD), ("no_think", EASY), ("mixed", None), ("beyond", None))
        table.append(
            [
                CHECKPOINTS[name],
                *(_level_cell(facts, f"{name}/items/{part}", kinds) for part, kinds in parts),
                sum(tokens) / max(1, len(tokens)),
                100 * think["truncated"],
            ]
        )
    last = found[-1] if "eval_final" not in found else "eval_final"
    best = level(rows(facts, f"{last}/items/think", HARD))
    text = (
        f"Held-out tasks that need several steps ({', '.join(f'`{name}`' for name in HARD)}), the same items for every "
        f"checkpoint of this run, at T = 0.6. The checkpoint “{CHECKPOINTS[last]}” solves {number(best.value, '%')} of "
        "them thinking. Mixed signs have no traces in any training text, and sizes beyond training are never trained."
    )
    columns = ["checkpoint", "thinking, %", "hard switch, %", "easy families, /no_think, %", "mixed signs, %"]
    columns += ["beyond training, %", "thinking tokens", "cut off, %"]
    return Section(title="Checkpoints", text=text, tables=[Table(title="", columns=columns, rows=table)])


def _level_cell(facts: Facts, path: str, kinds: tuple[str, ...] | None = None, column: str = "correct") -> str:
    if missing(facts, path) or lacks(facts, path, kinds or ()):
        return MISSING
    return shown(level(rows(facts, path, kinds, column)))


def general_section(facts: Facts) -> Section | None:
    """Each kind of general RL before and after, beside SFT on labelled examples; what the claim counts is marked."""
    pair = ("eval_final/items/general", "eval_fusion/items/general")
    if missing(facts, *pair):
        return None
    kinds = list(dict.fromkeys(lookup(facts, f"{pair[0]}/kinds")))
    table: list[list[Cell]] = []
    for kind in kinds:
        arms = (pair[1], pair[0], "eval_general_sft_24/items/general", "eval_general_sft_240/items/general")
        before, after, few, many = (_level_cell(facts, path, (kind,)) for path in arms)
        change = shown(difference(facts, *pair, (kind,)))
        table.append([kind, kind in SKILLS, SKILLS.get(kind), before, after, change, few, many])
    text = (
        f"General RL trains many kinds of tasks at once. {len(SKILLS)} of them are skills that no earlier stage "
        "teaches: which style or order a cue asks for. Before general RL they should be "
        "near what guessing gets. The last columns are SFT on labelled examples instead."
    )
    columns = ["kind", "in the claim", "chance, %", "before, %", "after, %", "change, points"]
    columns += ["24 examples, %", "240 examples, %"]
    return Section(title="General RL", text=text, tables=[Table(title="", columns=columns, rows=table)])


def modes_section(facts: Facts) -> Section | None:
    """Mode following of the final model by pattern of soft switches, beside the model before general RL."""
    if missing(facts, "eval_final/items/modes"):
        return None
    part = "eval_final/items/modes"
    table: list[list[Cell]] = []
    for kind in dict.fromkeys(lookup(facts, f"{part}/kinds")):
        table.append(
            [
                kind.removeprefix("mode: "),
                kind not in HELD_OUT_KINDS,
                len(rows(facts, part, (kind,))),
                _level_cell(facts, "eval_fusion/items/modes", (kind,), "followed"),
                _level_cell(facts, part, (kind,), "followed"),
            ]
        )
    names = ", ".join(f"“{kind.removeprefix('mode: ')}”" for kind in HELD_OUT_KINDS)
    text = (
        "A reply follows its mode when it has a closed, non-empty thought under `/think`, an empty one under "
        f"`/no_think` and none under the hard switch; the last flag counts. No stage trains on the patterns {names}. "
        "The hard switch fills in the empty thought itself, so it says little about the model."
    )
    columns = ["pattern", "trained", "conversations", "after fusion, %", "final, %"]
    return Section(title="Mode following", text=text, tables=[Table(title="", columns=columns, rows=table)])


def budget_section(facts: Facts) -> Section | None:
    """Accuracy against the thinking budget: all replies, those that were stopped, and what guessing gets."""
    found = {name: lookup(facts, f"{name}/scores/budget") for name in BUDGETS}
    tables = [_budget_table(BUDGETS[name], rows_) for name, rows_ in found.items() if rows_]
    if not found["eval_final"]:
        return None
    table = sorted(found["eval_final"], key=lambda row: row["budget"])
    x = [float(row["budget"]) for row in table]
    stopped = [_stopped(row) for row in table]
    chance = [100 * sum(row["chance"]) / len(row["chance"]) for row in table]
    everything = [level([[value] for value in row["correct"]]) for row in table]
    series = [
        _band("all replies", x, everything),
        _band("stopped replies", [place for place, s in zip(x, stopped, strict=True) if s], [s for s in stopped if s]),
        Series(name="guessing", x=x, y=chance),
    ]
    plot = Plot(
        title="Accuracy by thinking budget",
        x_label="thinking budget, tokens",
        y_label="accuracy, %",
        series=series,
        y_min=0,
        y_max=100,
        note="Final model. Bands are 95 % intervals over items. The curve of all replies rises by itself as more "
        "thoughts finish; stopped replies show what a partial thought is worth.",
    )
    text = (
        "At the budget's end the engine closes the thought with a fixed text, and the model answers from what it has. "
        "The items are of `top`, where the number of entries alone says how long a whole thought is, not the answer. "
        f"Over all replies accuracy goes from {number(everything[0].value, '%')} at {table[0]['budget']} tokens to "
        f"{number(everything[-1].value, '%')} at {table[-1]['budget']}."
    )
    return Section(title="Thinking budget", text=text, plots=[plot], tables=tables)


def _stopped(row: Mapping[str, Any]) -> Interval | None:
    right = [[value] for value, cut in zip(row["correct"], row["stopped"], strict=True) if cut]
    return level(right) if right else None


def _band(name: str, x: list[float], values: list[Interval]) -> Series:
    low, high = [v.low for v in values], [v.high for v in values]
    return Series(name=name, x=x, y=[v.value for v in values], low=low, high=high)


def _budget_table(title: str, table: list[Mapping[str, Any]]) -> Table:
    cells: list[list[Cell]] = []
    for row in sorted(table, key=lambda row: row["budget"]):
        stopped = _stopped(row)
        share = 100 * sum(row["stopped"]) / len(row["stopped"])
        correct = shown(level([[value] for value in row["correct"]]))
        longest = max(row["thinking_tokens"])
        cells.append([row["budget"], correct, share, shown(stopped) if stopped else MISSING, longest])
    columns = ["budget", "all replies, %", "replies stopped, %", "stopped replies, %", "longest thought, tokens"]
    return Table(title=f"Budgets, {title}", columns=columns, rows=cells)


def distillation_section(facts: Facts) -> Section | None:
    """The student after each arm: quality at T = 1 in three parts, and cost."""
    found = [
        name for name in STUDENTS if not missing(facts, f"{name}/result", *(f"eval_{name}/items/{p}" for p in PARTS))
    ]
    if not found:
        return None
    k = min(8, samples_per_item(facts, *(f"eval_{name}/items/{part}" for name in found for part in PARTS)))
    scores = {name: [_mean_level(facts, name), _mean_pass(facts, name, k)] for name in found}
    table: list[list[Cell]] = []
    for name in found:
        result = facts[name]["result"]
        table.append(
            [
                STUDENTS[name],
                *(shown(value) for value in scores[name]),
                *(shown(level(rows(facts, f"eval_{name}/items/{part}"))) for part in PARTS),
                seconds(facts[name]["manifest"]["cost"]["seconds"]),
                amount(result.get("tokens")),
                amount(result.get("generated_tokens")),
                result["flops"] / 1e12 if "flops" in result else None,
            ]
        )
    said = ", ".join(f"{number(scores[name][0].value, '%')} ({STUDENTS[name]})" for name in found)
    text = (
        "A smaller model learns from the finished one: first from its texts, then on its own samples against the "
        "teacher's distribution. RL and more texts of the teacher, on the same student for the same operations, are "
        f"the comparison. Pass@1, mean of the three parts, is {said}."
    )
    columns = ["arm", "pass@1, %", f"pass@{k}, %", "as shown in text, %", "mixed, no flag, %", "mixed, /think, %"]
    columns += ["time", "trained tokens", "generated", "TFLOP"]
    plot = Plot(
        title="Student at T = 1",
        x_label="",
        y_label="%",
        kind="bar",
        x_names=[STUDENTS[name] for name in found],
        y_min=0,
        y_max=100,
        series=[
            _band(title, [float(place) for place in range(len(found))], [scores[name][index] for name in found])
            for index, title in enumerate(("pass@1", f"pass@{k}"))
        ],
    )
    note = "Pass@1 and the second column are means of the three parts. Operations include the teacher's."
    tables = [Table(title="Arms", columns=columns, rows=table, note=note)]
    return Section(title="Strong to weak", text=text, plots=[plot], tables=tables)


def _mean_level(facts: Facts, name: str) -> Interval:
    return mean_of([level(rows(facts, f"eval_{name}/items/{part}")) for part in PARTS], same_items=True)


def _mean_pass(facts: Facts, name: str, k: int) -> Interval:
    return mean_of([pass_at_level(rows(facts, f"eval_{name}/items/{part}"), k) for part in PARTS], same_items=True)


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
