"""Numbers and prose as the report shows them: formatting, escaping and the three marks of section text.

Shared by the HTML and the Markdown writer. Not here: page structure.
"""

from __future__ import annotations

import html
import math
import re

from twofold.base.progress import duration_text
from twofold.report.model import Claim, Condition, Figure, StageCost

MISSING = "–"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, thousands parted, a true minus sign; a dash for None, "n/a" for nan."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif isinstance(value, int) or abs(value) >= 1000 or value == 0:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-3:
        text = f"{value:.2e}"
    else:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
    return text.replace("-", "\u2212") + with_space(unit)


def short(value: float, unit: str = "") -> str:
    """A number without trailing zeros, for targets and axis ends, which are round by choice."""
    return f"{value:,.10g}".replace("-", "\u2212") + with_space(unit)


def with_space(unit: str) -> str:
    """The unit after a no-break space, or nothing."""
    return f"\u00a0{unit}" if unit else ""


def amount(value: float | None) -> str:
    """Large counts with a suffix: ``1.72 M``."""
    if value is None:
        return MISSING
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}\u00a0{suffix}"
    return number(value)


def memory(value: int | None) -> str:
    """Bytes as MiB or GiB."""
    if value is None:
        return MISSING
    return f"{value / 2**30:.2f}\u00a0GiB" if value >= 2**30 else f"{value / 2**20:.0f}\u00a0MiB"


def seconds(value: float | None) -> str:
    """A duration for people."""
    return MISSING if value is None else duration_text(value)


def interval(low: float | None, high: float | None) -> str:
    """``[66.0, 74.0]``, or nothing when either end is missing."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def tokens_per_second(stage: StageCost) -> float | None:
    """Throughput of a stage, where it has tokens."""
    return stage.tokens / stage.seconds if stage.tokens and stage.seconds > 0 else None


def measured(figure: Figure) -> str:
    """``84.2 points [80.4, 87.5]``; yes or no for an exact condition; a dash for what the run lacks."""
    if figure.value is None:
        return MISSING
    if isinstance(figure, Condition) and figure.sense == "exact":
        return "yes" if figure.value == 1 else "no"
    return f"{number(figure.value, figure.unit)} {interval(figure.low, figure.high)}".strip()


def wanted(condition: Condition) -> str:
    """What a condition asks for, in words."""
    target = short(condition.target, condition.unit)
    return {
        "above": f"lower end above {target}",
        "at least": f"lower end at least {target}",
        "at most": f"upper end at most {target}",
        "level": f"estimate at least {target}",
        "exact": "yes",
    }[condition.sense]


def condition_line(condition: Condition) -> str:
    """One condition with its figures: ``**not met**: text: 1.20 points [0.5, 1.9]; wanted: …``."""
    mark = "not measured" if condition.value is None else "met" if condition.met else "**not met**"
    detail = f" ({condition.detail})" if condition.detail else ""
    return f"{mark}: {condition.text}: {measured(condition)}{detail}; wanted: {wanted(condition)}"


def figure_line(figure: Figure) -> str:
    """One figure that is shown and not judged."""
    return f"shown: {figure.text}: {measured(figure)}{f' ({figure.detail})' if figure.detail else ''}"


def claim_lines(claim: Claim) -> list[str]:
    """Every condition of a claim, then what is shown beside them."""
    return [*map(condition_line, claim.conditions), *map(figure_line, claim.shown)]


def claim_target(claim: Claim) -> str:
    """What the claim's first figure is judged against."""
    if claim.conditions:
        return wanted(claim.conditions[0])
    if claim.target is None:
        return ""
    return f"{'≥' if claim.direction == 'at least' else '≤'}\u00a0{short(claim.target, claim.unit)}"


def verdict_line(claims: list[Claim]) -> str:
    """``7 of 8 claims hold in this run, 1 not judged`` of a list of claims."""
    outcomes = [claim.outcome for claim in claims]
    good, bad, open_ = (outcomes.count(name) for name in ("holds", "fails", "open"))
    scope = "" if all(claim.seeds for claim in claims) else " in this run"
    parts = [f"{good} of {good + bad} claims {'holds' if good == 1 else 'hold'}{scope}"]
    if open_:
        parts.append(f"{open_} not judged")
    return ", ".join(parts)


def slug(text: str, used: set[str]) -> str:
    """A unique lower-case name for anchors and files, added to ``used``."""
    base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
    name, count = base, 1
    while name in used:
        count += 1
        name = f"{base}-{count}"
    used.add(name)
    return name


def prose_html(text: str) -> str:
    """Paragraphs and "- " lists as HTML; everything escaped, then ``code`` and **bold** drawn."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if lines and all(line.startswith("- ") for line in lines):
            blocks.append("<ul>" + "".join(f"<li>{inline_html(line[2:])}</li>" for line in lines) + "</ul>")
        elif lines:
            blocks.append(f"<p>{inline_html(' '.join(lines))}</p>")
    return "\n".join(blocks)


def inline_html(text: str) -> str:
    """One line of text with ``code`` and **bold** drawn and all else escaped."""
    parts = re.split(r"`([^`]+)`", text)
    drawn = []
    for index, part in enumerate(parts):
        escaped = html.escape(part)
        drawn.append(f"<code>{escaped}</code>" if index % 2 else re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped))
    return "".join(drawn)


def inline_markdown(text: str) -> str:
    """One line of text for Markdown: HTML is made harmless outside ``code``."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if index % 2 else _plain(part) for index, part in enumerate(parts))


def prose_markdown(text: str) -> str:
    """Paragraphs and lists for Markdown."""
    return "\n\n".join(
        "\n".join(inline_markdown(line) for line in block.splitlines() if line.strip())
        for block in re.split(r"\n\s*\n", text.strip())
    )


def cell_markdown(text: str) -> str:
    """Text inside a Markdown table cell: one line, no cell borders of its own."""
    return inline_markdown(text).replace("|", "\\|")


def fence(text: str) -> str:
    """A code block that the text cannot leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}text\n{text}\n{mark}"


def _plain(text: str) -> str:
    return re.sub(r"([\\_\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
