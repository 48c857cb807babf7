"""Writes a report to a folder: ``report.html``, ``report.md`` with ``plots/*.svg``, and ``report.json``.

Each file is whole or absent. ``read_report`` gives the report back from its JSON.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from twofold.base.files import write_text
from twofold.base.records import InputError
from twofold.report.html import render_html
from twofold.report.markdown import PLOT_FOLDER, plot_files, render_markdown
from twofold.report.model import Report
from twofold.report.plots import standalone_svg


def write_report(report: Report, folder: Path) -> None:
    """Write all forms of a report below ``folder``, replacing earlier ones."""
    for name, plot in plot_files(report).items():
        write_text(folder / PLOT_FOLDER / name, standalone_svg(plot))
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report))


def read_report(path: Path) -> Report:
    """The report in a ``report.json``.

    Raises:
        InputError: not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is not a report of this version ({where}: {first['msg']})") from None
