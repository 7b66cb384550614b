"""JSON lines, and JSON documents: lists of objects are streamed, other documents are read as a whole."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from loratune.codes import Code
from loratune.data.sources.rows import BLOCK, Block, RowOrProblem, Unreadable, nonblank_lines, to_row
from loratune.errors import DataError, Problem

_LONGEST_TOKEN = 16
"""More characters than any JSON literal or escape has that may be cut in two at the end of a piece of text."""

_NO_SPACE = re.compile(r"[^ \t\n\r]")


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


def json_lines(blocks: Iterable[Block], name: str) -> Iterator[RowOrProblem]:
    """Rows of a file with one JSON object per line; blank lines are skipped."""
    for numbered in nonblank_lines(blocks):
        if isinstance(numbered, Problem):
            yield numbered
            continue
        number, line = numbered
        where = f"{name}:{number}"
        try:
            values, end = _decode(line)
        except (ValueError, RecursionError):
            end = -1
        # the common case, in half the time of `json.loads`
        yield to_row(values, where) if end == len(line) else _parse_line(line, where)


def _parse_line(line: str, where: str) -> RowOrProblem:
    fix = "correct the line, or remove it"
    try:
        return to_row(json.loads(line, object_pairs_hook=_unique, parse_int=_integer), where)
    except json.JSONDecodeError as error:
        return _syntax_problem(error.msg, where, error.colno, error.pos >= len(error.doc.rstrip()), fix)
    except RecursionError:
        return _depth_problem(where, fix)
    except _DuplicateKey as error:
        return _duplicate_problem(error, where, fix)


def _syntax_problem(message: str, where: str, column: int, at_end: bool, fix: str) -> Problem:
    """at_end: the decoder found nothing wrong before the text stopped."""
    if at_end or "Unterminated" in message:
        return Problem(Code.DATA_JSON_CUT_OFF, f"the JSON is cut off at column {column}", where, fix=fix)
    return Problem(Code.DATA_JSON, f"not valid JSON: {message} at column {column}", where, fix=fix)


def _depth_problem(where: str, fix: str) -> Problem:
    return Problem(Code.DATA_JSON_DEPTH, "the JSON is nested too deeply to be read", where, fix=fix)


def _duplicate_problem(error: _DuplicateKey, where: str, fix: str) -> Problem:
    return Problem(Code.DATA_JSON_DUPLICATE_KEY, f"an object has the key `{error}` twice", where, fix=fix)


class _TextBuffer:
    """The text of a document, read piece by piece and dropped once it is parsed.

    Attributes:
        text: What was read and not yet dropped.
        position: Where in `text` parsing goes on.
    """

    _FIX = "correct the file, or write it again"

    def __init__(self, pieces: Iterator[str], name: str):
        self._pieces, self._name = pieces, name
        self._line, self._column = 1, 0  # of the first character of `text`: line from 1, characters before it
        self.text, self.position = "", 0
        self._decode = _decode

    def read_more(self) -> bool:
        """Read at least as much as is unparsed, so that parsing it once more costs little; False at the end."""
        pieces: list[str] = []
        length, min_length = 0, max(BLOCK, len(self.text) - self.position)
        while length < min_length and (piece := next(self._pieces, "")):
            pieces.append(piece)
            length += len(piece)
        if pieces:
            self._line, self._column = self.line(self.position), self.column(self.position) - 1
            self.text, self.position = "".join([self.text[self.position :], *pieces]), 0
        return bool(pieces)

    def line(self, position: int) -> int:
        """The line of the document, from 1, that a position in `text` is on."""
        return self._line + self.text.count("\n", 0, position)

    def column(self, position: int) -> int:
        """The column, from 1, of a position in `text`."""
        start = self.text.rfind("\n", 0, position) + 1
        return position - start + 1 + (0 if start else self._column)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            if found := _NO_SPACE.search(self.text, self.position):
                self.position = found.start()
                return found[0]
            self.position = len(self.text)
            if not self.read_more():
                return ""

    def parse_value(self) -> Any:
        """The JSON value that begins at the next character. Raises DataError."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_incomplete = error.pos >= len(self.text) - _LONGEST_TOKEN or "Unterminated" in error.msg
                if not (is_incomplete and self.read_more()):
                    raise self.syntax_error(error.msg, error.pos) from None
            except RecursionError:
                raise DataError(_depth_problem(self._name, self._FIX)) from None
            except _DuplicateKey as error:
                where = f"{self._name}:{self.line(self.position)}"
                raise DataError(_duplicate_problem(error, where, self._FIX)) from None
            except ValueError:  # an integer of more digits than Python reads
                if self._decode is _decode_long_integers:
                    raise
                self._decode = _decode_long_integers
            else:
                if end < len(self.text) or not self.read_more():
                    self.position = end
                    return value

    def syntax_error(self, message: str, position: int) -> DataError:
        """The exception for a syntax error at a position in `text`."""
        at_end = position >= len(self.text.rstrip()) and not self.read_more()
        where, column = f"{self._name}:{self.line(position)}", self.column(position)
        return DataError(_syntax_problem(message, where, column, at_end, self._FIX))

    def blocks(self) -> Iterator[Block]:
        """The unparsed rest."""
        number = self.line(self.position)
        while True:
            end = self.text.rfind("\n", self.position)
            if end < 0 and self.read_more():
                continue
            block = Block(number, self.text[self.position : end if end >= 0 else len(self.text)])
            yield block
            if end < 0:
                return
            self.position, number = end + 1, number + block.text.count("\n") + 1


def json_document(pieces: Iterator[str], name: str) -> Iterator[RowOrProblem]:
    """Rows of a JSON document: a list of objects, the list under its key `data`, or one object.

    JSON lines in a file that is called .json are recognised and read as such.

    Raises:
        DataError: It is not a JSON document.
    """
    buffer = _TextBuffer(pieces, name)
    first = buffer.peek()
    if first == "[":
        yield from _list_rows(buffer, name)
    elif first:
        yield from _object_rows(buffer, name)


def _list_rows(buffer: _TextBuffer, name: str) -> Iterator[RowOrProblem]:
    buffer.position += 1
    number = 0
    while not (buffer.peek() == "]" and not number):
        number += 1
        yield to_row(buffer.parse_value(), f"{name}:row {number}")
        if (mark := buffer.peek()) == "]":
            break
        if mark != ",":
            raise buffer.syntax_error("Expecting ',' delimiter", buffer.position)
        buffer.position += 1
    buffer.position += 1
    if buffer.peek():
        raise buffer.syntax_error("Extra data", buffer.position)


def _object_rows(buffer: _TextBuffer, name: str) -> Iterator[RowOrProblem]:
    buffer.peek()
    first_line = buffer.line(buffer.position)
    value = buffer.parse_value()
    last_line = buffer.line(buffer.position)
    if buffer.peek():
        if not first_line == last_line < buffer.line(buffer.position):
            raise buffer.syntax_error("Extra data", buffer.position)
        yield to_row(value, f"{name}:{first_line}")
        yield from json_lines(buffer.blocks(), name)
        return
    rows = value
    if isinstance(value, dict):
        rows = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(rows, list):
        what = "a JSON file must hold a list of objects, or one object for one row"
        raise DataError(Problem(Code.DATA_ROW_NOT_OBJECT, what, name, fix="write it as [{...}, {...}]"))
    for number, row in enumerate(rows, start=1):
        yield to_row(row, f"{name}:row {number}")
