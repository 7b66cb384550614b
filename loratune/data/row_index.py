"""The first pass over the data: every row of every file is read and checked, and what is needed of it later is kept.

That is three numbers a row, in a file without a name: its line, and two hashes of its content. So memory does not grow
with the data.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from loratune.config import DataSection, Source
from loratune.data import formats, sources
from loratune.data.formats import Example, Parser
from loratune.data.sources import MAX_PROBLEMS, RowSource
from loratune.data.sources.rows import Advance
from loratune.data.watching import ProgressFactory
from loratune.errors import DataError, Problem, ResourceError

EXACT, FOLDED, LINE = range(3)
"""The columns of the census: a hash of the content, one of the content with white space folded, the line or row."""

_ROW_BYTES = 3 * 8
_HELD = 1 << 16  # rows in memory before they are written


@dataclass(frozen=True)
class File:
    """One file of rows, or one split of a hub dataset. start: the number of its first row among all; prefix: what a
    row's place begins with, before its line."""

    opened: RowSource
    parser: Parser
    start: int
    rows: int
    prefix: str


@dataclass(frozen=True)
class RowIndex:
    """All rows of some sources. counts: rows of each source; kept: a file of int64, three a row, see `EXACT`."""

    files: tuple[File, ...]
    counts: tuple[int, ...]
    kept: IO[bytes]

    def __len__(self) -> int:
        return sum(self.counts)

    def column(self, column: int, start: int, stop: int) -> NDArray[np.int64]:
        """A column of the rows from `start` up to `stop`. It is read, not mapped: mapped pages count as memory."""
        stop = min(stop, len(self))
        held = os.pread(self.kept.fileno(), (stop - start) * _ROW_BYTES, start * _ROW_BYTES)
        return np.frombuffer(held, dtype=np.int64).reshape(-1, 3)[:, column].copy()

    def where(self, number: int) -> str:
        """The place of a row, by its number among all rows."""
        file = next(file for file in self.files if number < file.start + file.rows)
        return f"{file.prefix}{self.column(LINE, number, number + 1)[0]}"


def take(given: Sequence[Source], section: DataSection, watch: ProgressFactory) -> RowIndex:
    """Read and check every row of the sources.

    Raises DataError: see `sources.open_source`, `formats.Parser`; up to 10 rows that are not as their format asks; a
    source without rows.
    """
    opened = [(source, sources.open_source(source)) for source in given]
    size = sum(one.size for _, files in opened for one in files)
    rows, files, counts = _Rows(), [], []
    with watch("reading", size) as advance:
        for source, parts in opened:
            before = rows.count
            files += [file for part in parts if (file := _count(part, section, rows, advance)) is not None]
            if rows.count == before:
                raise sources.no_rows_error(source)
            counts.append(rows.count - before)
    return RowIndex(tuple(files), tuple(counts), rows.file())


def _count(opened: RowSource, section: DataSection, rows: "_Rows", advance: Advance) -> File | None:
    """One file, or None if it has no rows."""
    start, problems, parser, prefix = rows.count, [], None, ""
    try:
        for row in opened.rows(advance):
            if parser is None:
                parser, prefix = Parser(row, section), row.where[: -len(_line_of(row.where))]
            try:
                rows.add(parser(row), int(_line_of(row.where)))
            except formats.RowError as error:
                problems.append(error.at(row.where))
                if len(problems) == MAX_PROBLEMS:
                    break
    except DataError as error:  # what the file is, beside what its rows are
        problems = sorted([*problems, *error.problems], key=lambda one: int(_line_of(one.where) or 0))
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return None if parser is None else File(opened, parser, start, rows.count - start, prefix)


def _line_of(where: str) -> str:
    """The number that a place ends with: `rows.jsonl:12`, `rows.parquet:row 12`."""
    return where[len(where.rstrip("0123456789")) :]


class _Rows:
    """Numbers of rows, written to a file without a name as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._held = array("q")
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  it goes with the census

    def add(self, example: Example, line: int) -> None:
        self._held.extend((hash(formats.key(example)), hash(formats.key(example, folded=True)), line))
        self.count += 1
        if len(self._held) >= 3 * _HELD:
            self._write()

    def file(self) -> IO[bytes]:
        self._write()
        return self._file

    def _write(self) -> None:
        try:
            self._file.write(self._held.tobytes())
            self._file.flush()
        except OSError as error:
            what = f"no room for notes on the rows: {error.strerror}"
            raise ResourceError(Problem(what, tempfile.gettempdir(), fix="make room, or set TMPDIR")) from None
        self._held = array("q")


def examples(census: RowIndex, kept: NDArray[np.bool_] | None, skip: int, advance: Advance) -> Iterator[Example]:
    """The rows once more, in order, as examples: those that are kept (None: all), without the first `skip` of them.

    Raises DataError: a file has changed since the census.
    """
    for file in census.files:
        mask = kept[file.start : file.start + file.rows] if kept is not None else None
        there = file.rows if mask is None else int(np.count_nonzero(mask))
        if skip >= there:
            skip -= there
            advance(file.opened.size)
            continue
        for number, row in enumerate(file.opened.rows(advance)):
            if mask is not None and number < file.rows and not mask[number]:
                continue
            there -= 1
            if there < 0:
                raise _changed(file)
            if skip:
                skip -= 1
                continue
            try:
                yield file.parser(row)
            except formats.RowError:
                raise _changed(file) from None
        if there:
            raise _changed(file)


def _changed(file: File) -> DataError:
    return DataError(Problem("the file has changed while it was being read", file.opened.name, fix="start again"))
