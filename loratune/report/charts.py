"""The charts of a report, as SVG inside an HTML page.

Matplotlib draws them. Its colours are replaced by CSS variables, so that a chart follows the page's light or dark
scheme; text stays text, in the font of the page; and every id starts with the name of its chart, which keeps the ids of
a page unique. The same values give the same bytes.
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

from loratune.text import one_line

LONGEST_TEXT, LONGEST_LABEL = 2_000, 60
"""Characters of a text, and of a label, that are shown."""
_FAINT, _GRID, _WARNING = "#010102", "#010103", "#010104"
_SERIES = ("#010105", "#010106")
_VARIABLES = {
    "#010101": "--ink", _FAINT: "--faint", _GRID: "--grid", _WARNING: "--warning",
    _SERIES[0]: "--first", _SERIES[1]: "--second",
}  # fmt: skip
"""Colours that matplotlib draws with → the CSS variables that replace them."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": _GRID, "axes.labelcolor": _FAINT, "text.color": "#010101",
    "xtick.color": _GRID, "xtick.labelcolor": _FAINT, "ytick.color": _GRID, "ytick.labelcolor": _FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.size": 3.0, "ytick.major.size": 0.0, "ytick.minor.size": 0.0, "xtick.minor.size": 0.0,
    "lines.linewidth": 1.6, "lines.markersize": 4.0, "path.simplify_threshold": 0.3, "text.parse_math": False,
}  # fmt: skip
WIDE, NARROW, _HALF = (9.6, 2.9), (3.6, 2.4), (4.2, 2.2)
"""Sizes in inches: across a desktop page; across a phone, or a third of a desktop page; half of it."""
_SMOOTHED = 80
"""From this number of points on, a noisy line is drawn faint, with its moving average."""
_MOST_BINS, _MOST_TICKS = 32, 8
_LONGEST_TICK, _LONGEST_NAME = 24, 32
_STEPS = [1, 2, 2.5, 5, 10]
"""Distances of the ticks of an axis, times powers of ten."""
_LOG_RATIO = 12
"""If the ratio of the largest to the smallest value exceeds this, an axis is logarithmic."""
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_SHORT = FuncFormatter(lambda value, _: _short(value))


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        x: Where its points are.
        y: Their values.
        series: The adapter it belongs to: 0, or 1 for the other one.
        marked: Whether its points are marked and joined by dashes, as held-out losses are.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    marked: bool = False


def line_chart(
    name: str, title: str, lines: Sequence[Line], size: tuple[float, float] = NARROW, *, log: bool = True
) -> str:
    """Lines over steps.

    Args:
        name: The start of the chart's ids; unique in the page.
        title: What it shows, for screen readers.
        lines: What is drawn.
        size: Width and height in inches.
        log: Whether the values are noisy: they may have a logarithmic axis, and long lines get a moving average.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            style: dict[str, Any] = {"color": _SERIES[line.series]}
            if line.marked:
                axes.plot(line.x, line.y, "o--", linewidth=1.2, zorder=4, **style)
            elif log and len(line.x) >= _SMOOTHED:
                axes.plot(line.x, line.y, alpha=0.3, linewidth=1.0, **style)
                axes.plot(line.x, _moving_average(line.y), linewidth=1.8, zorder=3, **style)
            else:
                axes.plot(line.x, line.y, "o" if len(line.x) == 1 else "-", **style)
        values = [value for line in lines for value in line.y]
        if log and min(values) > 0 and max(values) > _LOG_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_log_locator(min(values), max(values)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(_SHORT)
        axes.xaxis.set_major_locator(MaxNLocator(10 if size == WIDE else 5, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(_THOUSANDS)
        axes.set_xlabel("step")
        axes.margins(x=0.02)

    return _svg(name, title, draw, size)


def histogram(name: str, title: str, lengths: Mapping[int, int], max_length: int | None, series: int = 0) -> str:
    """A histogram of row lengths in tokens.

    Args:
        name: The start of the chart's ids.
        title: What it shows.
        lengths: Length → rows.
        max_length: Where rows were cut, if that is known.
        series: The adapter it belongs to.
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
        axes.hist(values, bins=bins.tolist(), weights=weights, color=_SERIES[series], rwidth=0.86)
        if max_length is not None and max_length < longest:
            left = max_length < (math.sqrt(shortest * longest) if scattered else (shortest + longest) / 2)
            axes.axvline(max_length, color=_WARNING, linewidth=1.4, linestyle="--")
            axes.margins(y=0.18)  # room for the label above the bars
            axes.annotate(
                f"cut at {max_length:,}", (max_length, 1.0), xycoords=("data", "axes fraction"), color=_WARNING,
                xytext=(4 if left else -4, 0), textcoords="offset points", va="top", ha="left" if left else "right",
            )  # fmt: skip
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_THOUSANDS)
        axes.set_xlabel("tokens in a row, before it is cut")

    return _svg(name, title, draw, _HALF)


