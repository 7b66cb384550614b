"""Reading CSV, plain text and Parquet files in bounded memory, and decoding the bytes of text files."""

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from loratune.codes import Code
from loratune.data.sources.rows import (
    BLOCK,
    MAX_PROBLEMS,
    Advance,
    Block,
    Row,
    RowOrProblem,
    Unreadable,
    nonblank_lines,
    rows_per_batch,
    split_lines,
)
from loratune.errors import DataError, Problem

BOM = "\ufeff"
csv.field_size_limit(1 << 28)  # csv's own limit of 128 KiB a cell is shorter than a document

# `pre_buffer` holds whole row groups, which are often the whole file.
_STREAMED = {"buffer_size": BLOCK, "pre_buffer": False, "page_checksum_verification": True}

_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as `surrogateescape` decodes it: what is UTF-8 never becomes one of these."""
_NO_NEWLINE = re.compile(r"[^\n]")


def decode_blocks(file: BinaryIO, name: str) -> Iterator[Block]:
    """The text of a file in blocks of whole lines; a BOM is dropped.

    Args:
        file: Read in blocks; it may lie within a gzip file.
        name: The path, for messages.
    """
    number = 1
    for block in _blocks_of_lines(file):
        first, number = number, number + block.count(b"\n") + 1
        try:
            text = block.decode()
        except UnicodeDecodeError:
            yield from _decode_around_bad_lines(block, name, first)
            continue
        del block  # a row may be as large as the file: hold it no longer than necessary
        yield Block(first, text.removeprefix(BOM) if first == 1 else text)


def decode_pieces(file: BinaryIO, name: str) -> Iterator[str]:
    """The text of a file in non-empty pieces of any length. Arguments as for `decode_blocks`.

    Raises:
        DataError: It is not UTF-8; the first lines with bad bytes are named.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    number, before = 1, 0  # the line that the next piece begins in, and the bytes of it that were decoded already
    problems: list[Problem] = []
    raw = b" "
    while raw and len(problems) < MAX_PROBLEMS:
        raw = file.read(BLOCK)
        text = decoder.decode(raw, final=not raw)
        for *_, problem in islice(_bad_lines(text, name, number, before), MAX_PROBLEMS):
            if not problems or problem.where != problems[-1].where:
                problems.append(problem)
        if not problems and (piece := text.removeprefix(BOM) if (number, before) == (1, 0) else text):
            yield piece
        tail = len(text[text.rfind("\n") + 1 :].encode(errors="surrogateescape"))
        number, before = number + text.count("\n"), tail if "\n" in text else before + tail
    if problems:
        raise DataError(problems)


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


def _decode_around_bad_lines(block: bytes, name: str, first: int) -> Iterator[Block]:
    """The lines of a block that is not UTF-8; csv needs the bad ones too, so that later ones keep their numbers."""
    whole = block.decode(errors="surrogateescape")
    text = whole.removeprefix(BOM) if first == 1 else whole
    number, position = first, 0
    for line, start, end, problem in _bad_lines(text, name, first, len(BOM.encode()) if text is not whole else 0):
        if start > position:
            yield Block(number, text[position : start - 1])
        yield Block(line, _BAD_BYTE.sub("\ufffd", text[start:end]), problem)
        number, position = line + 1, end + 1
    if position <= len(text):
        yield Block(number, text[position:])


def _bad_lines(text: str, name: str, number: int, before: int) -> Iterator[tuple[int, int, int, Problem]]:
    """The lines that hold bytes that are not UTF-8, as `surrogateescape` decodes them.

    Args:
        text: The decoded text.
        name: The path, for messages.
        number: The number of its first line.
        before: How many bytes of that line come before the text.

    Yields:
        The number of the line, where it begins and ends in the text, and what is wrong with it.
    """
    start = 0
    while bad := _BAD_BYTE.search(text, start):
        line = text.rfind("\n", start, bad.start()) + 1 or start
        number += text.count("\n", start, line)
        byte = len(text[line : bad.start()].encode()) + (0 if line else before) + 1
        what = f"byte {byte} of the line (0x{ord(bad[0]) - 0xDC00:02x}) is not UTF-8"
        end = text.find("\n", bad.end())
        end = end if end >= 0 else len(text)
        yield number, line, end, Problem(Code.DATA_ENCODING, what, f"{name}:{number}", fix="save the file as UTF-8")
        start, number = end + 1, number + 1


