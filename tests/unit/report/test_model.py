from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from twofold.report.model import Claim, Condition, Figure, Heatmap, Plot, Report, Series, Table


def test_verdicts() -> None:
    claim = {"name": "x", "statement": "y"}
    assert Claim(**claim, holds=True).verdict == "holds in this run"
    assert Claim(**claim, holds=False).verdict == "does not hold in this run"
    assert Claim(**claim, holds=True, judged=False).verdict == "not judged"
    assert Claim(**claim, holds=True, seeds=[3, 4]).verdict == "holds"
    assert Claim(**claim, holds=False, seeds=[3, 4]).verdict == "does not hold"
    outcomes = [Claim(**claim, holds=holds, judged=judged).outcome for holds, judged in ((1, 1), (0, 1), (1, 0))]
    assert outcomes == ["holds", "fails", "open"]


def test_a_claim_with_conditions_survives_json() -> None:
    condition = Condition(name="a", text="b", value=1.5, low=1.0, target=0, sense="above", met=True, unit="points")
    figure = Figure(name="c", text="d", detail="e")
    claim = Claim(name="x", statement="y", key="k", question="q?", conditions=[condition], shown=[figure], seeds=[3])
    assert Claim.model_validate_json(claim.model_dump_json()) == claim
    with pytest.raises(ValidationError, match="sense"):
        Condition(name="a", text="b", target=0, sense="below")  # type: ignore[arg-type]


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
