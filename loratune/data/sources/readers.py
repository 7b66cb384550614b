"""Reading CSV, plain text and Parquet files in bounded memory, and decoding the bytes of text files."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from loratune.codes import Code
from loratune.data.sources.rows import BLOCK, MAX_PROBLEMS, Advance, Row, RowOrProblem, Unreadable, rows_per_batch
from loratune.errors import DataError, Problem

BOM = "\ufeff"
csv.field_size_limit(1 << 28)  # csv's own limit of 128 KiB a cell is shorter than a document

# `pre_buffer` holds whole row groups, which are often the whole file.
_STREAMED = {"buffer_size": BLOCK, "pre_buffer": False, "page_checksum_verification": True}


def decode_lines(file: BinaryIO, name: str, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 without their line ends; a BOM is dropped.

    Args:
        file: Read in blocks; it may lie within a gzip file.
        name: The path, for messages.
        problems: Lines that are not UTF-8 are added to it, and yielded all the same; reading stops at `MAX_PROBLEMS`.
    """
    number = 1
    for block in _blocks_of_lines(file):
        lines = _decode_block(block, name, number, problems)
        del block  # a row may be as large as the file: hold it no longer than necessary
        for line in lines:
            yield number, (line.removeprefix(BOM) if number == 1 else line)
            number += 1
        if len(problems) >= MAX_PROBLEMS:
            return


def decode_pieces(file: BinaryIO, name: str, problems: list[Problem]) -> Iterator[str]:
    """The text in non-empty pieces of any length. Arguments as for `decode_lines`; at most one problem a line."""
    number, before, rest = 1, 0, b""  # before: bytes of the line that were decoded already
    for raw in _parts_of_lines(file):
        piece = rest + raw
        try:
            text, rest = piece.decode(), b""
        except UnicodeDecodeError as error:
            cut = not piece.endswith(b"\n") and error.end == len(piece) and error.reason == "unexpected end of data"
            rest = piece[error.start :] if cut and raw else b""
            if not rest and f"{name}:{number}" not in (problem.where for problem in problems):
                problems.append(_encoding_problem(error, f"{name}:{number}", before))
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


def _blocks_of_lines(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of whole lines, each block without the newline at its end."""
    incomplete: list[bytes] = []
    while block := file.read(BLOCK):
        head, newline, tail = block.rpartition(b"\n")
        if not newline:
            incomplete.append(block)
            continue
        incomplete.append(head)
        lines, incomplete = b"".join(incomplete), [tail] if tail else []
        yield lines
    if incomplete:
        yield b"".join(incomplete)


def _parts_of_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their newline, long ones in parts, and empty bytes at the end."""
    while raw := file.readline(BLOCK):
        yield raw
    yield b""


def _decode_block(block: bytes, name: str, number: int, problems: list[Problem]) -> Iterable[str]:
    """The lines of a block whose first line has this number."""
    try:
        text = block.decode()
    except UnicodeDecodeError:
        return _decode_one_by_one(block, name, number, problems)
    lines = text.split("\n")
    return [line.rstrip("\r") for line in lines] if "\r" in text else lines


def _decode_one_by_one(block: bytes, name: str, first: int, problems: list[Problem]) -> Iterator[str]:
    for number, raw in enumerate(block.split(b"\n"), start=first):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")  # go on, so that the lines after it keep their numbers
            problems.append(_encoding_problem(error, f"{name}:{number}", 0))
            if len(problems) >= MAX_PROBLEMS:
                return
        yield text.rstrip("\r")


def _encoding_problem(error: UnicodeDecodeError, where: str, before: int) -> Problem:
    what = f"byte {before + error.start + 1} of the line (0x{error.object[error.start]:02x}) is not UTF-8"
    return Problem(Code.DATA_ENCODING, what, where, fix="save the file as UTF-8")


def csv_rows(lines: Iterator[tuple[int, str]], name: str) -> Iterator[RowOrProblem]:
    """Rows of a CSV file: a header, then records, which take several lines where a quoted cell holds newlines."""
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
    fix = "correct the line, or remove it"
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
                what = f"{len(cells)} cells, but the header has {len(header)} columns"
                yield Problem(Code.DATA_CSV_CELLS, what, where, fix=fix)
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        yield Problem(Code.DATA_CSV, f"not valid CSV: {error}", f"{name}:{number}", fix=fix)


def _header_problem(header: list[str], where: str) -> Problem | None:
    if len(header) == 1 and (separators := {";", "\t"}.intersection(header[0])):
        what = f"the header has no comma, but {' and '.join(map(repr, sorted(separators)))}"
        return Problem(Code.DATA_CSV_SEPARATOR, what, where, fix="write the file with commas between the cells")
    if duplicates := _duplicates(header):
        what = f"the header has {duplicates} more than once"
        return Problem(Code.DATA_DUPLICATE_COLUMN, what, where, fix="rename one of the columns")
    return None


def _duplicates(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name, count in sorted(Counter(names).items()) if count > 1)


def text_rows(lines: Iterator[tuple[int, str]], name: str) -> Iterator[RowOrProblem]:
    """Rows of a plain text file: one text per line; blank lines are skipped."""
    for number, line in lines:
        if line and not line.isspace():
            yield Row(f"{name}:{number}", {"text": line})


def parquet_rows(path: Path, advance: Advance) -> Iterator[RowOrProblem]:
    """Rows of a Parquet file, streamed by record batches.

    Args:
        path: The file.
        advance: See `RowSource.rows`.

    Raises:
        DataError: The file is damaged.
        OSError: It cannot be opened.
    """
    with path.open("rb") as raw:
        try:
            with pq.ParquetFile(raw, **_STREAMED) as file:
                if duplicates := _duplicates(file.schema_arrow.names):
                    what = f"the file has {duplicates} more than once"
                    yield Problem(Code.DATA_DUPLICATE_COLUMN, what, str(path), fix="rename one of the columns")
                    return
                yield from _parquet_rows(file, path, advance)
        except (pa.ArrowException, OSError) as error:
            raise _parquet_error(error, path) from None


def count_parquet_rows(path: Path) -> int:
    """How many rows a Parquet file has by its metadata. Raises as `parquet_rows`."""
    with path.open("rb") as raw:
        try:
            return int(pq.ParquetFile(raw).metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _parquet_error(error, path) from None


def _parquet_rows(file: Any, path: Path, advance: Advance) -> Iterator[RowOrProblem]:
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    size, total, number = path.stat().st_size, file.metadata.num_rows, 0
    sizes = [rows_per_batch(group.total_byte_size, group.num_rows) for group in groups if group.num_rows]
    for batch in file.iter_batches(batch_size=min(sizes, default=1), use_threads=False):
        for values in _batch_values(batch):
            number += 1
            yield Row(f"{path}:row {number}", values)
        advance(size * number // total - size * (number - batch.num_rows) // total)


def _batch_values(batch: Any) -> list[dict[str, Any]]:
    """The fields of each row of a batch; a value that Python has no type for becomes `Unreadable`.

    That is not an error: the format may not read that field.
    """
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        if batch.num_rows > 1:
            return [values for number in range(batch.num_rows) for values in _batch_values(batch.slice(number, 1))]
        return [{name: _value(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}]


def _value(column: Any) -> Any:
    try:
        return column[0].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Unreadable(_first_line(error))


def _parquet_error(error: Exception, path: Path) -> DataError:
    what = f"damaged Parquet file: {_first_line(error)}"
    return DataError(Problem(Code.DATA_FILE_DAMAGED, what, str(path), fix="download it or write it again"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
