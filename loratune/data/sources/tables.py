"""Parquet files: streamed by record batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loratune.data.sources.rows import BLOCK, Advance, Item, Row, Unreadable, batch_rows
from loratune.errors import DataError, Problem

# `pre_buffer` holds whole row groups, which are often the whole file.
_STREAMED = {"buffer_size": BLOCK, "pre_buffer": False, "page_checksum_verification": True}


def parquet(path: Path, advance: Advance) -> Iterator[Item]:
    """The rows of a file. advance: see `Opened.rows`.

    Raises DataError: damaged; OSError: cannot be read.
    """
    with path.open("rb") as raw:
        try:
            with pq.ParquetFile(raw, **_STREAMED) as file:
                names = file.schema_arrow.names
                if doubled := sorted({name for name in names if names.count(name) > 1}):
                    yield Problem(f"the file has {', '.join(doubled)} more than once", str(path))
                    return
                yield from _rows(file, path, advance)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(error, path) from None


def count(path: Path) -> int:
    """How many rows a file says it has. Raises DataError, OSError: as `parquet`."""
    with path.open("rb") as raw:
        try:
            return int(pq.ParquetFile(raw).metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(error, path) from None


def _rows(file: Any, path: Path, advance: Advance) -> Iterator[Item]:
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    size, total, number = path.stat().st_size, file.metadata.num_rows, 0
    rows = min((batch_rows(group.total_byte_size, group.num_rows) for group in groups if group.num_rows), default=1)
    for batch in file.iter_batches(batch_size=rows, use_threads=False):
        for values in _values(batch):
            number += 1
            yield Row(f"{path}:row {number}", values)
        advance(size * number // total - size * (number - batch.num_rows) // total)


def _values(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. A value that Python has no type for is `Unreadable`: its field may not be read at all."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        if batch.num_rows > 1:
            return [values for number in range(batch.num_rows) for values in _values(batch.slice(number, 1))]
        return [{name: _value(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}]


def _value(column: Any) -> Any:
    try:
        return column[0].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Unreadable(_first_line(error))


def _damaged(error: Exception, path: Path) -> DataError:
    return DataError(Problem(f"damaged Parquet file: {_first_line(error)}", str(path), fix="fetch or write it again"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
