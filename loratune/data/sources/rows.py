"""A row and its place, and what all sources of rows have in common."""

import base64
import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from loratune.errors import Problem

MAX_PROBLEMS = 10
BLOCK = 1 << 20
"""Bytes that are read and held at a time."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data. where: `file:line`, `file:row N` or `hub-id[split]:N`, counted from 1."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that Python cannot hold, such as a date after the year 9999. reason: why, or what it is."""

    reason: str


Item = Row | Problem
"""What stands at the place of a row: the row, or what is wrong with it."""


def unseen(count: int) -> None:
    """For `Opened.rows` where nobody watches the progress."""


class RowSource(Protocol):
    """Rows of one file, or of one split on the hub, that are there to be read."""

    @property
    def name(self) -> str:
        """As messages name it: the path, or `hub-id[split]`."""

    @property
    def digest(self) -> str:
        """SHA-256 that changes whenever the rows may have changed, and not with the name; reads the whole file."""

    @property
    def size(self) -> int:
        """Bytes on disk."""

    def rows(self, advance: Advance = unseen) -> Iterator[Row]:
        """Stream the rows in order, as often as asked.

        advance: called with numbers of bytes, which add up to `size` once all rows are read.

        Raises DataError: up to 10 problems, at the end or when there are ten; damaged; changed or gone meanwhile.
        """


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError: a name stands in it twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name `{next(name for name in names if names.count(name) > 1)}` stands twice in an object"
        )
    return values


def whole(digits: str) -> int | Unreadable:
    """A whole number of JSON, however many digits it has: Python reads no more than some thousand."""
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"a number of {len(digits.lstrip('-')):,} digits")


def as_json(values: dict[str, Any]) -> str:
    """A row as a line of JSON. What JSON has no type for is text: dates as ISO 8601 has them, bytes as UTF-8 or base64;
    a value that cannot be read is null. A lone surrogate is escaped."""
    line = json.dumps(values, ensure_ascii=False, default=_as_text)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(values, default=_as_text)
    return line


def _as_text(value: Any) -> str | None:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return None if isinstance(value, Unreadable) else str(value)


def mapping(values: Any, where: str) -> Item:
    """The row, or the problem that it is none."""
    if isinstance(values, dict):
        return Row(where, values)
    kinds = {type(None): "null", bool: "true or false", list: "a list", str: "text"}
    what = f"a row must be an object with named fields, got {kinds.get(type(values), 'a number')}"
    return Problem(what, where, fix="write it as {...}")


def batch_rows(size: int, rows: int) -> int:
    """How many rows of a table to hold at once, where all its `rows` take `size` bytes."""
    return max(1, min(2048, 8 * BLOCK * rows // max(size, 1)))
