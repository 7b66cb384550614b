"""The charts of a report, as SVG that stands inside an HTML page.

Matplotlib draws them. Its colours are replaced by CSS variables, so that a chart follows the page's light or dark
scheme; text stays text, in the font of the page; and every id begins with the name of its chart, so that those of
several charts in one page do not meet. The same figures give the same bytes.
"""

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from loratune.evaluation.page_text import LONGEST_TEXT, label

INK, FAINT, GRID, WARNING = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010105", "#010106")
"""Colours that matplotlib draws with, and that `_VARIABLES` stand for in the page."""
_VARIABLES = {
    INK: "--ink", FAINT: "--faint", GRID: "--grid", WARNING: "--warning", SERIES[0]: "--first", SERIES[1]: "--second",
}  # fmt: skip
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": GRID, "axes.labelcolor": FAINT, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": GRID, "xtick.labelcolor": FAINT, "ytick.color": GRID, "ytick.labelcolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.size": 3.0, "ytick.major.size": 0.0, "ytick.minor.size": 0.0, "xtick.minor.size": 0.0,
    "axes.linewidth": 0.8, "lines.linewidth": 1.6, "lines.solid_joinstyle": "round", "axes.unicode_minus": True,
    "path.simplify": True, "path.simplify_threshold": 0.3, "text.parse_math": False,
}  # fmt: skip
WIDE, NARROW, HALF = (9.6, 2.9), (3.6, 2.4), (4.2, 2.2)
"""Sizes in inches: across a desktop page; across a phone, and a third of a desktop page; half of it."""
_WIDE_FONT, _FONT = 8.0, 9.0
"""Font sizes in points: a page shows a wide chart about 1.5 times as large, and others 1.3 times."""
_SMOOTHED = 80
"""Points from which on a noisy line is drawn faint, below its moving average."""
_MOST_BINS = 32
_MOST_TICKS = 8
"""Values of a setting up to which each is written below its points."""
_LONGEST_TICK, _LONGEST_NAME = 24, 32
"""Characters of the value of a setting below its points, and of the name of a row or column."""
_STEPS = [1, 2, 2.5, 5, 10]
"""Distances of the ticks of an axis, times powers of ten."""
_LOG_RATIO = 12
"""The ratio of the largest value to the smallest from which on an axis is logarithmic."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        x: Where its points are.
        y: Their values.
        series: Which adapter it is of: 0, or 1 for the other one.
        marked: Whether its points are marked and joined by dashes, as held-out losses are, or it is plain.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    marked: bool = False


def line_chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    size: tuple[float, float] = NARROW,
    *,
    smooth: bool = False,
    log: bool = True,
) -> str:
    """Lines over steps.

    Args:
        name: What the chart's ids begin with; unique in the page.
        title: What it shows, for those who cannot see it.
        lines: What is drawn.
        size: Width and height in inches.
        smooth: Whether plain lines of many points get a moving average.
        log: Whether the axis of the values may be logarithmic.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            colour = SERIES[line.series]
            if line.marked:
                axes.plot(line.x, line.y, "o--", color=colour, markersize=4.0, linewidth=1.2, zorder=4)
                continue
            long = smooth and len(line.x) >= _SMOOTHED
            alone: dict[str, Any] = {"marker": "o", "markersize": 4.0} if len(line.x) == 1 else {}
            axes.plot(line.x, line.y, color=colour, alpha=0.3 if long else 1.0, linewidth=1.0 if long else 1.6, **alone)
            if long:
                axes.plot(line.x, _moving_average(line.y), color=colour, linewidth=1.8, zorder=3)
        values = [value for line in lines for value in line.y]
        if log and min(values) > 0 and max(values) > _LOG_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_log_locator(min(values), max(values)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_major_locator(MaxNLocator(10 if size == WIDE else 5, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("step")
        axes.margins(x=0.02)

    return _svg(name, title, draw, size)


def histogram(name: str, title: str, lengths: Mapping[int, int], max_length: int | None, series: int = 0) -> str:
    """How many rows have which length in tokens.

    Args:
        name: What the chart's ids begin with.
        title: What it shows.
        lengths: Length → rows.
        max_length: Where rows were cut; None if that is not known.
        series: Which adapter it is of.
    """
    values = np.array(sorted(lengths), dtype=np.float64)
    weights = np.array([lengths[int(value)] for value in values], dtype=np.float64)

    def draw(axes: Axes) -> None:
        shortest, longest = max(float(values.min()), 1.0), float(values.max())
        median = values[np.searchsorted(weights.cumsum(), weights.sum() / 2)]
        scattered = longest > _LOG_RATIO * max(median, 1.0)
        if scattered:
            bins = np.geomspace(shortest, longest + 1, _MOST_BINS + 1)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(_log_locator(shortest, longest))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            width = max(1, math.ceil((longest + 1 - shortest) / _MOST_BINS))
            bins = np.arange(shortest, longest + 1 + width, width) - 0.5
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.hist(values, bins=bins.tolist(), weights=weights, color=SERIES[series], rwidth=0.86)
        if max_length is not None and max_length < longest:
            left = max_length < (math.sqrt(shortest * longest) if scattered else (shortest + longest) / 2)
            axes.axvline(max_length, color=WARNING, linewidth=1.4, linestyle="--")
            axes.margins(y=0.18)  # the label stands above the bars
            axes.annotate(
                f"cut at {max_length:,}", (max_length, 1.0), xycoords=("data", "axes fraction"), color=WARNING,
                xytext=(4 if left else -4, 0), textcoords="offset points", va="top", ha="left" if left else "right",
            )  # fmt: skip
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("tokens in a row, before it is cut")

    return _svg(name, title, draw, HALF)


def heat_map(
    name: str,
    title: str,
    cells: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    bounds: tuple[float, float],
    labels: tuple[str, str],
) -> str:
    """A table of values as colours, with the scale beside it.

    Args:
        name: What the chart's ids begin with.
        title: What it shows.
        cells: Values by row and column; None where there is none.
        rows: The name of each row.
        columns: The name of each column.
        bounds: The values of the two ends of the scale.
        labels: What the columns are, and what the values are.
    """
    table = np.ma.masked_invalid(
        np.array([[math.nan if cell is None else cell for cell in row] for row in cells], dtype=np.float64)
    )
    # A column is as wide as its name where these are words; numbers of layers are thinned.
    numbered = all(column.isdecimal() for column in columns)
    rows, columns = ([label(one, _LONGEST_NAME) for one in names] for names in (rows, columns))
    longest, longest_column = (max(map(len, names)) for names in (rows, columns))
    widest = max(longest, longest_column - 8)
    width = WIDE[0] if numbered else min(WIDE[0] - 0.1, max(3.4, 1.4 + 0.075 * widest + 0.38 * len(columns)))
    height = 0.75 + max(0.21 * len(rows), 0.4) + (0 if numbered else max(0.6, 0.045 * longest_column))

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.spines[:].set_visible(False)
        low, high = bounds if bounds[0] < bounds[1] else (bounds[0] - 0.5, bounds[0] + 0.5)
        mesh = axes.pcolormesh(table, cmap="viridis", norm=Normalize(low, high), edgecolors="none", antialiased=False)
        axes.invert_yaxis()
        step = max(1, math.ceil(len(columns) / 24)) if numbered else 1
        ticks = range(0, len(columns), step)
        rotation: dict[str, Any] = {} if numbered else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks([tick + 0.5 for tick in ticks], [columns[tick] for tick in ticks], **rotation)
        step = max(1, math.ceil(len(rows) / 64))
        ticks = range(0, len(rows), step)
        axes.set_yticks([tick + 0.5 for tick in ticks], [rows[tick] for tick in ticks])
        axes.tick_params(length=0)
        axes.set_xlabel(label(labels[0]))
        bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03, aspect=max(6.0, min(25.0, 9 * height)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4 if height < 2.5 else 6))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        bar.set_label(label(labels[1]))

    return _svg(name, title, draw, (width, height))


@dataclass(frozen=True)
class Point:
    """A measured value. interval: its 95 % interval, if there is one; series: as of a `Line`."""

    x: str
    y: float
    interval: tuple[float, float] | None
    series: int = 0


def point_chart(name: str, title: str, points: Sequence[Point], setting: str, order: Sequence[str]) -> str:
    """Measured values, with their intervals, by a setting.

    Args:
        name: What the chart's ids begin with.
        title: What it shows.
        points: What is drawn.
        setting: What the setting is called.
        order: The values of the setting, from left to right, where they are no numbers.
    """
    numbers = [_number(point.x) for point in points]
    known = [number for number in numbers if number is not None]
    are_numbers = len(known) == len(points)
    numbered = {value: float(number) for number, value in enumerate(order)}
    places = known if are_numbers else [numbered[point.x] for point in points]

    def draw(axes: Axes) -> None:
        for series in sorted({point.series for point in points}):
            own = [(place, point) for point, place in zip(points, places, strict=True) if point.series == series]
            ends = [point.interval or (point.y, point.y) for _, point in own]
            below = [max(0.0, point.y - low) for (_, point), (low, _) in zip(own, ends, strict=True)]
            above = [max(0.0, high - point.y) for (_, point), (_, high) in zip(own, ends, strict=True)]
            axes.errorbar(
                [place for place, _ in own], [point.y for _, point in own], yerr=[below, above], fmt="o",
                color=SERIES[series], markersize=5.0, elinewidth=1.2, capsize=2.5, zorder=3 + series,
            )  # fmt: skip
        if are_numbers and min(places) > 0 and max(places) > _LOG_RATIO / 4 * min(places):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len({*places}) <= _MOST_TICKS:
            texts = {place: label(point.x, _LONGEST_TICK) for point, place in zip(points, places, strict=True)}
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([*sorted(texts)], [texts[place] for place in sorted(texts)])
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_xlabel(label(setting))
        axes.margins(x=0.12, y=0.1)

    return _svg(name, title, draw, HALF)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def short(value: float) -> str:
    """A number in few characters: `0.0123`, `1.5`, `2.1k`, `1e-06`."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e4:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:,.4g}" if abs(value) >= 1e3 else f"{value:.3g}"


def _log_locator(low: float, high: float) -> LogLocator:
    """Ticks of a logarithmic axis, the fewer in a decade the more of these there are."""
    decades = math.log10(high / low)
    return LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 3 else (1.0,), numticks=12)


def _moving_average(values: Sequence[float]) -> NDArray[np.float64]:
    """Means over a fortieth of the points around each; at the ends, over those there are."""
    width = max(3, len(values) // 40) | 1
    kernel = np.ones(width)
    sums = np.convolve(np.asarray(values, dtype=np.float64), kernel, mode="same")
    means: NDArray[np.float64] = sums / np.convolve(np.ones(len(values)), kernel, mode="same")
    return means


def _svg(name: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    font = _WIDE_FONT if size[0] == WIDE[0] else _FONT
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name, "font.size": font}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(stream.getvalue(), name, title)


def _for_page(text: str, name: str, title: str) -> str:
    """What matplotlib wrote, as an element of an HTML page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # would be that of the whole page
    view_box = re.search(r'viewBox="([^"]*)"', text)
    assert view_box is not None
    width = view_box[1].split()[2]
    shown = html.escape(label(title, LONGEST_TEXT))
    head = f'<svg class="chart" role="img" aria-label="{shown}" viewBox="{view_box[1]}" style="--width: {width}px">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text).strip()
