from __future__ import annotations

from pathlib import Path

import pytest

from twofold.base.records import InputError
from twofold.report.model import Report
from twofold.report.write import read_report, write_report


def test_all_forms_are_written_and_the_json_reads_back(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report")
    names = {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")}
    assert {"report.html", "report.md", "report.json", "plots/loss.svg"} <= names and len(names) == 7
    assert read_report(tmp_path / "report" / "report.json").model_dump_json() == report.model_dump_json()
    before = (tmp_path / "report" / "report.html").read_bytes()
    write_report(report, tmp_path / "report")
    assert (tmp_path / "report" / "report.html").read_bytes() == before


def test_a_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"title": "x"}')
    with pytest.raises(InputError, match="not a report of this version"):
        read_report(path)
