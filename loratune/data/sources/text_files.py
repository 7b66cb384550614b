"""Reading text files as rows: JSON lines, CSV and plain text block by block, JSON documents whole.

The readers keep what those of other libraries lose: the line of every row and problem, the rows behind a bad one, and
the byte that is not UTF-8. A BOM, CRLF and blank lines are accepted in every kind of file.
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises _DuplicateKey."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return values


class _DuplicateKey(ValueError):
    """A JSON object has this key twice."""


def _integer(digits: str) -> int | Unreadable:
    """An integer of JSON. Python refuses to read one of several thousand digits, so that one is `Unreadable`."""
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"a number of {len(digits.lstrip('-')):,} digits")


_decode = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
_decode_long_integers = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer).raw_decode
"""Slower, since each number passes through Python."""


def json_lines(lines: Iterable[Line], name: str) -> Iterator[RowOrProblem]:
    """Rows of a file with one JSON object per line; blank lines are skipped."""
    for line in lines:
        if isinstance(line, Problem):
            yield line
            continue
        where, text = f"{name}:{line[0]}", line[1]
        try:
            value, end = _decode(text)
        except (ValueError, RecursionError):
            end = -1
        yield to_row(value, where) if end == len(text) else _parse_line(text, where)  # json.loads takes twice as long


def jsonl_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON Lines file."""
    return json_lines(text_lines(file, name), name)


def _parse_line(text: str, where: str) -> RowOrProblem:
    try:
        return to_row(json.loads(text, object_pairs_hook=_unique, parse_int=_integer), where)
    except json.JSONDecodeError as error:
        return _syntax_problem(error.msg, where, error.colno, error.pos >= len(error.doc.rstrip()), _FIX_LINE)
    except (RecursionError, _DuplicateKey) as error:
        return _content_problem(error, where, _FIX_LINE)


def _syntax_problem(message: str, where: str, column: int, at_end: bool, fix: str) -> Problem:
    """at_end: the decoder found nothing wrong before the text stopped."""
    if at_end or "Unterminated" in message:
        return Problem(Code.DATA_SYNTAX, f"the JSON is cut off at column {column}", where, fix=fix)
    return Problem(Code.DATA_SYNTAX, f"not valid JSON: {message} at column {column}", where, fix=fix)


def _content_problem(error: RecursionError | _DuplicateKey, where: str, fix: str) -> Problem:
    if isinstance(error, RecursionError):
        return Problem(Code.DATA_SYNTAX, "the JSON is nested too deeply to be read", where, fix=fix)
    return Problem(Code.DATA_SYNTAX, f"an object has the key `{error}` twice", where, fix=fix)


def json_document(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON document: a list of objects, the list under its key `data`, or one object.

    The text is held in memory, and one row of a list. JSON lines in a file that is called .json are read as such.

    Raises:
        DataError: It is not a JSON document, or not UTF-8.
    """
    raw = file.read()
    try:
        text = _JsonText(raw.decode().removeprefix(_BOM), name)
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(_encoding_problem(byte, raw[error.start], f"{name}:{line}")) from None
    del raw
    first = text.peek()
    if first == "[":
        yield from _list_rows(text, name)
    elif first:
        yield from _object_rows(text, name)


def _list_rows(text: "_JsonText", name: str) -> Iterator[RowOrProblem]:
    text.position += 1
    number = 0
    while not (text.peek() == "]" and not number):
        number += 1
        yield to_row(text.parse_value(), f"{name}:row {number}")
        if (mark := text.peek()) == "]":
            break
        if mark != ",":
            raise text.syntax_error("Expecting ',' delimiter", text.position)
        text.position += 1
    text.position += 1
    if text.peek():
        raise text.syntax_error("Extra data", text.position)


def _object_rows(text: "_JsonText", name: str) -> Iterator[RowOrProblem]:
    first_line = text.line(text.position)
    value = text.parse_value()
    last_line = text.line(text.position)
    if text.peek():
        if not first_line == last_line < text.line(text.position):
            raise text.syntax_error("Extra data", text.position)
        yield to_row(value, f"{name}:{first_line}")
        yield from json_lines(text.lines(), name)
        return
    rows = value
    if isinstance(value, dict):
        rows = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(rows, list):
        what = "a JSON file must hold a list of objects, or one object for one row"
        raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix="write it as [{...}, {...}]"))
    yield from (to_row(row, f"{name}:row {number}") for number, row in enumerate(rows, start=1))


_NO_SPACE = re.compile(r"[^ \t\n\r]")


class _JsonText:
    """The text of a JSON document. position: where parsing continues."""

    def __init__(self, text: str, name: str):
        self._text, self._name, self.position = text, name, 0

    def line(self, position: int) -> int:
        """The line, from 1, that a position is on."""
        return 1 + self._text.count("\n", 0, position)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        found = _NO_SPACE.search(self._text, self.position)
        self.position = found.start() if found else len(self._text)
        return found[0] if found else ""

    def parse_value(self) -> Any:
        """The JSON value that begins at the next character. Raises DataError."""
        self.peek()
        try:
            try:
                value, self.position = _decode(self._text, self.position)
            except (json.JSONDecodeError, _DuplicateKey):
                raise
            except ValueError:  # an integer of more digits than Python reads
                value, self.position = _decode_long_integers(self._text, self.position)
        except json.JSONDecodeError as error:
            raise self.syntax_error(error.msg, error.pos) from None
        except (RecursionError, _DuplicateKey) as error:
            line = "" if isinstance(error, RecursionError) else f":{self.line(self.position)}"
            raise DataError(_content_problem(error, f"{self._name}{line}", _FIX_FILE)) from None
        return value

    def syntax_error(self, message: str, position: int) -> DataError:
        """The exception for a syntax error at a position."""
        at_end = position >= len(self._text.rstrip())
        where, column = f"{self._name}:{self.line(position)}", position - self._text.rfind("\n", 0, position)
        return DataError(_syntax_problem(message, where, column, at_end, _FIX_FILE))

    def lines(self) -> Iterator[Line]:
        """The lines of the rest that are not blank."""
        lines = self._text[self.position :].split("\n")
        return compress(enumerate(lines, self.line(self.position)), map(str.strip, lines))
