"""The rows that a program or the command line gives to a verb."""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, BinaryIO, cast

from loratune.api import Messages, Rows, libraries
from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.config.sections import WEIGHT
from loratune.errors import DataError, Problem
from loratune.events import note
from loratune.system.files import path_problem

if TYPE_CHECKING:
    from loratune.data import DatasetSplit
    from loratune.data.sources import GivenRows
    from loratune.data.sources.rows import Row


def read_held_out(rows: Rows, section: DataSection) -> "DatasetSplit":
    """Rows to score, read as those of training. If they have no weights, each counts once. Raises DataError."""
    with libraries():
        from loratune import data

    try:
        return data.read_source(source_of(rows), section)
    except DataError as error:
        if WEIGHT not in section.columns or error.problems[0].key != "data.columns":
            raise
        columns = {ours: theirs for ours, theirs in section.columns.items() if ours != WEIGHT}
        split = data.read_source(source_of(rows), section.model_copy(update={"columns": columns}))
        note(f"the rows have no `{section.columns[WEIGHT]}`, so each counts once")
        return split


def source_of(rows: Rows) -> "Source | GivenRows":
    """Rows as an argument of `read_source`. Raises DataError: an unsupported type."""
    if isinstance(rows, str | PathLike):
        if what := path_problem(fspath(rows)) or ("" if fspath(rows) else "is empty"):
            raise DataError(Problem(Code.USAGE_BAD_VALUE, f"the path {what}", key="rows", fix="check the path"))
        return Source(path=fspath(rows))
    from loratune.data.sources import given_rows

    return given_rows(rows, "rows")


def read_prompts(rows: Rows | Sequence[str | Messages] | BinaryIO) -> "list[Row]":
    """The rows to answer. Raises DataError: they cannot be read."""
    from loratune.data import sources
    from loratune.data.sources.rows import Row

    if hasattr(rows, "readline"):
        return sources.read_rows(Source(path="stdin"), cast(BinaryIO, rows))
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, str | list) for row in rows):
        named = [{"prompt" if isinstance(row, str) else "messages": row} for row in rows]
        return [Row(f"prompt {number}", row) for number, row in enumerate(named, start=1)]
    source = source_of(rows)
    if line := sources.left_out(source):
        note(line)
    return sources.read_rows(source)
