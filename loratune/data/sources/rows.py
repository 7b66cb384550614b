"""Rows and their places, readers of text files, and writers of rows.

JSON lines, CSV and plain text are read block by block, JSON documents whole. Unlike readers of other libraries, these
report the line of every row and problem, continue after an invalid row, and name the byte that is not UTF-8.
A BOM, CRLF and blank lines are accepted in every kind of file.
"""

import base64
import csv
import datetime
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, groupby
from typing import Any, BinaryIO, TextIO

from loratune.codes import Code
from loratune.errors import DataError, Problem

BLOCK = 1 << 20
"""Bytes that are read and held at a time."""
csv.field_size_limit(1 << 28)  # csv's own limit of 128 KiB a cell is shorter than a document
_BOM = "\ufeff"
_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as decoded by `surrogateescape`; valid UTF-8 never decodes to these characters."""
_CSV_PIECE = re.compile(r"[^\n]*\n+|[^\n]+")
"""A line with the blank lines after it, which `csv.reader` takes at once, between records and within a cell."""
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<separator>[^\w\s"]|\t)"?(?P=separator)*', re.IGNORECASE)
"""The line before the header by which Excel knows the separator; some programs quote it, or give it empty cells."""
_FIX_LINE, _FIX_FILE = "correct the line, or remove it", "correct the file, or write it again"
_FIX_ENCODING = "save the file as UTF-8"

MAX_PROBLEMS = 10
"""The number of problems of a source at which reading stops."""
_SINGLY = 3
"""Up to this many problems that differ only in the row are listed one by one; more are merged into one with a count."""


def reported(problems: Sequence[Problem], source: str = "") -> list[Problem]:
    """The problems of rows, shortened for display.

    Args:
        problems: The problems, in the order of rows; `MAX_PROBLEMS` or more mean that there may be others.
        source: The source of the rows.

    Returns:
        At most `MAX_PROBLEMS` problems. More than three that differ only in the row are merged into the first, with
        a count. A last one notes that there may be more, unless all are of one kind.
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
    """The problem without its place, and its file or split."""
    return replace(problem, where=""), place_parts(problem.where)[0]


def line_of(where: str) -> str:
    """The number in a place, see `place_parts`."""
    return place_parts(where)[1]


def place_parts(where: str) -> tuple[str, str, str]:
    """A place split into prefix, number and suffix: `rows.jsonl:12`, `rows.parquet:row 12`, `train[12]`."""
    body = where.removesuffix("]")
    before = body.rstrip("0123456789")
    return before, body[len(before) :], where[len(body) :]


@dataclass(frozen=True)
class Row:
    """One row of the data, unchanged.

    Attributes:
        where: Its place, counted from 1: `file:line`, `file:row N` or `hub-id[split]:N`; or from 0, `name[N]`.
        values: Its fields under the names of the data.
    """

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a value that Python cannot represent, such as a date after the year 9999. reason: why."""

    reason: str


RowOrProblem = Row | Problem
"""What a reader yields for each row: the row, or the problem with it."""


def place_in_cache(where: str) -> str:
    """The place of a row as valid UTF-8: paths may contain other bytes."""
    return where.encode(errors="backslashreplace").decode()


def to_row(values: Any, where: str) -> RowOrProblem:
    """A JSON value as a row; a problem if the value is not an object."""
    if isinstance(values, dict):
        return Row(where, values)
    kinds = {type(None): "null", bool: "true or false", list: "a list", str: "text", int: "a number", float: "a number"}
    kind = values.reason if isinstance(values, Unreadable) else kinds.get(type(values), type(values).__name__)
    what = f"a row must be an object with named fields, got {kind}"
    return Problem(Code.DATA_SYNTAX, what, where, fix="write each row as {...}")


def to_json_line(values: Mapping[str, Any]) -> str:
    """The fields of a row as one line of JSON.

    Values without a JSON type become text: dates in ISO 8601, bytes as UTF-8, otherwise base64. An `Unreadable`
    becomes null. If there is a lone surrogate, the line is pure ASCII with escapes.
    """
    line = json.dumps(values, ensure_ascii=False, default=_to_json_value)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(values, default=_to_json_value)
    return line


def write_csv(rows: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    """Write rows with a column for each field that occurs.

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
    """The fields of a row, followed by the results of a command for it.

    No field is lost. A field with the name of a result is renamed to `row_NAME`; a `completion`, the expected answer,
    is renamed to `reference` unless the row has a field of that name.
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


# Text files


def _text_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str | Problem]]:
    """The numbers of the non-blank lines of a file, each with the line, or with its problem if it is not UTF-8."""
    number = 1
    while block := file.read(BLOCK) + file.readline():
        first, number = number, number + block.count(b"\n")
        if block.isspace():
            continue
        lines = block.split(b"\n")
        del block  # a line may be as large as the file
        for place, raw in compress(enumerate(lines, first), map(bytes.strip, lines)):
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                yield place, _encoding_problem(error.start + 1, raw[error.start], f"{name}:{place}")
                continue
            text = (text.removeprefix(_BOM) if place == 1 else text).rstrip("\r")
            if text.strip():
                yield place, text


def _encoding_problem(byte: int, value: int, where: str) -> Problem:
    what = f"byte {byte} of the line (0x{value:02x}) is not UTF-8"
    return Problem(Code.DATA_SYNTAX, what, where, fix=_FIX_ENCODING)


def _whole_text(file: BinaryIO, name: str) -> str | Problem:
    """The text of a file without its BOM, or the problem of the first byte that is not UTF-8."""
    raw = file.read()
    try:
        return raw.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        return _encoding_problem(byte, raw[error.start], f"{name}:{line}")


def line_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a text file: one text per line; blank lines are skipped. name: the path, for messages."""
    for number, line in _text_lines(file, name):
        yield line if isinstance(line, Problem) else Row(f"{name}:{number}", {"text": line})


