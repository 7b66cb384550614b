"""The first pass over the data: every row of every file is read and checked, and an index of them is made.

The index has three numbers a row, 24 bytes of memory: two hashes of its content, and its line. Where a fraction of the
rows is to be held out, it has three more, hashes of its prompt, completion and group.
"""

import difflib
import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data.formats import Example, completion_key, content_key, prompt_key
from loratune.data.formats.chats import RowError, quote, type_error
from loratune.data.formats.recognition import Parser
from loratune.data.report import Report
from loratune.data.sources import GivenRows, RowSource, no_rows_error, open_source
from loratune.data.sources.rows import (
    MAX_PROBLEMS,
    Row,
    Unreadable,
    line_of,
    place_parts,
    reported,
    to_json_line,
)  # fmt: skip
from loratune.errors import DataError, Problem
from loratune.events import Advance, reading

RowMask: TypeAlias = NDArray[np.bool_]
"""(rows,) bool: which rows take part."""

EXACT, FOLDED, LINE, PROMPT, COMPLETION, GROUP = range(6)
"""The columns of the index: a hash of the content, one of the content with white space folded, the line or row; where a
fraction is to be held out, hashes of the prompt, the completion and the value of `group_by` as well. A row without a
prompt, or without a value to group by, has the second hash of its content there.
"""

CONTENT_HASH = "blake2b-64 of content_key, 1"
"""What the hashes of the content are, for whoever keeps them: to be counted on whenever one comes out otherwise."""

_PLAIN_COLUMNS, _ALL_COLUMNS = 3, 6


@dataclass(frozen=True)
class IndexedFile:
    """One file of rows, or one split of a hub dataset.

    Attributes:
        source: Where its rows are read from.
        parser: What makes examples of them.
        start: The number of its first row among the rows of all files.
        rows: How many there are.
        prefix: What the place of a row begins with, before its line.
        suffix: What it ends with, behind its line.
    """

    source: RowSource
    parser: Parser
    start: int
    rows: int
    prefix: str
    suffix: str


@dataclass(frozen=True)
class RowIndex:
    """All rows of some sources.

    Attributes:
        files: Those that have rows.
        counts: Rows of each source.
        columns: (rows, 3 or 6); for the columns see `EXACT`.
        invalid: The rows that were dropped, as they cannot be used; None where such rows are an error.
    """

    files: tuple[IndexedFile, ...]
    counts: tuple[int, ...]
    columns: NDArray[np.int64]
    invalid: Report | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def where(self, number: int) -> str:
        """The place of a row, by its number among all rows."""
        file = next(file for file in self.files if number < file.start + file.rows)
        return f"{file.prefix}{self.columns[number, LINE]}{file.suffix}"

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
            for number, row in enumerate(self._rows(file, advance)):
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

    def _rows(self, file: IndexedFile, advance: Advance) -> Iterator[Row]:
        """The rows of a file without those that were dropped."""
        lines = iter(self.columns[file.start : file.start + file.rows, LINE].tolist())
        line = next(lines, 0)
        for row in file.source.rows(advance):
            if self.invalid is None:
                if isinstance(row, Problem):
                    raise _changed_error(file)
            elif isinstance(row, Problem) or int(line_of(row.where)) != line:
                continue
            else:
                line = next(lines, 0)
            yield row


def _changed_error(file: IndexedFile) -> DataError:
    what, fix = "the file has changed while it was being read", "start again"
    return DataError(Problem(Code.DATA_UNREADABLE, what, file.source.name, fix=fix))


def index_rows(sources: Sequence[Source | GivenRows], section: DataSection, divided: bool = False) -> RowIndex:
    """Read and check every row of the sources.

    Args:
        sources: Where the rows are read from.
        section: How they are read.
        divided: Whether a fraction of the rows will be held out, so that the index needs all columns.

    Raises:
        DataError: As `open_source` and `Parser`; up to 10 rows that do not fit their format, and behind the tenth that
            there may be more, unless such rows are dropped; a source without rows; or they are to be divided, and none
            has a value of the field that they are grouped by.
    """
    parts_by_source = [(source, open_source(source)) for source in sources]
    size = sum(part.size for _, parts in parts_by_source for part in parts)
    writer, files, counts = _IndexWriter(section, divided), list[IndexedFile](), list[int]()
    invalid = Report() if section.invalid_rows == "drop" else None
    with reading("reading", size) as advance:
        for source, parts in parts_by_source:
            before = writer.rows
            found = (_index_file(part, section, writer, invalid, advance) for part in parts)
            files += [file for file in found if file is not None]
            if writer.rows == before:
                raise no_rows_error(source, "; ".join(invalid.reasons()) if invalid else "")
            counts.append(writer.rows - before)
    if divided and section.group_by is not None and not writer.grouped:
        raise _no_groups_error(files, section.group_by)
    return RowIndex(tuple(files), tuple(counts), writer.columns, invalid)


