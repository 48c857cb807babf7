"""The report as data: everything a page shows, with nothing of how it looks.

Stages fill these models; ``html`` and ``markdown`` draw them; ``report.json`` is their dump, to be read by machines.
Numbers are shown as they are given: a claim with unit "%" holds percents, not shares.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ReportModel(BaseModel):
    """Base of every part: no unknown fields, immutable; nan and infinity survive the JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


# How a condition is judged: on the lower end ("above", "at least"), on the upper end ("at most"), on the estimate
# ("level": at least the target), or as a yes or no ("exact": 1 or 0). A missing end is replaced by the estimate.
Sense = Literal["above", "at least", "at most", "level", "exact"]


class Figure(ReportModel):
    """A number that a claim shows. name: a short stable key. detail: what the number alone does not say."""

    name: str
    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    detail: str = ""


class Condition(Figure):
    """A number that a claim is judged on; without a value the run lacks what it needs, and it is not met."""

    target: float
    sense: Sense
    met: bool = False


class Claim(ReportModel):
    """One effect the run is expected to show, with what was measured.

    value, low, high, target, direction: those of the first condition, where there are conditions. direction: which side
    of the target is wanted. judged: False when the run lacks an arm the claim needs, or when its arms were not equal;
    then ``holds`` means nothing. seeds: the training seeds that the intervals are over; empty for a single run, whose
    verdict is about that run alone.
    """

    name: str
    statement: str
    key: str = ""
    question: str = ""
    conditions: list[Condition] = Field(default_factory=list)
    shown: list[Figure] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=list)
    value: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    direction: Literal["at least", "at most"] = "at least"
    unit: str = ""
    holds: bool = False
    judged: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """``holds in this run``, ``does not hold in this run``, ``not judged``; over several seeds without the run."""
        if not self.judged:
            return "not judged"
        scope = "" if self.seeds else " in this run"
        return f"holds{scope}" if self.holds else f"does not hold{scope}"

    @property
    def outcome(self) -> Literal["holds", "fails", "open"]:
        """The verdict as a word for style and counting."""
        return ("holds" if self.holds else "fails") if self.judged else "open"


class Series(ReportModel):
    """One line or one colour of bars; ``low`` and ``high`` draw an error band or error bars. nan leaves a gap."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        for name, values in (("y", self.y), ("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(self.x)} x values but {len(values)} {name} values")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: low and high come together")
        return self


class Plot(ReportModel):
    """A line or bar plot. x_names: labels of the places 0, 1, … on the x axis (bars, or lines over named points)."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    note: str = ""
    log_x: bool = False
    kind: Literal["line", "bar"] = "line"
    x_names: list[str] | None = None
    y_min: float | None = None
    y_max: float | None = None


class Heatmap(ReportModel):
    """A grid of values, one row a label; drawn on one scale from the smallest to the largest."""

    title: str
    row_labels: list[str]
    column_labels: list[str]
    values: list[list[float]]
    note: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        wanted = (len(self.row_labels), {len(self.column_labels)} if self.row_labels else set())
        if (len(self.values), {len(row) for row in self.values}) != wanted:
            raise ValueError(f"heatmap {self.title!r}: values do not fit {len(self.row_labels)} row labels")
        return self

    @property
    def finite_range(self) -> tuple[float, float]:
        finite = [value for row in self.values for value in row if math.isfinite(value)]
        return (min(finite), max(finite)) if finite else (0.0, 0.0)


Cell = str | int | float | bool | None


class Table(ReportModel):
    """A table; numbers are aligned right and formatted, text is shown as it is."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: row {index} has {len(row)} of {len(self.columns)} cells")
        return self


class Sample(ReportModel):
    """One answer of a model. mode: "thinking", "not thinking", … ; correct None: not a question of right or wrong."""

    title: str
    mode: str
    prompt: str
    answer: str
    reasoning: str | None = None
    correct: bool | None = None
    note: str = ""


class Section(ReportModel):
    """A chapter. text: paragraphs parted by blank lines; ``code``, **bold** and "- " lists are drawn."""

    title: str
    text: str = ""
    plots: list[Plot] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    heatmaps: list[Heatmap] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)


class StageCost(ReportModel):
    """What one stage took. tokens: trained on and generated. tflops: 10^12 floating-point operations in all."""

    name: str
    title: str
    seconds: float
    tokens: int | None = None
    tflops: float | None = None
    note: str = ""


class Report(ReportModel):
    """A whole report. command: what reproduces the run, exactly. created: ISO 8601. claims_note: how to read them."""

    title: str
    command: str
    seed: int
    versions: dict[str, str]
    hardware: str
    created: str
    intro: str = ""
    claims: list[Claim] = Field(default_factory=list)
    claims_note: str = ""
    stages: list[StageCost] = Field(default_factory=list)
    sections: list[Section] = Field(default_factory=list)
    data_card: Section | None = None
    peak_memory_bytes: int | None = None
    total_seconds: float | None = None