def paragraph_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a text file: one text per paragraph, the lines between blank lines. A paragraph with a line that is not
    UTF-8 is that problem only."""
    # As long as no line is blank, the numbers of lines and those of non-blank lines grow alike.
    for _, lines in groupby(enumerate(_text_lines(file, name)), lambda item: item[1][0] - item[0]):
        numbers, paragraph = zip(*(line for _, line in lines), strict=True)
        problem = next((line for line in paragraph if isinstance(line, Problem)), None)
        yield problem or Row(f"{name}:{numbers[0]}", {"text": "\n".join(paragraph)})


def document_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """The row of a text file that is one document, with LF instead of CRLF; none if it is blank."""
    text = _whole_text(file, name)
    if isinstance(text, Problem):
        yield text
    elif text and not text.isspace():
        yield Row(f"{name}:1", {"text": text.replace("\r\n", "\n")})


class _CsvLines:
    """The text of a CSV file: each line with the blank lines after it. number: of the line after those taken."""

    def __init__(self, file: BinaryIO):
        self.number = 1
        self._text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")

    def __iter__(self) -> Iterator[str]:
        while block := self._text.read(BLOCK) + self._text.readline():
            for piece in _CSV_PIECE.findall(block):
                self.number += piece.count("\n")
                yield piece


def csv_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a CSV file: a header, then records, which take several lines where a quoted cell holds newlines.

    A line `sep=;` before the header gives another separator than a comma. Empty columns at the end, which spreadsheets
    write, are left out.

    Raises:
        DataError: The header is not valid, or a record of several lines is not valid: its quoted cell may contain any
            number of records.
    """
    lines, header, separator = _CsvLines(file), list[str](), ""
    text = iter(lines)
    while True:
        line = lines.number
        if (first := next(text, None)) is None:
            return
        if not first.strip("\r\n"):
            continue
        if not (header or separator) and (match := _SEPARATOR_LINE.fullmatch(first.rstrip("\r\n"))):
            separator = match["separator"]
            continue
        reader = csv.reader(chain((first,), text), delimiter=separator or ",", strict=True)
        try:
            cells = next(reader)
        except csv.Error as error:
            problem = Problem(Code.DATA_SYNTAX, f"not valid CSV: {error}", f"{name}:{line}", fix=_FIX_LINE)
            if not header or reader.line_num > 1:
                raise DataError(problem) from None
            yield problem
            continue
        if cells and header:
            yield _record(cells, header, name, line)
        elif cells:
            header = _header(_without_empty_end(cells, 1), name, line, separator)


def _record(cells: list[str], header: list[str], name: str, line: int) -> RowOrProblem:
    where = f"{name}:{line}"
    if problem := _byte_problem(cells, name, line):
        return problem
    cells = _without_empty_end(cells, len(header))
    if len(cells) != len(header):
        what = f"{len(cells)} cells, but the header has {len(header)} columns"
        return Problem(Code.DATA_SYNTAX, what, where, fix=_FIX_LINE)
    return Row(where, {column: cell.replace("\r\n", "\n") for column, cell in zip(header, cells, strict=True)})


def _without_empty_end(cells: list[str], least: int) -> list[str]:
    count = len(cells)
    while count > least and not cells[count - 1]:
        count -= 1
    return cells[:count]


def _byte_problem(cells: list[str], name: str, line: int) -> Problem | None:
    text = "".join(cells)
    if text.isascii() or not (bad := _BAD_BYTE.search(text)):
        return None
    what = f"the line has the byte 0x{ord(bad[0]) - 0xDC00:02x}, which is not UTF-8"
    line += text.count("\n", 0, bad.start())
    return Problem(Code.DATA_SYNTAX, what, f"{name}:{line}", fix=_FIX_ENCODING)


