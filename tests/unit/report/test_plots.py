from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from twofold.report.model import Plot, Report, Series
from twofold.report.plots import LIGHT, MAX_POINTS, plot_svg, standalone_svg


def plots(report: Report) -> list[Plot]:
    return [plot for section in report.sections for plot in section.plots]


def test_every_kind_is_valid_xml_with_real_text(report: Report) -> None:
    for plot in plots(report):
        for svg in (plot_svg(plot), standalone_svg(plot)):
            root = ElementTree.fromstring(svg)
            words = " ".join(text for text in root.itertext() if text.strip())
            assert plot.y_label in words and plot.series[0].name in words
            assert not any(stand_in in svg for stand_in in LIGHT)
    assert all(name in standalone_svg(plots(report)[3]) for name in ("off-policy SFT", "RL 180 s"))


def test_page_plots_follow_the_page_and_files_do_not(report: Report) -> None:
    plot = plots(report)[0]
    assert "var(--c1, #0072b2)" in plot_svg(plot) and "<style" not in plot_svg(plot)
    assert "var(" not in standalone_svg(plot) and 'fill="#ffffff"' in standalone_svg(plot)


def test_drawing_is_deterministic_and_ids_differ_between_plots(report: Report) -> None:
    first, second = plots(report)[:2]
    assert plot_svg(first) == plot_svg(first)
    ids = [set(re.findall(r'\bid="([^"]+)"', plot_svg(plot))) for plot in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    svg = plot_svg(first)
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', svg))
    assert used <= ids[0]


@pytest.mark.parametrize("kind", ["line", "bar"])
def test_odd_data_is_drawn(kind: str) -> None:
    hostile = '<b>$x$ & "y"</b>'
    series = [
        Series(name="_hidden", x=[], y=[]),
        Series(name=hostile, x=[0, 1, 2], y=[math.nan, math.inf, 1], low=[0, math.nan, 0], high=[1, 2, 3]),
    ]
    plot = Plot(title=hostile, x_label=hostile, y_label="预训练", series=series, kind=kind)  # type: ignore[arg-type]
    root = ElementTree.fromstring(plot_svg(plot))
    assert hostile in " ".join(root.itertext())
    assert root.attrib["aria-label"] == hostile
    ElementTree.fromstring(plot_svg(Plot(title="", x_label="", y_label="", series=[], kind=kind)))  # type: ignore[arg-type]


def test_long_curves_are_thinned_but_keep_their_last_point() -> None:
    count = 20 * MAX_POINTS
    xs = [float(x) for x in range(count)]
    curve = Plot(title="t", x_label="", y_label="", series=[Series(name="s", x=xs, y=[math.sin(x) for x in xs])])
    assert len(plot_svg(curve)) < 80_000