def heat_map(
    name: str,
    title: str,
    cells: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    lowest: float,
    labels: tuple[str, str],
) -> str:
    """A table of values as colours, with their scale.

    Args:
        name: The start of the chart's ids.
        title: What it shows.
        cells: Values by row and column; None for a gap.
        rows: The name of each row.
        columns: The name of each column.
        lowest: The value of the lower end of the scale.
        labels: What the columns are, and what the values are.
    """
    table = np.ma.masked_invalid(np.array(cells, dtype=np.float64))  # None becomes NaN
    # A column is as wide as its name if these are words; numbers of layers are thinned.
    numbered = all(column.isdecimal() for column in columns)
    rows, columns = ([label(one, _LONGEST_NAME) for one in names] for names in (rows, columns))
    longest, longest_column = (max(map(len, names)) for names in (rows, columns))
    width = 1.4 + 0.075 * max(longest, longest_column - 8) + 0.38 * len(columns)
    width = WIDE[0] if numbered else min(WIDE[0] - 0.1, max(3.4, width))
    height = 0.75 + max(0.21 * len(rows), 0.4) + (0 if numbered else max(0.6, 0.045 * longest_column))

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.spines[:].set_visible(False)
        highest = max(lowest, float(table.max()))
        scale = Normalize(lowest, highest) if lowest < highest else Normalize(lowest - 0.5, lowest + 0.5)
        mesh = axes.pcolormesh(table, cmap="viridis", norm=scale, edgecolors="none", antialiased=False)
        axes.invert_yaxis()
        ticks = range(0, len(columns), max(1, math.ceil(len(columns) / 24)) if numbered else 1)
        turned: dict[str, Any] = {} if numbered else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks([tick + 0.5 for tick in ticks], [columns[tick] for tick in ticks], **turned)
        ticks = range(0, len(rows), max(1, math.ceil(len(rows) / 64)))
        axes.set_yticks([tick + 0.5 for tick in ticks], [rows[tick] for tick in ticks])
        axes.tick_params(length=0)
        axes.set_xlabel(label(labels[0]))
        bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03, aspect=max(6.0, min(25.0, 9 * height)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4 if height < 2.5 else 6))
        bar.ax.yaxis.set_major_formatter(_SHORT)
        bar.set_label(label(labels[1]))

    return _svg(name, title, draw, (width, height))


@dataclass(frozen=True)
class Point:
    """A measured value at a setting, with its 95 % interval if it has one; series: see `Line`."""

    x: str
    y: float
    interval: tuple[float, float] | None
    series: int = 0


def point_chart(name: str, title: str, points: Sequence[Point], setting: str, order: Sequence[str]) -> str:
    """Measured values, with their intervals, by a setting.

    Args:
        name: The start of the chart's ids.
        title: What it shows.
        points: What is drawn.
        setting: The name of the setting.
        order: The values of the setting from left to right, unless all are numbers.
    """
    numbers = [_number(point.x) for point in points]
    are_numbers = all(map(math.isfinite, numbers))
    places = numbers if are_numbers else [float(order.index(point.x)) for point in points]

    def draw(axes: Axes) -> None:
        for place, point in zip(places, points, strict=True):
            low, high = point.interval or (point.y, point.y)
            reach = [[max(0.0, point.y - low)], [max(0.0, high - point.y)]]
            style: dict[str, Any] = {"color": _SERIES[point.series], "zorder": 3 + point.series}
            axes.errorbar([place], [point.y], reach, fmt="o", markersize=5.0, elinewidth=1.2, capsize=2.5, **style)
        if are_numbers and min(places) > 0 and max(places) > _LOG_RATIO / 4 * min(places):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len({*places}) <= _MOST_TICKS:
            texts = {place: label(point.x, _LONGEST_TICK) for point, place in zip(points, places, strict=True)}
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([*texts], [*texts.values()])
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_xlabel(label(setting))
        axes.margins(x=0.12, y=0.1)

    return _svg(name, title, draw, _HALF)


def label(value: str, longest: int = LONGEST_LABEL) -> str:
    """A text in one line without the middle of a long one, such as the label of an axis, a tick, a row or a column."""

    def cut(text: str) -> str:
        end = longest // 3
        return text if len(text) <= longest else f"{text[: longest - end - 1]}…{text[-end:]}"

    return cut(one_line(cut(value)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _short(value: float) -> str:
    """A number in few characters: `0.0123`, `1.5`, `2.1k`, `1e-06`."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e4:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:,.4g}" if abs(value) >= 1e3 else f"{value:.3g}"


def _log_locator(low: float, high: float) -> LogLocator:
    """Ticks of a logarithmic axis: the more decades, the fewer ticks in each."""
    decades = math.log10(high / low)
    return LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 3 else (1.0,), numticks=12)


def _moving_average(values: Sequence[float]) -> Any:
    """Means over a fortieth of the points around each; fewer at the ends."""
    kernel = np.ones(max(3, len(values) // 40) | 1)
    sums, counts = (np.convolve(row, kernel, mode="same") for row in (np.asarray(values), np.ones(len(values))))
    return sums / counts


def _svg(name: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    # The page shows a wide chart about 1.5 times as large, and others 1.3 times.
    font_size = 8.0 if size[0] == WIDE[0] else 9.0
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name, "font.size": font_size}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for one in (figure, axes):
            one.patch.set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _element(stream.getvalue(), name, title)


def _element(text: str, name: str, title: str) -> str:
    """What matplotlib wrote, as an element of an HTML page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # else of the whole page
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