def csv_rows(blocks: Iterable[Block], name: str) -> Iterator[RowOrProblem]:
    """Rows of a CSV file: a header, then records, which take several lines where a quoted cell holds newlines.

    Raises:
        DataError: The header cannot be used, or a record of several lines is not valid: nobody knows how many records
            its quoted cell has swallowed.
    """
    text, cells = _CsvText(blocks), list[str]()
    reader = csv.reader(text, strict=True)
    header: list[str] = []
    problem: Problem | None
    while True:
        text.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what, fix = f"not valid CSV: {error}", "correct the line, or remove it"
            problem = text.problem or Problem(Code.DATA_CSV, what, f"{name}:{text.first}", fix=fix)
            if text.number > text.first + 1:
                raise DataError(problem) from None
        else:
            problem = text.problem
            if len(cells) != len(header) and not problem:
                problem = _record_problem(cells, header, f"{name}:{text.first}")
        if problem and not header:
            raise DataError(problem)
        if header:
            yield problem or Row(f"{name}:{text.first}", dict(zip(header, cells, strict=True)))
        header = header or cells


class _CsvText:
    """The text of a CSV file for `csv.reader`, which takes as many pieces of it as a record has.

    Runs of blank lines between records are passed over at once, and lines within a quoted cell come together.

    Attributes:
        first: The line that the record begins on.
        number: The line that follows what was taken.
        problem: Set where a line of the record is not UTF-8.
    """

    def __init__(self, blocks: Iterable[Block]):
        self._pieces, self._between = self._split(blocks), True
        self.first = self.number = 1
        self.problem: Problem | None = None

    def begin_record(self) -> None:
        """The record that was being read has ended."""
        self._between, self.problem = True, None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _split(self, blocks: Iterable[Block]) -> Iterator[str]:
        for block in blocks:
            text = "\n".join(split_lines(block.text)) if "\r" in block.text else block.text
            text, start, self.number = f"{text}\n", 0, block.first
            while start < len(text):
                if not self._between:  # only a quotation mark can end the cell
                    quote = text.find('"', start)
                    end = text.find("\n", quote) + 1 if quote >= 0 else len(text)
                    self.number += text.count("\n", start, end)
                else:
                    if text[start] == "\n":
                        written = _NO_NEWLINE.search(text, start)
                        if not written:
                            break
                        self.number += written.start() - start
                        start = written.start()
                    end = text.find("\n", start) + 1
                    self.first, self._between = self.number, False
                    self.number += 1
                if block.problem and not self.problem:
                    self.problem = block.problem
                yield text[start:end]
                start = end


def _record_problem(cells: list[str], header: list[str], where: str) -> Problem | None:
    """What is wrong with a record that is not as long as the header, or with the header, where there is none yet."""
    if header:
        what = f"{len(cells)} cells, but the header has {len(header)} columns"
        return Problem(Code.DATA_CSV_CELLS, what, where, fix="correct the line, or remove it")
    if len(cells) == 1 and (separators := {";", "\t"}.intersection(cells[0])):
        what = f"the header has no comma, but {' and '.join(map(repr, sorted(separators)))}"
        return Problem(Code.DATA_CSV_SEPARATOR, what, where, fix="write the file with commas between the cells")
    if duplicates := _duplicates(cells):
        what = f"the header has {duplicates} more than once"
        return Problem(Code.DATA_DUPLICATE_COLUMN, what, where, fix="rename one of the columns")
    return None


def _duplicates(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name, count in sorted(Counter(names).items()) if count > 1)


def text_rows(blocks: Iterable[Block], name: str) -> Iterator[RowOrProblem]:
    """Rows of a plain text file: one text per line; blank lines are skipped."""
    for line in nonblank_lines(blocks):
        yield line if isinstance(line, Problem) else Row(f"{name}:{line[0]}", {"text": line[1]})


def parquet_rows(path: Path, advance: Advance) -> Iterator[RowOrProblem]:
    """Rows of a Parquet file, streamed by record batches.

    Args:
        path: The file.
        advance: See `RowSource.rows`.

    Raises:
        DataError: The file is damaged, or has two columns of one name.
        OSError: It cannot be opened.
    """
    with path.open("rb") as raw:
        try:
            with pq.ParquetFile(raw, **_STREAMED) as file:
                if duplicates := _duplicates(file.schema_arrow.names):
                    what = f"the file has {duplicates} more than once"
                    fix = "rename one of the columns"
                    raise DataError(Problem(Code.DATA_DUPLICATE_COLUMN, what, str(path), fix=fix))
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
