"""Tokenized rows in a directory: written once, a shard at a time, and mapped into memory.

A shard is an Arrow file and a JSON record of what it holds; a preparation that was stopped continues after its last
shard. The last thing that is written is `whole`, a record of how many shards and rows there are. That record decides
what is read, never a listing of the directory, so a directory from which files are missing is not taken for a smaller
one. `token_cache_dir` decides where such directories are.
"""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from loratune.data.rendering import TokenizedRow
from loratune.data.report import Report, total
from loratune.data.sources.rows import place_in_cache
from loratune.system import records
from loratune.system.files import create_private_file, is_file, read_text, sha256

_log = logging.getLogger(__name__)

WHOLE = "whole"
"""The record of a directory that is complete."""
_SHARD_TOKENS, _SHARD_ROWS = 8_000_000, 500_000
"""The size of a shard: what is lost at most when a preparation is stopped."""
_BATCH_BYTES = 1 << 22
"""The size of a record batch in a shard. Opening a shard maps the beginning of every batch, 64 KiB each."""
_IN_MEMORY_BYTES = 64 << 20
"""Rows of at most this size are read into memory instead of mapped."""
_LISTS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("where", pa.string()), ("ids", _LISTS), ("spans", _LISTS)])
_SIDE = pa.field("side", pa.int8())
"""A further column where answers are compared."""


