"""The first pass over the data: every row of every file is read and checked, and an index of them is written.

The index has three numbers a row, in a file without a name: two hashes of its content, and its line. So memory does
not grow with the data.
"""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import Example, Parser, RowError, content_key
from loratune.data.sources import MAX_PROBLEMS, RowSource, no_rows_error, open_source
from loratune.data.sources.rows import Advance, no_advance
from loratune.errors import DataError, Problem, ResourceError

RowMask: TypeAlias = NDArray[np.bool_]
"""(rows,) bool: which rows take part."""

ProgressFactory: TypeAlias = Callable[[str, int], AbstractContextManager[Advance]]
"""Takes what is being done and its size in bytes (0: unknown); the context gives the function that takes progress."""


@contextmanager
def no_progress(what: str, size: int) -> Iterator[Advance]:
    """A ProgressFactory that shows nothing."""
    yield no_advance


EXACT, FOLDED, LINE = range(3)
"""The columns of the index: a hash of the content, one of the content with white space folded, the line or row."""

CONTENT_HASH = "blake2b-64 of content_key, 1"
"""What the hashes are, for whoever keeps them: to be counted on whenever one of a row comes out otherwise."""

_COLUMNS = 3
_ROW_BYTES = _COLUMNS * 8
_ROWS_PER_WRITE = 1 << 16


@dataclass(frozen=True)
class IndexedFile:
    """One file of rows, or one split of a hub dataset.

    Attributes:
        source: Where its rows are read from.
        parser: What makes examples of them.
        start: The number of its first row among the rows of all files.
        rows: How many there are.
        prefix: What the place of a row begins with, before its line.
    """

    source: RowSource
    parser: Parser
    start: int
    rows: int
    prefix: str


@dataclass(frozen=True)
class RowIndex:
    """All rows of some sources.

    Attributes:
        files: Those that have rows.
        counts: Rows of each source.
        data: A file of int64, row by row; for the columns see `EXACT`.
    """

    files: tuple[IndexedFile, ...]
    counts: tuple[int, ...]
    data: IO[bytes]

    def __len__(self) -> int:
        return sum(self.counts)

    def column(self, column: int, start: int, stop: int) -> NDArray[np.int64]:
        """A column of the rows from `start` up to `stop`. It is read, not mapped: mapped pages count as memory."""
        stop = min(stop, len(self))
        raw = os.pread(self.data.fileno(), (stop - start) * _ROW_BYTES, start * _ROW_BYTES)
        return np.frombuffer(raw, dtype=np.int64).reshape(-1, _COLUMNS)[:, column].copy()

    def where(self, number: int) -> str:
        """The place of a row, by its number among all rows."""
        file = next(file for file in self.files if number < file.start + file.rows)
        return f"{file.prefix}{self.column(LINE, number, number + 1)[0]}"

    def examples(self, mask: RowMask | None, skip: int, advance: Advance) -> Iterator[Example]:
        """Read the rows once more, in order, as examples.

        Args:
            mask: Which rows; None for all.
            skip: How many of those to leave out at the beginning.
            advance: See `RowSource.rows`.

        Raises:
            DataError: A file has changed since it was indexed.
        """
        for file in self.files:
            file_mask = mask[file.start : file.start + file.rows] if mask is not None else None
            remaining = file.rows if file_mask is None else int(np.count_nonzero(file_mask))
            if skip >= remaining:
                skip -= remaining
                advance(file.source.size)
                continue
            for number, row in enumerate(file.source.rows(advance)):
                if file_mask is not None and number < file.rows and not file_mask[number]:
                    continue
                remaining -= 1
                if remaining < 0:
                    raise _changed_error(file)
                if skip:
                    skip -= 1
                    continue
                try:
                    yield file.parser(row)
                except RowError:
                    raise _changed_error(file) from None
            if remaining:
                raise _changed_error(file)


def _changed_error(file: IndexedFile) -> DataError:
    what, fix = "the file has changed while it was being read", "start again"
    return DataError(Problem(Code.DATA_FILE_CHANGED, what, file.source.name, fix=fix))


def index_rows(sources: Sequence[Source], section: DataSection, progress: ProgressFactory) -> RowIndex:
    """Read and check every row of the sources.

    Raises:
        DataError: As `open_source` and `Parser`; up to 10 rows that do not fit their format; or a
            source without rows.
    """
    parts_by_source = [(source, open_source(source)) for source in sources]
    size = sum(part.size for _, parts in parts_by_source for part in parts)
    writer, files, counts = _IndexWriter(), [], []
    with progress("reading", size) as advance:
        for source, parts in parts_by_source:
            before = writer.rows
            files += [file for part in parts if (file := _index_file(part, section, writer, advance)) is not None]
            if writer.rows == before:
                raise no_rows_error(source)
            counts.append(writer.rows - before)
    return RowIndex(tuple(files), tuple(counts), writer.finish())


def _index_file(
    source: RowSource, section: DataSection, writer: "_IndexWriter", advance: Advance
) -> IndexedFile | None:
    """Index one file; None if it has no rows."""
    start, problems, parser, prefix = writer.rows, [], None, ""
    try:
        for row in source.rows(advance):
            if parser is None:
                parser, prefix = Parser(row, section), row.where[: -len(_line_of(row.where))]
            try:
                writer.add(parser(row), int(_line_of(row.where)))
            except RowError as error:
                problems.append(error.at(row.where))
                if len(problems) == MAX_PROBLEMS:
                    break
    except DataError as error:  # problems of the file come at its end, so put them in order with those of rows
        problems = sorted([*problems, *error.problems], key=lambda problem: int(_line_of(problem.where) or 0))
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return None if parser is None else IndexedFile(source, parser, start, writer.rows - start, prefix)


def _line_of(where: str) -> str:
    """The number that a place ends with: `rows.jsonl:12`, `rows.parquet:row 12`."""
    return where[len(where.rstrip("0123456789")) :]


def _hash(content: bytes) -> int:
    """64 bits of BLAKE2b as a signed number: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


class _IndexWriter:
    """Writes the index to a file without a name."""

    def __init__(self) -> None:
        self.rows = 0
        self._buffer = array("q")
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  the RowIndex keeps it open

    def add(self, example: Example, line: int) -> None:
        exact, folded = content_key(example), content_key(example, folded=True)
        exact_hash = _hash(exact)
        self._buffer.extend((exact_hash, exact_hash if folded == exact else _hash(folded), line))
        self.rows += 1
        if len(self._buffer) >= _COLUMNS * _ROWS_PER_WRITE:
            self._write()

    def finish(self) -> IO[bytes]:
        self._write()
        return self._file

    def _write(self) -> None:
        try:
            self._file.write(self._buffer.tobytes())
            self._file.flush()
        except OSError as error:
            what, fix = f"no space for the index of the rows: {error.strerror}", "free some space, or set TMPDIR"
            raise ResourceError(Problem(Code.DATA_INDEX_DISK, what, tempfile.gettempdir(), fix=fix)) from None
        self._buffer = array("q")
