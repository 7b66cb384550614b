"""Bytes → text in bounded memory: numbered lines, or pieces; what is not UTF-8 is reported by line and byte."""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from loratune.data.sources.rows import BLOCK, MAX_PROBLEMS
from loratune.errors import Problem

BOM = "\ufeff"


def lines(file: BinaryIO, name: str, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """Numbered lines, without line ends; a BOM is dropped, bytes that are not UTF-8 become problems."""
    number = 1
    for block in _whole_lines(file):
        texts = _texts(block, name, number, problems)
        del block  # a row may be long: hold no more of it than there must be
        for line in texts:
            yield number, (line.removeprefix(BOM) if number == 1 else line)
            number += 1
        if len(problems) >= MAX_PROBLEMS:
            return


def pieces(file: BinaryIO, name: str, problems: list[Problem]) -> Iterator[str]:
    """The text in pieces of any length, never empty; otherwise as `lines`, and at most one problem a line."""
    number, before, rest = 1, 0, b""
    for raw in _short_lines(file):
        piece = rest + raw
        try:
            text, rest = piece.decode(), b""
        except UnicodeDecodeError as error:
            cut = not piece.endswith(b"\n") and error.end == len(piece) and error.reason == "unexpected end of data"
            rest = piece[error.start :] if cut and raw else b""
            if not rest and f"{name}:{number}" not in (problem.where for problem in problems):
                problems.append(_not_text(error, f"{name}:{number}", before))
            text = piece[: len(piece) - len(rest)].decode(errors="replace")
        before += len(piece) - len(rest)
        if number == 1:
            text = text.removeprefix(BOM)
        if piece.endswith(b"\n"):
            number, before = number + 1, 0
        if len(problems) >= MAX_PROBLEMS:
            return
        if text:
            yield text


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of lines, each without the newline at its end."""
    held: list[bytes] = []
    while block := file.read(BLOCK):
        head, newline, tail = block.rpartition(b"\n")
        if not newline:
            held.append(block)
            continue
        held.append(head)
        whole, held = b"".join(held), [tail] if tail else []
        yield whole
    if held:
        yield b"".join(held)


def _short_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their newline, long ones in parts, and an empty one at the end."""
    while raw := file.readline(BLOCK):
        yield raw
    yield b""


def _texts(block: bytes, name: str, number: int, problems: list[Problem]) -> Iterable[str]:
    try:
        text = block.decode()
    except UnicodeDecodeError:
        return _line_by_line(block, name, number, problems)
    lines = text.split("\n")
    return [line.rstrip("\r") for line in lines] if "\r" in text else lines


def _line_by_line(block: bytes, name: str, number: int, problems: list[Problem]) -> Iterator[str]:
    for here, raw in enumerate(block.split(b"\n"), start=number):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")  # read on, so that the lines after it keep their numbers
            problems.append(_not_text(error, f"{name}:{here}", 0))
            if len(problems) >= MAX_PROBLEMS:
                return
        yield text.rstrip("\r")


def _not_text(error: UnicodeDecodeError, where: str, before: int) -> Problem:
    what = f"byte {before + error.start + 1} of the line (0x{error.object[error.start]:02x}) is not UTF-8"
    return Problem(what, where, fix="save the file as UTF-8")
