"""The tables of the first hour, for README and for the page of its own."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from first_hour.faults import FAULTS
from first_hour.tools import TOOLS

Result = dict[str, Any]
VERDICTS = {
    "says": "says what is wrong",
    "right": "right",
    "traceback": "traceback",
    "silent": "**silently wrong**",
}
"""Verdict → how the tables have it."""
MISSING = "-"


def read(path: Path) -> list[Result]:
    """The results of a file, if it is there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |") for line in [header, ["---"] * len(header), *rows]
    )


class Results:
    """Results by tool."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.lines = results

    def of(self, part: str, tool: str) -> Result:
        """The newest result of a part; empty if there is none."""
        return next((one for one in reversed(self.lines) if one["part"] == part and one["tool"] == tool), {})

    def fault(self, name: str, tool: str) -> Result:
        """The newest outcome of a fault."""
        found = (one for one in reversed(self.lines) if one.get("fault") == name and one["tool"] == tool)
        return next(found, {})

    def verdicts(self, tool: str) -> str:
        """How many faults were named or made good, ended with a traceback, and were silently wrong."""
        found = [self.fault(name, tool).get("verdict") for name in FAULTS]
        if not any(found):
            return MISSING
        counts = found.count("says") + found.count("right"), found.count("traceback"), found.count("silent")
        return ", ".join(map(str, counts))


def minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def gigabytes(count: float) -> str:
    """Bytes in GB."""
    return f"{count / 1e9:.1f}"


def installed(one: Result) -> str:
    """Time and size of an installation."""
    if not one or one["exit"]:
        return MISSING
    return f"{minutes(one['seconds'])}; {gigabytes(one['bytes'])} ({gigabytes(one['bytes'] - one['torch_bytes'])})"


def trained(one: Result) -> str:
    """When there was an adapter, or that there was none."""
    if not one or not one["steps"]:
        return MISSING
    if one["exit"] == 0:
        return minutes(one["seconds"])
    return f"{minutes(one['minutes'] * 60)}, stopped at step {one['steps']} of {one['of']}"


ROWS: dict[str, Callable[[Results, str], str]] = {
    "installation, min:s; GB (without torch)": lambda found, tool: installed(found.of("install", tool)),
    "lines typed to the first adapter": lambda found, tool: str(found.of("install", tool).get("typed", MISSING)),
    "time to it, min:s": lambda found, tool: trained(found.of("train", tool)),
    "exact answers to 200 unseen rows": lambda found, tool: figure(found.of("score", tool), "exact", ".1%"),
    "loss of an unseen answer (less is better)": lambda found, tool: figure(found.of("score", tool), "nats", ".2f"),
    "KL from the base on everyday instructions (less keeps more)": lambda found, tool: figure(
        found.of("score", tool), "divergence", ".3f"
    ),
    "ten wrong inputs: named or made good, traceback, silently wrong": lambda found, tool: found.verdicts(tool),
}
"""The rows of the short table: what they show, and a cell of one."""


def figure(one: Result, key: str, form: str) -> str:
    """A number of a result."""
    return f"{one[key]:{form}}" if key in one else MISSING


def short(results: Sequence[Result]) -> str:
    """The table of README, without rows that no tool has a result for."""
    found = Results(results)
    header = ["", *(tool.title for tool in TOOLS.values())]
    rows = [[what, *(cell(found, tool) for tool in TOOLS)] for what, cell in ROWS.items()]
    return markdown(header, [row for row in rows if set(row[1:]) != {MISSING}])


def wrong_inputs(results: Sequence[Result]) -> str:
    """What each tool did with each wrong input."""
    found = Results(results)

    def cell(fault: str, tool: str) -> str:
        one = found.fault(fault, tool)
        return f"{VERDICTS[one['verdict']]} ({one['exit']}; {one['seconds']:.0f} s)" if one else MISSING

    header = ["", *(tool.title for tool in TOOLS.values())]
    return markdown(header, [[what, *(cell(fault, tool) for tool in TOOLS)] for fault, what in FAULTS.items()])


def last_lines(results: Sequence[Result]) -> str:
    """The last line of each, and what was measured."""
    found, lines = Results(results), []
    for fault, what in FAULTS.items():
        lines.append(f"**{what[0].upper()}{what[1:]}**\n")
        for tool, known in TOOLS.items():
            if one := found.fault(fault, tool):
                said = one["last"].replace("`", "'")
                lines.append(f"- {known.title}: `{said}`" + (f" ({one['note']})" if one["note"] else ""))
        lines.append("")
    return "\n".join(lines).rstrip()


def versions(results: Sequence[Result]) -> str:
    """What was installed, and what differs from the documentation."""
    found, lines = Results(results), []
    for tool, known in TOOLS.items():
        if listed := found.of("install", tool).get("versions"):
            shown = ", ".join(f"{name} {version}" for name, version in listed.items() if name != tool)
            changed = f". Changed: {known.changed}" if known.changed else ""
            lines.append(f"- {known.title} {listed.get(tool, '')}: {shown}{changed}")
    return "\n".join(lines)


def document(results: Sequence[Result]) -> str:
    """All tables."""
    return "\n\n".join((short(results), versions(results), wrong_inputs(results), last_lines(results)))


def filled(page: str, results: Sequence[Result]) -> str:
    """A page with its tables made anew: each is between two comments, or begins as the short table does."""
    tables = {"short": short, "versions": versions, "wrong": wrong_inputs, "last": last_lines}
    for name, made in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n\n{made(results)}\n\n{end}{rest.partition(end)[2]}"
    header = short(results).splitlines()[0]
    if "<!--" not in page and header in page:
        before, _, rest = page.partition(header)
        page = f"{before}{short(results)}\n\n{rest.partition(chr(10) * 2)[2]}"
    return page
