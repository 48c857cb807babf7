from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from twofold.report.model import Claim, Heatmap, Plot, Report, Series, Table


def test_verdicts() -> None:
    claim = {"name": "x", "statement": "y"}
    assert Claim(**claim, holds=True).verdict == "holds"
    assert Claim(**claim, holds=False).verdict == "does not hold"
    assert Claim(**claim, holds=True, judged=False).verdict == "not judged"


def test_shapes_are_checked() -> None:
    with pytest.raises(ValidationError, match="2 x values but 1 y"):
        Series(name="s", x=[1, 2], y=[1])
    with pytest.raises(ValidationError, match="come together"):
        Series(name="s", x=[1], y=[1], low=[0])
    with pytest.raises(ValidationError, match="row 1 has 1 of 2"):
        Table(title="t", columns=["a", "b"], rows=[[1, 2], [1]])
    with pytest.raises(ValidationError, match="do not fit"):
        Heatmap(title="h", row_labels=["r"], column_labels=["a", "b"], values=[[1.0]])
    with pytest.raises(ValidationError, match="colour"):
        Plot(title="t", x_label="", y_label="", series=[], colour="red")  # type: ignore[call-arg]


def test_json_round_trip_keeps_nan_and_infinity(report: Report) -> None:
    again = Report.model_validate_json(report.model_dump_json())
    assert again.model_dump_json() == report.model_dump_json()
    series = Series(name="s", x=[1, 2], y=[math.nan, math.inf])
    back = Series.model_validate_json(series.model_dump_json())
    assert math.isnan(back.y[0]) and back.y[1] == math.inf


def test_heatmap_range_ignores_what_is_not_finite() -> None:
    heatmap = Heatmap(title="h", row_labels=["r"], column_labels=["a", "b", "c"], values=[[math.nan, 2, 5]])
    assert heatmap.finite_range == (2, 5)
    assert Heatmap(title="h", row_labels=[], column_labels=[], values=[]).finite_range == (0, 0)
