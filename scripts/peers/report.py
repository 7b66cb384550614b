"""The table and the plot of a comparison."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from peers.sets import Census

Runs = Sequence[Mapping[str, Any]]
"""Finished runs of one set and loss: contestant, pass, seconds, process, first_step, rss, gpu_bytes, updates, loss."""

HEADER = (
    "contestant", "tokens/s", "supervised tokens/s", "loratune's speed / its own (range)", "of the roof",
    "peak RSS, GiB",
    "to the first update, s", "whole process, s", "updates of tokens", "held-out loss (range)",
)  # fmt: skip


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where there is one."""
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def ratios(runs: Runs, name: str, reference: str = "loratune") -> list[float]:
    """How many times as fast the reference was, pass by pass."""
    seconds = {(run["contestant"], run["pass"]): run["seconds"] for run in runs}
    passes = sorted({run["pass"] for run in runs})
    pairs = [(seconds.get((name, one)), seconds.get((reference, one))) for one in passes]
    return [theirs / ours for theirs, ours in pairs if theirs and ours]


def roof(census: Census, probe: Mapping[str, float]) -> float:
    """Tokens/s at the measured GEMM rate; `peers.probe` says what is counted."""
    supervised = census.supervised / census.tokens
    per_token = probe["per_token"] + probe["per_supervised"] * supervised + probe["per_length"] * census.attended
    return probe["flops"] / per_token


def table(runs: Runs, names: Sequence[str], census: Census, limit: float) -> list[str]:
    """The lines of a Markdown table, the fastest first."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    present = [name for name in names if any(run["contestant"] == name for run in runs)]
    for name in sorted(present, key=lambda name: median(seconds_of(runs, name))):
        own = [run for run in runs if run["contestant"] == name]
        seconds = median(seconds_of(runs, name))
        compared = ratios(runs, name)
        losses = [run["loss"] for run in own if run.get("loss") is not None]
        memory = max(run["gpu_bytes"] for run in own)
        cells = [
            f"**{name}**" if name == "loratune" else name,
            f"{census.tokens / seconds:,.0f}",
            f"{census.supervised / seconds:,.0f}",
            "1" if name == "loratune" else spread(compared, ".2f") if compared else "",
            f"{census.tokens / seconds / limit:.1%}",
            f"{median(run['rss'] for run in own) / 2**30:.1f}" + (f", GPU {memory / 2**30:.1f}" if memory else ""),
            f"{median(run['first_step'] for run in own):.1f}",
            f"{median(run['process'] for run in own):.0f}",
            f"{own[0]['updates']} of {census.tokens / own[0]['updates']:,.0f}",
            spread(losses, ".4f") if losses else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def seconds_of(runs: Runs, name: str) -> list[float]:
    """Of a contestant's runs."""
    return [run["seconds"] for run in runs if run["contestant"] == name]


def plot(charts: Mapping[str, tuple[Runs, Census]], names: Sequence[str], caption: str) -> str:
    """An SVG of bars, tokens/s with their range, one chart above the other."""
    drawn: list[str] = []
    height = 30
    for title, (runs, census) in charts.items():
        speeds = {name: [census.tokens / taken for taken in seconds_of(runs, name)] for name in names}
        bars = sorted(((name, found) for name, found in speeds.items() if found), key=lambda bar: -median(bar[1]))
        drawn.append(f'<text x="10" y="{height}" class="title">{escape(title)}, tokens/s</text>')
        most = max((max(found) for _, found in bars), default=1.0)
        for number, (name, found) in enumerate(bars):
            drawn += bar(name, found, 420 / most, height + 12 + 26 * number)
        height += 26 * len(bars) + 52
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}" viewBox="0 0 680 {height}">\n'
        "<style>text{font:13px sans-serif;fill:#222}.title{font-weight:bold}.small{font-size:11px;fill:#666}</style>\n"
        f'<rect width="680" height="{height}" fill="white"/>\n'
        + "\n".join(drawn)
        + f'\n<text x="10" y="{height - 12}" class="small">{escape(caption)}</text>\n</svg>\n'
    )


def bar(name: str, speeds: Sequence[float], scale: float, top: int) -> list[str]:
    """A bar with its label, its range as a thin line, and its median as a number."""
    middle, low, high = median(speeds) * scale, min(speeds) * scale, max(speeds) * scale
    colour = "#c8501e" if name == "loratune" else "#8fa3b5"
    return [
        f'<text x="150" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="160" y="{top}" width="{middle:.1f}" height="18" fill="{colour}"/>',
        f'<path d="M{160 + low:.1f} {top + 9}H{160 + high:.1f}" stroke="#222" stroke-width="1.5"/>',
        f'<text x="{168 + max(middle, high):.1f}" y="{top + 14}">{median(speeds):,.0f}</text>',
    ]