class TokenCache(Sequence[dict[str, list[int]]]):
    """Rows of `input_ids` and `labels`, read from a directory.

    Attributes:
        directory: Where the rows are.
        report: What became of all rows that were read.
        fingerprint: SHA-256 over every id and supervised span in order.
        remark: A line for the user on where the rows are kept, or empty.
    """

    remark = ""

    def __init__(self, directory: Path, lifetime: Any = None):
        """Open a directory.

        Args:
            directory: Where the rows are.
            lifetime: Something that must exist as long as the rows are used, such as a temporary directory.

        Raises:
            OSError, ValueError, KeyError, TypeError: The directory does not hold complete shards.
        """
        self._lifetime, self.directory = lifetime, directory
        whole = read_record(directory / WHOLE)
        shards = [read_record(directory / f"{number:05}.json") for number in range(whole["shards"])]
        self.report: Report = total(Report.from_json(shard["report"]) for shard in shards)
        self.fingerprint = _fingerprint(digest for shard in shards for digest in shard["lots"])
        files = [directory / f"{number:05}.arrow" for number in range(len(shards))]
        in_memory = sum(path.lstat().st_size for path in files) <= _IN_MEMORY_BYTES
        self._tables = [
            _open_shard(path, shard, in_memory=in_memory) for path, shard in zip(files, shards, strict=True)
        ]
        self._ends = list(accumulate(len(table) for table in self._tables))
        if len(self) != whole["rows"]:
            raise ValueError(f"{directory} holds {len(self)} rows instead of {whole['rows']}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        row = self.row(number)
        return {"input_ids": list(row.ids), "labels": row.labels}

    def row(self, number: int) -> TokenizedRow:
        """Returns a row with its place and its supervised spans."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._ends, number)
        table = self._tables[shard]
        position = number - (self._ends[shard] - len(table))
        flat = table["spans"][position].as_py()
        spans = tuple(zip(flat[::2], flat[1::2], strict=True))
        where, ids = table["where"][position].as_py(), tuple(table["ids"][position].as_py())
        return TokenizedRow(where, ids, spans, side=self.side(number))

    def side(self, number: int) -> int:
        """Returns what a row is to a comparison of answers, see `TokenizedRow`."""
        return int(self.sides[number]) if self.sides is not None and len(self) else 0

    @cached_property
    def sides(self) -> NDArray[np.int8] | None:
        """(rows,), what each row is to a comparison of answers; None where answers are not compared."""
        found = [table for table in self._tables if _SIDE.name in table.column_names]
        return np.concatenate([np.asarray(table[_SIDE.name], dtype=np.int8) for table in found]) if found else None

    def rows(self) -> Iterator[TokenizedRow]:
        """Yields all rows in order."""
        return map(self.row, range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,), the tokens of each row."""
        counts = (np.asarray(pa.compute.list_value_length(table["ids"]), dtype=np.int64) for table in self._tables)
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,), the supervised tokens of each row."""
        counts = [np.zeros(0, np.int64)]
        for table in self._tables:
            for piece in table["spans"].chunks:
                flat = piece.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
                starts, ends = np.maximum(flat[::2], 1), flat[1::2]
                borders = np.concatenate([[0], np.cumsum(np.asarray(pa.compute.list_value_length(piece)) // 2)])
                sums = np.concatenate([[0], np.cumsum(ends - starts)])
                counts.append(sums[borders[1:]] - sums[borders[:-1]])
        return np.concatenate(counts)


def open_if_whole(directory: Path) -> TokenCache | None:
    """Open a directory; None if there are no rows, or they are not what was written."""
    try:
        return TokenCache(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        _log.debug("the rows in %s are not used", directory, exc_info=True)
        return None


class TokenCacheWriter:
    """Writes the shards of one directory. read: how many rows were read for the shards that are there already."""

    def __init__(self, directory: Path):
        """Find the shards that are there already."""
        self._directory = directory
        self.read = self._shards = self._rows = 0
        while (sizes := self._shard_sizes(self._shards)) is not None:
            self.read += sizes[0]
            self._rows += sizes[1]
            self._shards += 1
        self._shard: _ShardWriter | None = None

    def _shard_sizes(self, number: int) -> tuple[int, int] | None:
        """Returns how many rows were read for a shard, and how many it holds; None if it is not there, or damaged."""
        try:
            record = read_record(self._directory / f"{number:05}.json")
            table = _open_shard(self._directory / f"{number:05}.arrow", record, in_memory=False)
            return int(record["report"]["rows"]), len(table)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
            _log.debug("shard %d of %s is written again", number, self._directory, exc_info=True)
            return None

    def add(self, report: Report, rows: Sequence[TokenizedRow]) -> None:
        """Add rows, and the report on the examples that they come from."""
        if self._shard is None:
            self._shard = _ShardWriter(self._directory / f"{self._shards:05}.arrow")
        self._shard.add(report, rows)
        if self._shard.report.tokens >= _SHARD_TOKENS or self._shard.report.rows >= _SHARD_ROWS:
            self.flush()

    def stop(self) -> None:
        """End the shard that is being written before it is full, unless it was stopped in the middle of a batch."""
        if self._shard is not None and self._shard.consistent:
            self.flush()

    def flush(self) -> None:
        """End the shard that is being written, if there is one."""
        if self._shard is not None:
            self._rows += self._shard.close()
            self._shards += 1
            self._shard = None

    def finish(self) -> None:
        """End the last shard, and then record that the directory is complete."""
        self.flush()
        write_record(self._directory / WHOLE, {"shards": self._shards, "rows": self._rows})


class _ShardWriter:
    """Writes one shard. Its record is the last thing that appears.

    Attributes:
        report: What became of the rows that were read.
        consistent: Whether the report is of the rows that were added; it is not while `add` runs.
    """

    def __init__(self, path: Path):
        self.report = Report()
        self.consistent = True
        self._path, self._unfinished = path, path.with_suffix(".unfinished")
        create_private_file(self._unfinished)
        self._file: Any = None
        self._digests: list[str] = []
        self._unwritten: list[Any] = []
        self._rows = 0

    def add(self, report: Report, rows: Sequence[TokenizedRow]) -> None:
        self.consistent = False
        self.report.extend(report)
        batch = _record_batch(rows)
        self._unwritten += [batch] if rows else []
        self._rows += len(rows)
        digest = hashlib.sha256()
        for lists in batch.columns[1:3]:
            for part in (lists.flatten(), lists.value_lengths()):
                digest.update(np.ascontiguousarray(np.asarray(part, dtype="<i4")).tobytes())
        for sides in batch.columns[3:]:
            digest.update(np.asarray(sides, dtype="<i1").tobytes())
        self._digests.append(digest.hexdigest())
        if sum(batch.nbytes for batch in self._unwritten) >= _BATCH_BYTES:
            self._write()
        self.consistent = True

    def close(self) -> int:
        """End the shard. Returns how many rows it holds."""
        self._write()
        self._open(_SCHEMA).close()
        record = {"sha256": sha256(self._unfinished), "lots": self._digests, "report": self.report.as_json()}
        self._unfinished.replace(self._path)
        write_record(self._path.with_suffix(".json"), record)
        return self._rows

    def _write(self) -> None:
        if self._unwritten:
            table = pa.Table.from_batches(self._unwritten).combine_chunks()
            self._open(table.schema).write_table(table)
            self._unwritten = []

    def _open(self, schema: Any) -> Any:
        """The file, which gets its schema with the first rows."""
        if self._file is None:
            self._file = pa.ipc.new_file(pa.OSFile(os.fsencode(self._unfinished), "wb"), schema)
        return self._file


def _fingerprint(digests: Iterable[str]) -> str:
    """Returns the SHA-256 of all ids and spans, which does not depend on where one shard ends and the next begins."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_record(path: Path, *, any_version: bool = False) -> dict[str, Any]:
    """Read a record.

    Raises:
        OSError, ValueError, KeyError, TypeError: It is not what `write_record` wrote, or, unless `any_version`, a newer
            release wrote it.
    """
    record: dict[str, Any] = json.loads(read_text(path))
    if record.pop("check") != _check(record):
        raise ValueError(f"{path} is not what was written")
    if (reason := records.newer(records.ROWS, record)) and not any_version:
        raise ValueError(f"{path} {reason}")
    record.pop(records.KEY, None)
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON with its version and a digest of itself; the file is complete as soon as it has its name."""
    unfinished = path.with_suffix(".unfinished")
    create_private_file(unfinished)
    whole = records.versioned(records.ROWS, record)
    unfinished.write_text(json.dumps(whole | {"check": _check(whole)}))
    unfinished.replace(path)


def _check(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _open_shard(path: Path, record: dict[str, Any], *, in_memory: bool) -> Any:
    """Open a shard as a table.

    in_memory: The file is read, so nothing that happens to it later has an effect on the table; else it is mapped.
    """
    if not is_file(path) or sha256(path) != record["sha256"]:
        raise ValueError(f"{path} is not what was written")
    source = pa.py_buffer(path.read_bytes()) if in_memory else pa.memory_map(os.fsencode(path))
    return pa.ipc.open_file(source).read_all()


def _record_batch(rows: Sequence[TokenizedRow]) -> Any:
    columns = [
        pa.array([place_in_cache(row.where) for row in rows], pa.string()),
        _list_array([row.ids for row in rows]),
        _list_array([tuple(chain.from_iterable(row.spans)) for row in rows]),
    ]
    if any(row.side for row in rows):
        return pa.record_batch([*columns, pa.array([row.side for row in rows], _SIDE.type)], _SCHEMA.append(_SIDE))
    return pa.record_batch(columns, schema=_SCHEMA)


def _list_array(values: Sequence[Sequence[int]]) -> Any:
    borders = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(numbers) for numbers in values], out=borders[1:])
    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(borders[-1]))
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(flat))
