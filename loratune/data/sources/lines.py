"""JSON lines, CSV and plain text: a row, or what is wrong with it, for each line or record."""

import csv
import json
from collections.abc import Iterator

from loratune.data.sources.rows import Item, Row, mapping, once, whole
from loratune.errors import Problem

csv.field_size_limit(1 << 28)  # csv's own limit of 128 KiB a cell is shorter than a document

Lines = Iterator[tuple[int, str]]

_MEND = "mend the line, or take it out"
_decode = json.JSONDecoder(object_pairs_hook=once).raw_decode


def jsonl(lines: Lines, name: str) -> Iterator[Item]:
    """One object a line; blank lines are no rows."""
    for number, line in lines:
        where = f"{name}:{number}"
        try:
            values, end = _decode(line)
        except (ValueError, RecursionError):
            end = -1
        if end == len(line):  # the common case; `json.loads` takes twice the time
            yield mapping(values, where)
        elif line and not line.isspace():
            yield _loaded(line, where)


def _loaded(line: str, where: str) -> Item:
    try:
        return mapping(json.loads(line, object_pairs_hook=once, parse_int=whole), where)
    except (ValueError, RecursionError) as error:
        return Problem(f"not valid JSON: {_reason(error)}", where, fix=_MEND)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return reason(error.msg, error.colno, error.pos >= len(error.doc.rstrip()))
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def reason(message: str, column: int, at_end: bool) -> str:
    """Why a text is not JSON. at_end: the decoder found nothing wrong before the text stopped."""
    return f"{'cut off' if at_end or 'Unterminated' in message else message} at column {column}"


def csv_records(lines: Lines, name: str) -> Iterator[Item]:
    """A header, then one record a line, or several lines where a quoted cell holds newlines."""
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            where, number = f"{name}:{number}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if problem := _header_problem(header, where):
                    yield problem
                    return
            elif len(cells) != len(header):
                yield Problem(f"{len(cells)} cells, but the header names {len(header)}", where, fix=_MEND)
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        yield Problem(f"not valid CSV: {error}", f"{name}:{number}", fix=_MEND)


def _header_problem(header: list[str], where: str) -> Problem | None:
    if len(header) == 1 and (separators := {";", "\t"}.intersection(header[0])):
        what = f"the header has no comma, but {' and '.join(map(repr, sorted(separators)))}"
        return Problem(what, where, fix="write the file with commas between the cells")
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        return Problem(f"the header names {', '.join(doubled)} more than once", where, fix="rename one")
    return None


def txt(lines: Lines, name: str) -> Iterator[Item]:
    """One text a line; blank lines are no rows."""
    for number, line in lines:
        if line and not line.isspace():
            yield Row(f"{name}:{number}", {"text": line})
