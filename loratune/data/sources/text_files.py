"""Reads text files as rows: JSON lines, CSV and plain text block by block, JSON documents whole.

The readers keep information that those of other libraries lose: the line of every row and problem, the rows after an
invalid one, and the byte that is not UTF-8. A BOM, CRLF and blank lines are accepted in every kind of file.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any, BinaryIO

from loratune.codes import Code
from loratune.data.sources.rows import BLOCK, Row, RowOrProblem, Unreadable, to_row
from loratune.errors import DataError, Problem

csv.field_size_limit(1 << 28)  # csv's own limit of 128 KiB a cell is shorter than a document
_BOM = "\ufeff"
_FIX_LINE, _FIX_FILE = "correct the line, or remove it", "correct the file, or write it again"


def _blocks_of_lines(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of whole lines, each block without the newline at its end."""
    incomplete: list[bytes] = []
    while block := file.read(BLOCK):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            lines, incomplete = b"".join([*incomplete, head]), [tail] if tail else []
            yield lines
            del lines  # a line may be as large as the file: hold it no longer than necessary
        else:
            incomplete.append(block)
    if incomplete:
        yield b"".join(incomplete)


Line = tuple[int, str] | Problem
"""The number of a line and its text without its end; or a problem where it is not UTF-8."""


def text_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """The lines of a file that are not blank. name: the path, for messages."""
    number = 1
    for block in _blocks_of_lines(file):
        first, number = number, number + block.count(b"\n") + 1
        if block.isspace():
            continue
        lines = block.split(b"\n")
        del block
        for place, raw in compress(enumerate(lines, first), map(bytes.strip, lines)):
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                yield _encoding_problem(error.start + 1, raw[error.start], f"{name}:{place}")
                continue
            text = text.removeprefix(_BOM) if place == 1 else text
            if text.strip():
                yield place, text.rstrip("\r")


def _encoding_problem(byte: int, value: int, where: str) -> Problem:
    what = f"byte {byte} of the line (0x{value:02x}) is not UTF-8"
    return Problem(Code.DATA_SYNTAX, what, where, fix="save the file as UTF-8")


def text_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a plain text file: one text per line; blank lines are skipped."""
    for line in text_lines(file, name):
        yield line if isinstance(line, Problem) else Row(f"{name}:{line[0]}", {"text": line[1]})


# CSV

_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as `surrogateescape` decodes it: what is UTF-8 never becomes one of these."""
_CSV_PIECE = re.compile(r"[^\n]*\n+")
"""A line with the blank lines after it, which `csv.reader` takes at once, between records and within a cell."""


def csv_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a CSV file: a header, then records, which take several lines where a quoted cell holds newlines.

    Raises:
        DataError: The header cannot be used, or a record of several lines is not valid: nobody knows how many records
            its quoted cell has swallowed.
    """
    text = _CsvText(file, name)
    reader, header = csv.reader(text, strict=True), list[str]()
    while True:
        text.begin_record()
        where = f"{name}:{text.number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = text.problem or Problem(Code.DATA_SYNTAX, f"not valid CSV: {error}", where, fix=_FIX_LINE)
            if not header or text.pieces > 1:
                raise DataError(problem) from None
            yield problem
            continue
        if not cells:  # a blank line
            continue
        if not header:
            if bad_header := text.problem or _header_problem(cells, where):
                raise DataError(bad_header)
            header = cells
        elif text.problem:
            yield text.problem
        elif len(cells) != len(header):
            what = f"{len(cells)} cells, but the header has {len(header)} columns"
            yield Problem(Code.DATA_SYNTAX, what, where, fix=_FIX_LINE)
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


class _CsvText:
    """The text of a CSV file in pieces, of which `csv.reader` takes as many as a record has.

    Attributes:
        number: The number of the line after those that were taken.
        pieces: How many pieces were taken for the record.
        problem: Set where a line of the record is not UTF-8.
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name
        self.number, self.pieces = 1, 0
        self.problem: Problem | None = None

    def begin_record(self) -> None:
        """What is taken from now on belongs to another record."""
        self.pieces, self.problem = 0, None

    def __iter__(self) -> Iterator[str]:
        for block in _blocks_of_lines(self._file):
            text = f"{block.decode(errors='surrogateescape')}\n"
            is_utf8 = text.isascii() or not _BAD_BYTE.search(text)
            if self.number == 1:
                text = text.removeprefix(_BOM)
            for piece in _CSV_PIECE.findall(text.replace("\r\n", "\n")):
                if not is_utf8 and not self.problem and (bad := _BAD_BYTE.search(piece)):
                    before = block[:3] == _BOM.encode() and self.number == 1
                    byte = len(piece[: bad.start()].encode()) + 3 * before + 1
                    self.problem = _encoding_problem(byte, ord(bad[0]) - 0xDC00, f"{self._name}:{self.number}")
                self.number += piece.count("\n")
                self.pieces += 1
                yield piece


