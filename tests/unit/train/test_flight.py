"""A flight record says what is known, and never gets in the way of the error."""

from __future__ import annotations

from pathlib import Path

from twofold.base.batch import pack
from twofold.base.files import read_json
from twofold.train import flight


def test_the_record_has_the_last_rows_and_the_trace(tmp_path: Path) -> None:
    rows = [{"step": step} for step in range(50)]
    try:
        raise ValueError("ends here")
    except ValueError as error:
        flight.record(tmp_path / "flight.json", error, {"step": 50}, rows, [pack([[1, 2, 3]], sources=[4])])
        assert error.__notes__ == [f"what is known about it: {tmp_path / 'flight.json'}"]
    written = read_json(tmp_path / "flight.json")
    assert written["error"] == "ValueError: ends here" and "raise ValueError" in "".join(written["traceback"])
    assert written["metrics"] == rows[-flight.LAST_ROWS :] and written["step"] == 50
    assert written["batches"] == [{"tokens": 2, "sequences": 1, "weight": 2.0, "sources": [4]}]


def test_a_record_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, facts in ((tmp_path / "file" / "flight.json", {}), (tmp_path / "flight.json", {"odd": object()})):
        error = ValueError("ends here")
        flight.record(path, error, facts, [], [])
        assert len(error.__notes__) == 1 and "could not be written" in error.__notes__[0]
