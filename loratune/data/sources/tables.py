"""Rows of tables: Parquet files, splits of hub datasets, and rows that a program holds in memory."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loratune.codes import Code
from loratune.data import upstream
from loratune.data.sources.rows import BLOCK, Row, RowOrProblem, Unreadable, to_json_line, to_row
from loratune.data.sources.text_files import duplicate_columns
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance

# `pre_buffer` holds whole row groups, which are often the whole file.
_STREAMED = {"buffer_size": BLOCK, "pre_buffer": False, "page_checksum_verification": True}

GIVEN = "(rows given by the program)"
"""The path of a source in a config whose rows a program holds in memory."""


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
                if problem := duplicate_columns(file.schema_arrow.names, str(path)):
                    raise DataError(problem)
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
    sizes = [_rows_per_batch(group.total_byte_size, group.num_rows) for group in groups if group.num_rows]
    for batch in file.iter_batches(batch_size=min(sizes, default=1), use_threads=False):
        for values in _batch_values(batch):
            number += 1
            yield Row(f"{path}:row {number}", values)
        advance(size * number // total - size * (number - batch.num_rows) // total)


def _rows_per_batch(size: int, rows: int) -> int:
    """How many rows of a table to hold at once, where all its `rows` take `size` bytes."""
    return max(1, min(2048, 8 * BLOCK * rows // max(size, 1)))


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
    return DataError(Problem(Code.DATA_UNREADABLE, what, str(path), fix="download it or write it again"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub dataset, or a slice of one. Implements `RowSource`.

    `datasets` loads it into its cache of Arrow files, which are mapped and not held in memory.
    """

    name: str
    dataset: Any

    @property
    def digest(self) -> str:
        """SHA-256 of the fingerprint by which `datasets` distinguishes contents."""
        content = f"{upstream.dataset_fingerprint(self.dataset)} {self.dataset.num_rows}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of its Arrow table."""
        return int(self.dataset.data.nbytes)

    def rows(self, advance: Advance = no_advance) -> Iterator[Row]:
        """See `RowSource.rows`."""
        size, total, number = self.size, self.dataset.num_rows, 0
        for batch in self.dataset.iter(_rows_per_batch(size, total)):
            first = number
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(f"{self.name}:{number}", dict(zip(batch, values, strict=True)))
            advance(size * number // total - size * first // total)


@dataclass(frozen=True)
class GivenRows:
    """Rows that a program holds in memory. Implements `RowSource`, and is taken in the place of a `Source`.

    Attributes:
        name: What places begin with: the fourth row is at `name[3]`, as in Python.
        items: The rows, each a mapping of its fields.
    """

    name: str
    items: Sequence[Any]
    split = weight = None

    @property
    def path(self) -> str:
        """The name, as a source has it."""
        return self.name

    @property
    def size(self) -> int:
        """How many rows there are, which is what progress counts."""
        return len(self.items)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all rows."""
        digest = hashlib.sha256()
        for item in self.rows():
            digest.update(f"{to_json_line(item.values)}\n".encode() if isinstance(item, Row) else b"\n")
        return digest.hexdigest()

    def rows(self, advance: Advance = no_advance) -> Iterator[RowOrProblem]:
        """See `RowSource.rows`."""
        for number, item in enumerate(self.items):
            yield to_row(_plain(item), f"{self.name}[{number}]")
            advance(1)


def given_rows(rows: Any, name: str) -> GivenRows:
    """Rows of a Python program, to be read as those of a file.

    Args:
        rows: A `datasets.Dataset`, a pandas frame, whose missing values are null, or an iterable of dicts.
        name: What the places of rows begin with, as `train`.

    Raises:
        DataError: They are something else.
    """
    if hasattr(rows, "with_format"):
        return GivenRows(name, rows.with_format(None))
    if hasattr(rows, "to_dict") and hasattr(rows, "notna"):
        return GivenRows(name, rows.astype(object).where(rows.notna(), None).to_dict("records"))
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        return GivenRows(name, rows if isinstance(rows, Sequence) else list(rows))
    what = f"rows must be a list of dicts, a datasets.Dataset or a pandas frame, got {type(rows).__name__}"
    raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix="give one dict for each row"))


def _plain(value: Any) -> Any:
    """A value as JSON would give it: lists for tuples and arrays, Python's numbers for numpy's."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value
