"""The report as Markdown, for code hosts and terminals: the same content as the page, plots as files beside it.

Text from the report cannot become markup: HTML is escaped, table cells stay cells, samples are fenced.
"""

from __future__ import annotations

from collections.abc import Iterator

from twofold.report.html import plot_table
from twofold.report.model import Cell, Claim, Heatmap, Plot, Report, Sample, Section, Table
from twofold.report.text import (
    amount,
    cell_markdown,
    claim_lines,
    claim_target,
    fence,
    inline_markdown,
    interval,
    memory,
    number,
    prose_markdown,
    seconds,
    slug,
    tokens_per_second,
    verdict_line,
)

PLOT_FOLDER = "plots"


def plot_files(report: Report) -> dict[str, Plot]:
    """The plots of a report by the file name they get, in order of appearance."""
    used: set[str] = set()
    sections = [*report.sections, *([report.data_card] if report.data_card is not None else [])]
    return {f"{slug(plot.title, used)}.svg": plot for section in sections for plot in section.plots}


def render_markdown(report: Report) -> str:
    """The whole document as text."""
    names = iter(plot_files(report))
    facts = [f"seed {report.seed}", report.hardware, report.created]
    if report.total_seconds is not None:
        facts.append(f"{seconds(report.total_seconds)} in all")
    if report.peak_memory_bytes is not None:
        facts.append(f"peak memory {memory(report.peak_memory_bytes)}")
    parts = [f"# {inline_markdown(report.title)}", prose_markdown(report.intro), inline_markdown(" · ".join(facts))]
    if report.claims:
        lead = f"{verdict_line(report.claims)}. Brackets are 95 % intervals."
        parts += ["## Claims", lead, prose_markdown(report.claims_note), _claims(report.claims)]
    if report.stages:
        parts += ["## Stages and cost", _stages(report)]
    for section in report.sections:
        parts += _section(section, names)
    if report.data_card is not None:
        parts += _section(report.data_card, names)
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    parts += ["## Reproduce", fence(report.command), inline_markdown(versions)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(claims: list[Claim]) -> str:
    rows = []
    for claim in claims:
        figures = f"{number(claim.value, claim.unit)} {interval(claim.low, claim.high)}".strip()
        statement = f"**{cell_markdown(claim.name)}**: {cell_markdown(claim.question or claim.statement)}"
        notes = [cell_markdown(line) for line in [*claim_lines(claim), claim.note] if line]
        rows.append([claim.verdict, statement, figures, cell_markdown(claim_target(claim)), "<br>".join(notes)])
    return _grid(["Verdict", "Claim", "Measured", "Target", "Note"], rows)


def _stages(report: Report) -> str:
    rows = [
        [
            cell_markdown(f"{stage.title} (`{stage.name}`)"),
            seconds(stage.seconds),
            amount(stage.tokens),
            amount(tokens_per_second(stage)),
            number(stage.tflops),
            cell_markdown(stage.note),
        ]
        for stage in report.stages
    ]
    rows.append(["**All stages**", f"**{seconds(sum(stage.seconds for stage in report.stages))}**", "", "", "", ""])
    return _grid(["Stage", "Time", "Tokens", "Tokens/s", "TFLOP", "Note"], rows)


def _section(section: Section, names: Iterator[str]) -> list[str]:
    parts = [f"## {inline_markdown(section.title)}", prose_markdown(section.text)]
    for plot in section.plots:
        name = next(names)
        parts += [f"### {inline_markdown(plot.title)}", f"![{inline_markdown(plot.title)}]({PLOT_FOLDER}/{name})"]
        parts.append(inline_markdown(plot.note))
        if sum(len(series.x) for series in plot.series) <= 40:
            parts.append(_table(plot_table(plot)))
    parts += [_table(table) for table in section.tables]
    parts += [_heatmap(heatmap) for heatmap in section.heatmaps]
    parts += [_sample(sample) for sample in section.samples]
    return parts


def _table(table: Table) -> str:
    grid = _grid([cell_markdown(name) for name in table.columns], [[_cell(cell) for cell in row] for row in table.rows])
    return _titled(table.title, grid, table.note)


def _heatmap(heatmap: Heatmap) -> str:
    rows = [
        [cell_markdown(label), *(number(value) for value in values)]
        for label, values in zip(heatmap.row_labels, heatmap.values, strict=True)
    ]
    return _titled(heatmap.title, _grid(["", *map(cell_markdown, heatmap.column_labels)], rows), heatmap.note)


def _sample(sample: Sample) -> str:
    verdict = "" if sample.correct is None else (" · correct" if sample.correct else " · wrong")
    parts = [f"### {inline_markdown(sample.title)} ({inline_markdown(sample.mode)}{verdict})"]
    parts += ["Prompt:", fence(sample.prompt)]
    if sample.reasoning is not None:
        parts += ["Thinking:", fence(sample.reasoning.strip() or "(empty)")]
    parts += ["Answer:", fence(sample.answer), inline_markdown(sample.note)]
    return "\n\n".join(part for part in parts if part)


def _titled(title: str, body: str, note: str) -> str:
    heading = f"### {inline_markdown(title)}" if title else ""
    return "\n\n".join(part for part in (heading, body, inline_markdown(note)) if part)


def _cell(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if cell is None or isinstance(cell, (int, float)):
        return number(cell)
    return cell_markdown(cell)


def _grid(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
