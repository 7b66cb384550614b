"""Reading rows: files, directories, globs and hub ids → rows that know the place they came from.

Rows are streamed: what is held in memory is a block of a file (or one row, where that is longer), never the file.
"""

import os
from pathlib import Path

from loratune.config import Source
from loratune.data.sources import hub, local
from loratune.data.sources.files import find, looks_like_hub_id
from loratune.data.sources.rows import MAX_PROBLEMS, Row, RowSource
from loratune.errors import DataError, Problem

__all__ = ["MAX_PROBLEMS", "Row", "RowSource", "looks_like_hub_id", "no_rows_error", "open_source", "read_rows"]


def open_source(source: Source) -> list[RowSource]:
    """The files of a source in order, or its one split on the hub; no row is read yet.

    A slice goes over the rows of all files together, so that a file may have no row in it; where `split` adds up
    several slices, the files come once for each.

    Raises DataError: nothing there, no permission, an unknown kind of file, a slice that is none, a hub dataset that
    cannot be had.
    """
    path = Path(source.path).expanduser()
    if looks_like_hub_id(source.path) and not os.path.exists(path):
        return [hub.load(source)]
    return list(local.slices(find(path), source))


def read_rows(source: Source) -> list[Row]:
    """All rows of a source at once, in order, after its slice.

    Raises DataError: as `open_source`; not UTF-8 or not valid (up to 10 lines named); no rows.
    """
    if rows := [row for part in open_source(source) for row in part.rows()]:
        return rows
    raise no_rows_error(source)


def no_rows_error(source: Source) -> DataError:
    """What to raise about a source none of whose files had a row."""
    split = f" in {source.split}" if source.split else ""
    return DataError(Problem(f"0 rows{split}", source.path, fix="there is nothing to learn from"))
