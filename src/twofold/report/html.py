"""The report as one HTML page: no script, no network, light and dark, readable on a phone and on paper.

Every text from the report is escaped here; plots are inline SVG whose colours follow the page. Not here: the style
sheet (``style``), drawing (``plots``) and what is said (``model``).
"""

from __future__ import annotations

import math
from html import escape

from twofold.report.model import Cell, Claim, Heatmap, Plot, Report, Sample, Section, StageCost, Table
from twofold.report.plots import plot_svg
from twofold.report.style import CSS
from twofold.report.text import (
    amount,
    claim_lines,
    claim_target,
    inline_html,
    interval,
    memory,
    number,
    prose_html,
    seconds,
    short,
    slug,
    tokens_per_second,
    verdict_line,
    with_space,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NUMBERS_SHOWN = 40
HEAT_TEXT_COLUMNS = 16


def render_html(report: Report) -> str:
    """The whole page as text."""
    parts: list[tuple[str, str]] = []
    if report.claims:
        parts.append(("Claims", _claims(report.claims, report.claims_note)))
    if report.stages:
        parts.append(("Stages and cost", _stages(report)))
    parts.extend((section.title, _section(section)) for section in report.sections)
    if report.data_card is not None:
        parts.append((report.data_card.title, _section(report.data_card)))
    parts.append(("Reproduce", _reproduce(report)))
    used: set[str] = set()
    anchors = [slug(title, used) for title, _ in parts]
    links = "".join(
        f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, (title, _) in zip(anchors, parts, strict=True)
    )
    body = "\n".join(
        f'<section><h2 id="{anchor}">{escape(title)}</h2>\n{content}</section>'
        for anchor, (title, content) in zip(anchors, parts, strict=True)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(report.title)}</title>
<style>{CSS}</style>
</head>
<body>
<div class="layout">
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
{_header(report)}
{body}
<footer>Made by Twofold on {escape(report.created)}. The same figures are in <code>report.json</code>.</footer>
</main>
</div>
</body>
</html>
"""


def _header(report: Report) -> str:
    facts = [
        ("Claims", verdict_line(report.claims) if report.claims else ""),
        ("Time", seconds(report.total_seconds) if report.total_seconds is not None else ""),
        ("Peak memory", memory(report.peak_memory_bytes) if report.peak_memory_bytes else ""),
        ("Hardware", report.hardware),
        ("Seed", str(report.seed)),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value)
    intro = f'<div class="lead">{prose_html(report.intro)}</div>' if report.intro else ""
    return f'<header><h1>{escape(report.title)}</h1>{intro}<dl class="facts">{cells}</dl></header>'


def _claims(claims: list[Claim], note: str) -> str:
    rows = "".join(_claim_row(claim) for claim in claims)
    return f"""<p>{escape(verdict_line(claims))}. Brackets and thick lines are 95&nbsp;% intervals;
the dashed line is the target.</p>
{prose_html(note)}
<div class="scroll"><table class="claims"><thead><tr><th>Verdict</th><th>Claim</th><th class="num">Measured</th>
<th class="target">Target</th><th class="wide"><span hidden>Interval</span></th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _claim_row(claim: Claim) -> str:
    lines = "".join(f"<li>{inline_html(line)}</li>" for line in claim_lines(claim))
    note = f'<ul class="note">{lines}</ul>' if lines else ""
    note += f'<p class="note">{inline_html(claim.note)}</p>' if claim.note else ""
    bounds = interval(claim.low, claim.high)
    return f"""<tr><td><span class="mark {claim.outcome}">{claim.verdict}</span></td>
<td><b>{escape(claim.name)}</b><br>{inline_html(claim.question or claim.statement)}{note}</td>
<td class="num">{escape(number(claim.value, claim.unit))}<span>{escape(bounds)}</span></td>
<td class="target">{escape(claim_target(claim))}</td><td class="wide">{_claim_bar(claim)}</td></tr>"""


def _claim_bar(claim: Claim) -> str:
    known = [v for v in (claim.value, claim.low, claim.high, claim.target) if v is not None and math.isfinite(v)]
    if claim.value is None or not math.isfinite(claim.value) or not claim.judged:
        return ""
    left, right = _bar_scale(known, claim.unit)

    def place(value: float) -> float:
        return round(6 + 164 * (min(max(value, left), right) - left) / (right - left), 1)

    colour = "var(--good)" if claim.holds else "var(--bad)"
    shapes = ['<line x1="6" x2="170" y1="16" y2="16" stroke="var(--line)" stroke-width="2"/>']
    if claim.low is not None and claim.high is not None:
        shapes.append(
            f'<line x1="{place(claim.low)}" x2="{place(claim.high)}" y1="16" y2="16" stroke="{colour}"'
            ' stroke-width="6" stroke-linecap="round" opacity=".38"/>'
        )
    if claim.target is not None:
        x = place(claim.target)
        shapes.append(f'<line x1="{x}" x2="{x}" y1="6" y2="26" stroke="var(--ink)" stroke-dasharray="2.5 2"/>')
    shapes.append(f'<circle cx="{place(claim.value)}" cy="16" r="4.5" fill="{colour}"/>')
    shapes.append(f'<text x="6" y="37">{escape(short(left))}</text>')
    shapes.append(f'<text x="170" y="37" text-anchor="end">{escape(short(right))}</text>')
    return f'<svg class="bar" viewBox="0 0 176 40" aria-hidden="true">{"".join(shapes)}</svg>'


def _bar_scale(values: list[float], unit: str) -> tuple[float, float]:
    low, high = min(values), max(values)
    if unit == "%" and low >= 0 and high <= 100:
        return 0.0, 100.0
    if not unit and low >= 0 and high <= 1:
        return 0.0, 1.0
    low, high = min(low, 0.0), max(high, 0.0)
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    return math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step


def _stages(report: Report) -> str:
    longest = max((stage.seconds for stage in report.stages), default=0.0) or 1.0
    rows = "".join(_stage_row(stage, longest) for stage in report.stages)
    total = sum(stage.seconds for stage in report.stages)
    tokens = sum(stage.tokens or 0 for stage in report.stages)
    tflops = sum(stage.tflops or 0.0 for stage in report.stages)
    foot = f"""<tfoot><tr><td>All stages</td><td class="num">{seconds(total)}</td><td></td>
<td class="num">{amount(tokens) if tokens else ""}</td><td></td><td class="num">{number(tflops) if tflops else ""}</td>
<td></td></tr></tfoot>"""
    return f"""<div class="scroll"><table><thead><tr><th>Stage</th><th class="num">Time</th>
<th><span hidden>Share of the longest</span></th><th class="num">Tokens</th><th class="num">Tokens/s</th>
<th class="num">TFLOP</th><th>Note</th></tr></thead><tbody>{rows}</tbody>{foot}</table></div>"""


def _stage_row(stage: StageCost, longest: float) -> str:
    share = 100 * stage.seconds / longest
    return f"""<tr><td>{escape(stage.title)}<br><span class="note mono">{escape(stage.name)}</span></td>
<td class="num">{seconds(stage.seconds)}</td><td><div class="share"><i style="width:{share:.1f}%"></i></div></td>
<td class="num">{amount(stage.tokens)}</td><td class="num">{amount(tokens_per_second(stage))}</td>
<td class="num">{number(stage.tflops)}</td><td>{inline_html(stage.note)}</td></tr>"""


def _section(section: Section) -> str:
    parts = [prose_html(section.text)]
    if section.plots:
        parts.append('<div class="plots">' + "".join(_plot(plot) for plot in section.plots) + "</div>")
    parts.extend(_table(table) for table in section.tables)
    parts.extend(_heatmap(heatmap) for heatmap in section.heatmaps)
    if section.samples:
        parts.append('<div class="samples">' + "".join(_sample(sample) for sample in section.samples) + "</div>")
    return "\n".join(parts)


def _plot(plot: Plot) -> str:
    numbers = ""
    if sum(len(series.x) for series in plot.series) <= NUMBERS_SHOWN:
        numbers = f"<details><summary>Numbers</summary>{_table(plot_table(plot))}</details>"
    return f'<figure class="plot"><h3>{escape(plot.title)}</h3>{plot_svg(plot)}{_note(plot.note)}{numbers}</figure>'


def plot_table(plot: Plot) -> Table:
    """The points of a plot as a table: series, x, y, interval."""
    rows: list[list[Cell]] = []
    for series in plot.series:
        for index, x in enumerate(series.x):
            named = plot.x_names is not None and 0 <= int(x) < len(plot.x_names)
            bounds = ""
            if series.low is not None and series.high is not None:
                bounds = interval(series.low[index], series.high[index])
            where: Cell = plot.x_names[int(x)] if plot.x_names is not None and named else x
            rows.append([series.name, where, series.y[index], bounds])
    return Table(title="", columns=["Series", plot.x_label or "x", plot.y_label or "y", "95 % interval"], rows=rows)


def _table(table: Table) -> str:
    numeric = [
        any(_is_number(row[index]) for row in table.rows) and all(not isinstance(row[index], str) for row in table.rows)
        for index in range(len(table.columns))
    ]
    head = "".join(f"<th{_num(right)}>{escape(name)}</th>" for name, right in zip(table.columns, numeric, strict=True))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_num(right)}>{_cell(cell)}</td>" for cell, right in zip(row, numeric, strict=True))
        + "</tr>"
        for row in table.rows
    )
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_note(table.note)}"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if cell is None or isinstance(cell, (int, float)):
        return escape(number(cell))
    return inline_html(cell)