def _no_groups_error(files: Sequence[IndexedFile], name: str) -> DataError:
    names = {field for file in files for field in file.parser.fields}
    what, fix = f"`{name}` is null in every row", "name another field, or leave the setting out"
    if name not in names:
        what = f"no row has a field `{name}`; the fields are {quote(names)}"
        near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else fix
    return DataError(Problem(Code.DATA_FORMAT, what, files[0].source.name, "data.group_by", fix))


def _index_file(
    source: RowSource, section: DataSection, writer: "_IndexWriter", invalid: Report | None, advance: Advance
) -> IndexedFile | None:
    """Index one file; None if it has no rows. invalid: takes the rows that cannot be used; None: they are an error."""
    start, parser, around = writer.rows, None, ("", "")
    problems: list[Problem] = []
    try:
        for row in source.rows(advance):
            problem = row if isinstance(row, Problem) else None
            if isinstance(row, Row):
                if parser is None:
                    parser, around = Parser(row, section), place_parts(row.where)[::2]
                try:
                    writer.add(parser(row), row)
                except RowError as error:
                    problem = error.at(row.where)
            if problem and invalid is not None:
                invalid.rows += 1
                invalid.drop_invalid(problem)
            elif problem:
                problems.append(problem)
                if len(problems) == MAX_PROBLEMS:
                    break
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(reported(problems, source.name))
    return None if parser is None else IndexedFile(source, parser, start, writer.rows - start, *around)


def _hash(content: bytes) -> int:
    """64 bits of BLAKE2b as a signed number: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def group_key(fields: Mapping[str, Any], name: str) -> bytes | None:
    """The value of a field, as JSON: objects are equal in any order of their fields, and 1 equals 1.0.

    Args:
        fields: A row, under the names of the data.
        name: Of the field.

    Returns:
        None where the row lacks the field, or has null or NaN.

    Raises:
        RowError: The value cannot be read.
    """
    value = fields.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Unreadable):
        raise type_error(f"`{name}`", "a value to group by", value)
    try:
        if not isinstance(value, str | int):
            value = json.loads(to_json_line({name: value}), parse_float=_number)[name]
        return json.dumps(value, sort_keys=True).encode()
    except RecursionError:
        raise RowError(f"`{name}` is nested too deeply") from None


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if number.is_integer() else number


class _IndexWriter:
    """Collects the rows of an index.

    Attributes:
        rows: How many rows were added.
        grouped: How many of them have a value of the field that they are grouped by.
    """

    def __init__(self, section: DataSection, divided: bool) -> None:
        self._width = _ALL_COLUMNS if divided else _PLAIN_COLUMNS
        self._section = section
        self.rows = self.grouped = 0
        self._numbers = array("q")

    def add(self, example: Example, row: Row) -> None:
        """Add a row. Raises RowError: its value of `group_by` cannot be read."""
        exact, folded = content_key(example), content_key(example, folded=True)
        exact_hash = _hash(exact)
        folded_hash = exact_hash if folded == exact else _hash(folded)
        numbers = [exact_hash, folded_hash, int(line_of(row.where))]
        if self._width == _ALL_COLUMNS:
            loss_on, group_by = self._section.loss_on, self._section.group_by
            prompt = prompt_key(example, loss_on)
            group = group_key(row.values, group_by) if group_by is not None else None
            self.grouped += group is not None
            numbers += [
                _hash(prompt) if prompt is not None else folded_hash,
                _hash(completion_key(example, loss_on)),
                _hash(group) if group is not None else folded_hash,
            ]
        self._numbers.extend(numbers)
        self.rows += 1

    @property
    def columns(self) -> NDArray[np.int64]:
        """(rows, columns), the index."""
        return np.frombuffer(self._numbers, dtype=np.int64).reshape(-1, self._width)