def _header_problem(names: list[str], where: str) -> Problem | None:
    if len(names) == 1 and (separators := {";", "\t"}.intersection(names[0])):
        what = f"the header has no comma, but {' and '.join(map(repr, sorted(separators)))}"
        return Problem(Code.DATA_SYNTAX, what, where, fix="write the file with commas between the cells")
    return duplicate_columns(names, where)


def duplicate_columns(names: Iterable[str], where: str) -> Problem | None:
    """A problem if two columns of a table have one name."""
    if names := [f"`{name}`" for name, count in sorted(Counter(names).items()) if count > 1]:
        what = f"more than one column is called {', '.join(names)}"
        return Problem(Code.DATA_SYNTAX, what, where, fix="rename one of the columns")
    return None


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    names = [name for name, _ in pairs]
    return Unreadable(f"an object with the key `{next(name for name in names if names.count(name) > 1)}` twice")


def _integer(digits: str) -> int | Unreadable:
    """An integer of JSON. Python refuses to read one of several thousand digits, so that one is `Unreadable`."""
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"a number of {len(digits.lstrip('-')):,} digits")


_decode = json.JSONDecoder(object_pairs_hook=_object).decode
_decode_long_integers = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer).decode
"""Slower, since each number passes through Python."""


def _parse(text: str) -> Any:
    """Raises json.JSONDecodeError, RecursionError."""
    try:
        return _decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than Python reads
        return _decode_long_integers(text)


def json_lines(lines: Iterable[Line], name: str) -> Iterator[RowOrProblem]:
    """Rows of a file with one JSON object per line; blank lines are skipped."""
    for line in lines:
        if isinstance(line, Problem):
            yield line
            continue
        where = f"{name}:{line[0]}"
        try:
            yield to_row(_parse(line[1]), where)
        except (json.JSONDecodeError, RecursionError) as error:
            yield _json_problem(error, where, _FIX_LINE)


def jsonl_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON Lines file."""
    return json_lines(text_lines(file, name), name)


def _json_problem(error: json.JSONDecodeError | RecursionError, where: str, fix: str) -> Problem:
    if isinstance(error, RecursionError):
        what = "the JSON is nested too deeply to be read"
    elif error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg:
        what = f"the JSON is cut off at column {error.colno}"
    else:
        what = f"not valid JSON: {error.msg} at column {error.colno}"
    return Problem(Code.DATA_SYNTAX, what, where, fix=fix)


def json_document(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON document: a list of objects, the list under its key `data`, or one object.

    The document is held in memory. JSON lines in a file that is called .json are read as such.

    Raises:
        DataError: It is not a JSON document, or not UTF-8.
    """
    raw = file.read()
    try:
        text = raw.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(_encoding_problem(byte, raw[error.start], f"{name}:{line}")) from None
    del raw
    if not text or text.isspace():
        return
    try:
        rows = _parse(text)
    except RecursionError as error:
        raise DataError(_json_problem(error, name, _FIX_FILE)) from None
    except json.JSONDecodeError as error:
        first_line = text[: error.pos].lstrip().partition("\n")
        if error.msg == "Extra data" and first_line[0][:1] == "{" and first_line[1] and not first_line[2].strip():
            lines = text.split("\n")
            yield from json_lines(compress(enumerate(lines, 1), map(str.strip, lines)), name)
            return
        raise DataError(_json_problem(error, f"{name}:{error.lineno}", _FIX_FILE)) from None
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        what = "a JSON file must hold a list of objects, or one object for one row"
        raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix="write it as [{...}, {...}]"))
    yield from (to_row(row, f"{name}:row {number}") for number, row in enumerate(rows, start=1))