def _header(names: list[str], name: str, line: int, separator: str) -> list[str]:
    """The names of the columns. separator: as the file names it. Raises DataError: they are not valid."""
    where = f"{name}:{line}"
    problem = _byte_problem(names, name, line) or duplicate_columns(names, where)
    if len(names) == 1 and not separator and (others := {";", "\t"}.intersection(names[0])):
        what = f"the header has no comma, but {' and '.join(map(repr, sorted(others)))}"
        fix = (
            "write the file with commas between the cells, or a line before the header that names the separator: sep=;"
        )
        problem = Problem(Code.DATA_SYNTAX, what, where, fix=fix)
    if problem:
        raise DataError(problem)
    return names


def is_doubtful_header(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether the header of a CSV file looks like a row, by the first rows.

    It does if a name is one of several values of its column, as a class is; if it is a number, as all values of its
    column are; or if it is a long text, or a sentence where no other name looks like that of a column.
    """
    numbers = [*map(str, range(len(names) + 1))]
    if [*names] in (numbers[:-1], numbers[1:]):  # those that pandas and spreadsheets give
        return False
    rows = [row for row in rows if any(name != row[name] for name in names)]  # a header may be repeated
    if any(_is_value(name, [row[name] for row in rows if row[name]]) for name in names):
        return True
    words = [len(name.split()) for name in names]
    is_named = any(_COLUMN_NAME.fullmatch(name) for name in names)
    return max(words) >= _LONG or (max(words) >= _SENTENCE and not is_named)


_SENTENCE, _LONG = 6, 20
"""Words from which a name is a sentence; and from which no file of a survey has such questions as its header."""
_COLUMN_NAME = re.compile(r"[a-z]\w*|\w+_\w+|(?i:timestamp|date|id|name|url)")
_NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)?\s*")
_YEAR = re.compile(r"(19|20)\d\d")


def _is_value(name: str, values: Sequence[str]) -> bool:
    """Whether the name of a column is rather one of its values."""
    if _NUMBER.fullmatch(name) and not _YEAR.fullmatch(name) and values and all(map(_NUMBER.fullmatch, values)):
        return True
    count = values.count(name)
    return count > len(values) // 500 and len({*values}) > 1


def duplicate_columns(names: Iterable[str], where: str) -> Problem | None:
    """A problem if two columns of a table have the same name."""
    if names := [f"`{name}`" for name, count in sorted(Counter(names).items()) if count > 1]:
        what = f"more than one column is called {', '.join(names)}"
        return Problem(Code.DATA_SYNTAX, what, where, fix="rename one of the columns")
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    values = dict(pairs)
    return values if len(values) == len(pairs) else repeated_key([name for name, _ in pairs])


def repeated_key(names: Sequence[str]) -> Unreadable:
    """What stands for an object with these keys, one of them repeated."""
    name = next(name for name, count in Counter(names).items() if count > 1)
    return Unreadable(f"an object with the key `{name}` twice")


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def jsonl_rows(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a file with one JSON object per line; blank lines are skipped. name: the path, for messages."""
    for number, line in _text_lines(file, name):
        if isinstance(line, Problem):
            yield line
            continue
        where = f"{name}:{number}"
        try:
            yield to_row(_decode(line), where)
        except (ValueError, RecursionError) as error:
            yield _json_problem(error, where, _FIX_LINE)


def _json_problem(error: ValueError | RecursionError, where: str, fix: str) -> Problem:
    if isinstance(error, RecursionError):
        what = "the JSON is nested too deeply to be read"
    elif not isinstance(error, json.JSONDecodeError):  # Python reads numbers of at most 4,300 digits
        what = "the JSON has a number of too many digits to be read"
    elif error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg:
        what = f"the JSON is cut off at column {error.colno}"
    else:
        what = f"not valid JSON: {error.msg} at column {error.colno}"
    return Problem(Code.DATA_SYNTAX, what, where, fix=fix)


def json_document(file: BinaryIO, name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON document: a list of objects, the list under its key `data`, or one object.

    The document is held in memory. A .json file of JSON lines is read as JSON lines.

    Raises:
        DataError: It is not a JSON document, or not UTF-8.
    """
    text = _whole_text(file, name)
    if isinstance(text, Problem):
        raise DataError(text)
    if not text or text.isspace():
        return
    try:
        rows = _decode(text)
    except (ValueError, RecursionError) as error:
        where = name
        if isinstance(error, json.JSONDecodeError):
            where, (first, newline, rest) = f"{name}:{error.lineno}", text[: error.pos].lstrip().partition("\n")
            if error.msg == "Extra data" and first[:1] == "{" and newline and not rest.strip():
                file.seek(0)
                yield from jsonl_rows(file, name)
                return
        raise DataError(_json_problem(error, where, _FIX_FILE)) from None
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        what = "a JSON file must hold a list of objects, or one object for one row"
        raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix="write it as [{...}, {...}]"))
    yield from (to_row(row, f"{name}:row {number}") for number, row in enumerate(rows, start=1))
