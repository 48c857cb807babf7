"""Plots as SVG text with matplotlib: real text, colours that follow the page, a palette safe for colour blindness.

``plot_svg`` gives markup for use inside a page: its colours are CSS variables with the light theme as fallback.
``standalone_svg`` gives a file with fixed colours on white. Nothing is shown on screen and no global state is kept.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from twofold.base.config import digest
from twofold.report.model import Plot, Series
from twofold.report.text import amount

# Drawn with stand-ins, which are replaced by CSS variables or by the light theme's colours.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = [f"#0102{index:02x}" for index in range(0x10, 0x18)]
LIGHT = {
    INK: ("--ink", "#1c2024"),
    MUTED: ("--muted", "#5f6770"),
    GRID: ("--line", "#e3e6ea"),
    # Okabe and Ito's palette, its yellow last and its black left out
    SERIES[0]: ("--c1", "#0072b2"),
    SERIES[1]: ("--c2", "#d55e00"),
    SERIES[2]: ("--c3", "#009e73"),
    SERIES[3]: ("--c4", "#b2558f"),
    SERIES[4]: ("--c5", "#d18f00"),
    SERIES[5]: ("--c6", "#3d9bd6"),
    SERIES[6]: ("--c7", "#7a6f5d"),
    SERIES[7]: ("--c8", "#8a84d6"),
}
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
MAX_POINTS = 800
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": True,
}


def plot_svg(plot: Plot) -> str:
    """The plot as an ``<svg>`` element for an HTML page; ids are unique to the plot."""
    svg = _recolour(_draw(plot), lambda name, colour: f"var({name}, {colour})")
    return re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page


def standalone_svg(plot: Plot) -> str:
    """The plot as an SVG file in the light theme on white."""
    svg = _recolour(_draw(plot), lambda name, colour: colour)
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


def _draw(plot: Plot) -> str:
    salt = digest(plot.model_dump(mode="json"))
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing from the measuring font; the browser has its own
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        (_bars if plot.kind == "bar" else _lines)(axes, plot)
        _dress(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _clean(buffer.getvalue(), plot.title, salt)


def _lines(axes: Axes, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        colour = SERIES[index % len(SERIES)]
        points = _thin(series)
        few = len(points.x) <= 24
        axes.plot(
            points.x,
            points.y,
            color=colour,
            linewidth=2.0,
            marker=MARKERS[index % len(MARKERS)] if few else "",
            markersize=5,
            solid_capstyle="round",
            label=series.name,
        )
        if points.low is not None and points.high is not None:
            axes.fill_between(points.x, points.low, points.high, color=colour, alpha=0.16, linewidth=0)


def _bars(axes: Axes, plot: Plot) -> None:
    width = 0.8 / max(1, len(plot.series))
    for index, series in enumerate(plot.series):
        colour = SERIES[index % len(SERIES)]
        places = [x + (index - (len(plot.series) - 1) / 2) * width for x in series.x]
        axes.bar(places, _finite(series.y), width * 0.92, color=colour, label=series.name, linewidth=0)
        if series.low is not None and series.high is not None:
            lower = [max(0.0, y - low) for y, low in zip(_finite(series.y), _finite(series.low), strict=True)]
            upper = [max(0.0, high - y) for y, high in zip(_finite(series.y), _finite(series.high), strict=True)]
            axes.errorbar(
                places, _finite(series.y), yerr=[lower, upper], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3
            )
    axes.margins(x=0.04)


def _dress(axes: Axes, plot: Plot) -> None:
    if plot.log_x:
        axes.set_xscale("log", base=2)
        values = sorted({x for series in plot.series for x in series.x if x > 0})
        axes.xaxis.set_major_locator(FixedLocator(values if len(values) <= 12 else values[:: len(values) // 8]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if plot.x_names is not None:
        axes.set_xticks(range(len(plot.x_names)), plot.x_names)
    axes.set_ylim(bottom=plot.y_min, top=plot.y_max)
    axes.set_xlabel(plot.x_label, color=MUTED)
    axes.set_ylabel(plot.y_label, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if len(plot.series) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=min(3, len(plot.series)),
            frameon=False,
            labelcolor=INK,
            handlelength=1.4,
            borderaxespad=0.2,
            columnspacing=1.6,
        )


def _thin(series: Series) -> Series:
    """At most MAX_POINTS evenly spaced points, the last always among them."""
    count = len(series.x)
    stride = math.ceil(count / MAX_POINTS) if count > MAX_POINTS else 1
    keep = sorted({*range(0, count, stride), count - 1}) if count else []

    def pick(values: list[float]) -> list[float]:
        return _finite([values[index] for index in keep])

    return Series(
        name=series.name,
        x=pick(series.x),
        y=pick(series.y),
        low=None if series.low is None else pick(series.low),
        high=None if series.high is None else pick(series.high),
    )


def _finite(values: list[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _tick(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) >= 10_000:
        return amount(value)
    return f"{value:.6g}".replace("-", "\u2212")


def _clean(svg: str, title: str, salt: str) -> str:
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="p{salt}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>p{salt}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def _recolour(svg: str, colour_of: Callable[[str, str], str]) -> str:
    for stand_in, (name, colour) in LIGHT.items():
        svg = svg.replace(stand_in, colour_of(name, colour))
    return svg
