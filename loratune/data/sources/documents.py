"""A JSON document: a list of objects is streamed; one object, or the list under its key `data`, is read as a whole."""

import json
from collections.abc import Iterator
from typing import Any

from loratune.data.sources import lines
from loratune.data.sources.rows import BLOCK, Item, mapping, once, whole
from loratune.errors import Problem

_decode = json.JSONDecoder(object_pairs_hook=once).raw_decode
_decode_any = json.JSONDecoder(object_pairs_hook=once, parse_int=whole).raw_decode
"""For numbers of any length: slower, since each goes through Python."""

_MEND = "mend the file, or write it again"
_TAIL = 16  # longer than any literal or escape that a piece of text may be cut off in


class _Refused(Exception):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem


class _Text:
    """A text that is read piece by piece and forgotten behind `at`; it knows its lines and columns."""

    def __init__(self, pieces: Iterator[str], name: str):
        self._pieces, self._name = pieces, name
        self._line, self._column = 1, 0  # newlines before `held`, from 1; characters of the line before `held`
        self.held, self.at = "", 0
        self._decode = _decode

    def more(self) -> bool:
        """Read on, by at least as much as is held, so that trying again costs little; False at the end."""
        new: list[str] = []
        length, wanted = 0, max(BLOCK, len(self.held) - self.at)
        while length < wanted and (piece := next(self._pieces, "")):
            new.append(piece)
            length += len(piece)
        if new:
            self._line, self._column = self.line(self.at), self.column(self.at) - 1
            self.held, self.at = "".join([self.held[self.at :], *new]), 0
        return bool(new)

    def line(self, position: int) -> int:
        """The number of the line that a position in `held` is on, from 1."""
        return self._line + self.held.count("\n", 0, position)

    def column(self, position: int) -> int:
        """The column of a position in `held`, from 1."""
        start = self.held.rfind("\n", 0, position) + 1
        return position - start + 1 + (0 if start else self._column)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.held):
                if self.held[self.at] not in " \t\n\r":
                    return self.held[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """The JSON value that begins at the next character. Raises _Refused."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self.held, self.at)
            except json.JSONDecodeError as error:
                in_tail = error.pos >= len(self.held) - _TAIL or "Unterminated" in error.msg
                if not (in_tail and self.more()):
                    raise self.refused(error.msg, error.pos) from None
            except RecursionError:
                raise _Refused(Problem("not valid JSON: nested too deeply", self._name, fix=_MEND)) from None
            except ValueError as error:
                if self._decode is _decode:  # a number of more digits than Python reads, or what `once` refuses
                    self._decode = _decode_any
                    continue
                where = f"{self._name}:{self.line(self.at)}"
                raise _Refused(Problem(f"not valid JSON: {error}", where, fix=_MEND)) from None
            else:
                if end < len(self.held) or not self.more():
                    self.at = end
                    return value

    def refused(self, message: str, position: int) -> _Refused:
        """What to raise about a position in `held`."""
        at_end = position >= len(self.held.rstrip()) and not self.more()
        what = f"not valid JSON: {lines.reason(message, self.column(position), at_end)}"
        return _Refused(Problem(what, f"{self._name}:{self.line(position)}", fix=_MEND))

    def lines(self) -> Iterator[tuple[int, str]]:
        """What is left, as numbered lines."""
        number = self.line(self.at)
        while True:
            end = self.held.find("\n", self.at)
            if end < 0 and self.more():
                continue
            line = self.held[self.at : end if end >= 0 else len(self.held)]
            yield number, line.rstrip("\r")
            if end < 0:
                return
            number, self.at = number + 1, end + 1


def document(pieces: Iterator[str], name: str) -> Iterator[Item]:
    """The rows of a document; JSON lines under the name of JSON are read as such."""
    text = _Text(pieces, name)
    try:
        first = text.peek()
        if first == "[":
            yield from _array(text, name)
        elif first:
            yield from _object(text, name)
    except _Refused as refused:
        yield refused.problem


def _array(text: _Text, name: str) -> Iterator[Item]:
    text.at += 1
    number = 0
    while not (text.peek() == "]" and not number):
        number += 1
        yield mapping(text.value(), f"{name}:row {number}")
        if (mark := text.peek()) == "]":
            break
        if mark != ",":
            raise text.refused("Expecting ',' delimiter", text.at)
        text.at += 1
    text.at += 1
    if text.peek():
        raise text.refused("Extra data", text.at)


def _object(text: _Text, name: str) -> Iterator[Item]:
    text.peek()
    line = text.line(text.at)
    values = text.value()
    end = text.line(text.at)
    if text.peek():
        if not line == end < text.line(text.at):
            raise text.refused("Extra data", text.at)
        yield mapping(values, f"{name}:{line}")
        yield from lines.jsonl(text.lines(), name)
        return
    rows = values
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        yield Problem("expected a list of objects", name, fix="one object is one row")
        return
    for number, row in enumerate(rows, start=1):
        yield mapping(row, f"{name}:row {number}")