def _heatmap(heatmap: Heatmap) -> str:
    low, high = heatmap.finite_range
    span = high - low or 1.0
    show = len(heatmap.column_labels) <= HEAT_TEXT_COLUMNS
    head = "".join(f"<th>{escape(label)}</th>" for label in heatmap.column_labels)
    rows = []
    for label, values in zip(heatmap.row_labels, heatmap.values, strict=True):
        cells = []
        for value in values:
            strength = 100 * (value - low) / span if math.isfinite(value) else 0.0
            colour = f"background:color-mix(in srgb, var(--c1) {6 + 0.52 * strength:.0f}%, var(--card))"
            text = escape(number(value))
            cells.append(f'<td style="{colour}" title="{text}">{text if show else ""}</td>')
        rows.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    return (
        f'<h3>{escape(heatmap.title)}</h3><div class="scroll"><table class="heat">'
        f"<thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{_note(heatmap.note)}"
    )


def _sample(sample: Sample) -> str:
    verdict = ""
    if sample.correct is not None:
        style, text = ("holds", "✓ correct") if sample.correct else ("fails", "✗ wrong")
        verdict = f'<span class="mark {style}">{text}</span>'
    think = ""
    if sample.reasoning is not None:
        shown = sample.reasoning.strip() or "(empty)"
        think = f'<h4>Thinking</h4><pre class="think" tabindex="0">{escape(shown)}</pre>'
    return f"""<article class="sample"><div><h3>{escape(sample.title)}</h3>
<span class="mark open">{escape(sample.mode)}</span>{verdict}</div>
<h4>Prompt</h4><pre>{escape(sample.prompt)}</pre>{think}
<h4>Answer</h4><pre class="say">{escape(sample.answer)}</pre>{_note(sample.note)}</article>"""


def _reproduce(report: Report) -> str:
    versions = ", ".join(f"{name}{with_space(value)}" for name, value in report.versions.items())
    return f"""<p>This command makes the run again; on the same machine and versions, to the same numbers:</p>
<code class="command">{escape(report.command)}</code>
<p class="note">Seed {report.seed}. {escape(report.hardware)}. {escape(versions)}.</p>"""


def _note(text: str) -> str:
    return f'<p class="note">{inline_html(text)}</p>' if text else ""


def _num(right: bool) -> str:
    return ' class="num"' if right else ""


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)
