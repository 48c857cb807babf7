from __future__ import annotations

import re

from twofold.report.markdown import plot_files, render_markdown
from twofold.report.model import Report


def test_the_document_shows_everything(report: Report) -> None:
    text = render_markdown(report)
    for words in (
        "# Twofold tiny",
        "| holds in this run |",
        "| does not hold in this run |",
        "| not judged |",
        "1.72\u00a0M",
        "## Data card",
    ):
        assert words in text
    assert report.command in text and "E0+1=1 B1+5=6" in text
    assert not set("✅❌✓✗") & set(text), "no mark that could stand for the claim itself"
    assert "met: RL minus more SFT: 4.20 points [1.00, 7.40]; wanted: lower end above 0 points<br>" in text.replace(
        "\u00a0", " "
    ).replace("\\", "")
    assert "shown: pass@8: 81.0 % (of eight)" in text.replace("\u00a0", " ")
    assert "Read these with care." in text
    for section in report.sections:
        assert f"## {section.title}" in text


def test_tables_keep_their_columns_and_html_is_harmless(report: Report) -> None:
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", render_markdown(report), flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    width = None
    for line in outside.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells), line
        width = cells


def test_plots_are_referred_to_by_the_files_written(report: Report) -> None:
    names = list(plot_files(report))
    assert names == ["loss.svg", "bits-per-byte-by-position.svg", "budget-curve.svg", "strong-to-weak.svg"]
    assert re.findall(r"\(plots/([^)]+)\)", render_markdown(report)) == names
