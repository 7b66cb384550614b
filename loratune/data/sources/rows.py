"""Rows, the place of each row in its source, and how rows are written."""

import base64
import csv
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from loratune.codes import Code
from loratune.errors import Problem

MAX_PROBLEMS = 10
"""How many problems of a source are collected before reading stops."""
_SINGLY = 3
"""How many problems that differ in the row alone are shown one by one; of more, the first with their number."""


def reported(problems: Sequence[Problem], source: str = "") -> list[Problem]:
    """What is shown of the problems of rows.

    Args:
        problems: Of rows, in their order; once there are `MAX_PROBLEMS`, there may be more.
        source: Where the rows are from.

    Returns:
        Of more than three that differ in the row alone, the first with the number of the others; at most
        `MAX_PROBLEMS`, and behind them that there may be more, unless all are of one kind.
    """
    at_least = "at least " if len(problems) >= MAX_PROBLEMS else ""
    by_kind: dict[tuple[Problem, str], list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(_kind(problem), []).append(problem)
    shown = list[Problem]()
    for first, *others in by_kind.values():
        if len(others) < _SINGLY:
            shown += [first, *others]
            continue
        lines = [line_of(other.where) for other in others]
        rest = f"{', '.join(lines[: MAX_PROBLEMS - 1])}{', ...' if lines[MAX_PROBLEMS - 1 :] else ''}"
        shown.append(replace(first, what=f"{first.what} (and {at_least}{len(lines):,} more rows: {rest})"))
    if at_least and shown[1:]:
        what, fix = f"there may be more problems than these {len(shown[:MAX_PROBLEMS])}", "mend these first"
        shown[MAX_PROBLEMS:] = [Problem(Code.MORE_PROBLEMS, what, source, fix=fix)]
    return shown


def _kind(problem: Problem) -> tuple[Problem, str]:
    """The problem without its place, and the file or split that it is in."""
    return replace(problem, where=""), place_parts(problem.where)[0]


def line_of(where: str) -> str:
    """The number in a place, see `place_parts`."""
    return place_parts(where)[1]


def place_parts(where: str) -> tuple[str, str, str]:
    """A place with its number by itself: `rows.jsonl:12`, `rows.parquet:row 12`, `train[12]`."""
    body = where.removesuffix("]")
    before = body.rstrip("0123456789")
    return before, body[len(before) :], where[len(body) :]


BLOCK = 1 << 20
"""Bytes that are read and held at a time."""


@dataclass(frozen=True)
class Row:
    """One row as the data has it.

    Attributes:
        where: Its place, counted from 1: `file:line`, `file:row N` or `hub-id[split]:N`; or from 0, `name[N]`.
        values: Its fields under the names of the data.
    """

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that Python cannot hold, such as a date after the year 9999. reason: what the value is."""

    reason: str


RowOrProblem = Row | Problem
"""What a reader yields for each row: the row, or what is wrong with it."""


def place_in_cache(where: str) -> str:
    """The place of a row as text that UTF-8 can encode: paths may hold bytes that are not UTF-8."""
    return where.encode(errors="backslashreplace").decode()


def to_row(values: Any, where: str) -> RowOrProblem:
    """The row of a JSON value; a problem where the value is not an object."""
    if isinstance(values, dict):
        return Row(where, values)
    kinds = {type(None): "null", bool: "true or false", list: "a list", str: "text"}
    kind = values.reason if isinstance(values, Unreadable) else kinds.get(type(values), "a number")
    what = f"a row must be an object with named fields, got {kind}"
    return Problem(Code.DATA_SYNTAX, what, where, fix="write each row as {...}")


def to_json_line(values: Mapping[str, Any]) -> str:
    """The fields of a row as one line of JSON.

    Values that JSON has no type for become text: dates in ISO 8601, bytes as UTF-8 or else base64. An `Unreadable`
    becomes null. If there is a lone surrogate, the line is pure ASCII with escapes.
    """
    line = json.dumps(values, ensure_ascii=False, default=_to_json_value)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(values, default=_to_json_value)
    return line


def write_csv(rows: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    """Write rows with a column for each field that any of them has.

    A missing field and null become empty cells; numbers, lists and objects become JSON; other values are written as in
    `to_json_line`.
    """
    rows = list(rows)
    writer = csv.writer(file, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerows([names, *([_to_cell(row.get(name)) for name in names] for row in rows)])


def _to_cell(value: Any) -> str:
    plain = value if isinstance(value, str | int | float | list | dict | None) else _to_json_value(value)
    if plain is None:
        return ""
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=_to_json_value)


def _to_json_value(value: Any) -> str | None:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return None if isinstance(value, Unreadable) else str(value)


def with_own_fields(own: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row, and behind them what a command found out about it.

    No field is lost. One whose name is among the results is called `row_NAME`; a `completion`, which is the expected
    answer, is called `reference` if the row has no other field of that name.
    """
    kept = {}
    for name, value in own.items():
        if name == "completion" and name in found and "reference" not in {*own, *found}:
            name = "reference"
        elif name in found:
            name = f"row_{name}"
            while name in own or name in found:
                name = f"row_{name}"
        kept[name] = value
    return kept | dict(found)
