"""The table of a comparison."""

from collections.abc import Mapping, Sequence
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
