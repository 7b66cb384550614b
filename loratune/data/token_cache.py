"""Tokenised rows in a directory: written once, a shard at a time, and mapped into memory.

A shard is an Arrow file and a JSON record of what it holds; a preparation that was stopped goes on after its last
shard. The last thing that is written is `whole`, a record of how many shards and rows there are. It alone decides what
is read, never a listing of the directory, so that a directory from which files are missing is not taken for a smaller
one. `store` decides where such directories lie.
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

from loratune.data.rendering import Tokens
from loratune.data.report import Report, total
from loratune.system import private, records
from loratune.system.digests import sha256
from loratune.system.plain import is_file, read_text

_log = logging.getLogger(__name__)

WHOLE = "whole"
"""The record of a directory that is complete."""
_SHARD_TOKENS, _SHARD_ROWS = 8_000_000, 500_000  # what is lost at most when a preparation is stopped
_BATCH_BYTES = 1 << 22  # opening a shard maps the beginning of every batch: 64 KiB each
_MOST_HELD = 64 << 20  # bytes of rows that are read into memory instead of mapped
_LISTS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("where", pa.string()), ("ids", _LISTS), ("spans", _LISTS)])


class TokenCache(Sequence[dict[str, list[int]]]):
    """Rows of `input_ids` and `labels`, mapped from a directory. report: what became of all rows that were read.

    remark: a line for the user on where they are kept, or empty.
    """

    remark = ""

    def __init__(self, directory: Path, lifetime: Any = None):
        """lifetime: held as long as the rows are, e.g. a temporary directory.

        Raises OSError, ValueError or KeyError: the directory does not hold whole shards.
        """
        self._lifetime, self.directory = lifetime, directory
        whole = read_record(directory / WHOLE)
        records = [read_record(directory / f"{number:05}.json") for number in range(whole["shards"])]
        self.report: Report = total(Report.from_json(record["report"]) for record in records)
        self.fingerprint = _fingerprint(lot for record in records for lot in record["lots"])
        files = [directory / f"{number:05}.arrow" for number in range(len(records))]
        held = sum(path.lstat().st_size for path in files) <= _MOST_HELD
        self._tables = [_opened(path, record, held=held) for path, record in zip(files, records, strict=True)]
        self._ends = list(accumulate(len(table) for table in self._tables))
        if len(self) != whole["rows"]:
            raise ValueError(f"{directory} holds {len(self)} rows instead of {whole['rows']}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        row = self.row(number)
        return {"input_ids": list(row.ids), "labels": row.labels}

    def row(self, number: int) -> Tokens:
        """A row with its place and its learnt spans."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._ends, number)
        table = self._tables[shard]
        at = number - (self._ends[shard] - len(table))
        flat = table["spans"][at].as_py()
        spans = tuple(zip(flat[::2], flat[1::2], strict=True))
        return Tokens(table["where"][at].as_py(), tuple(table["ids"][at].as_py()), spans)

    def rows(self) -> Iterator[Tokens]:
        """All rows in order."""
        return map(self.row, range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row."""
        counts = (np.asarray(pa.compute.list_value_length(table["ids"]), dtype=np.int64) for table in self._tables)
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Learnt tokens of every row."""
        counts = [np.zeros(0, np.int64)]
        for table in self._tables:
            for piece in table["spans"].chunks:
                flat = piece.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
                starts, ends = np.maximum(flat[::2], 1), flat[1::2]
                borders = np.concatenate([[0], np.cumsum(np.asarray(pa.compute.list_value_length(piece)) // 2)])
                sums = np.concatenate([[0], np.cumsum(ends - starts)])
                counts.append(sums[borders[1:]] - sums[borders[:-1]])
        return np.concatenate(counts)


class Writer:
    """Writes the shards of one key. read: how many rows were read for the shards that are there already."""

    def __init__(self, directory: Path):
        self._directory = directory
        self.read = self._shards = self._rows = 0
        while (held := self._held(self._shards)) is not None:
            self.read += held[0]
            self._rows += held[1]
            self._shards += 1
        self._shard: _Shard | None = None

    def _held(self, number: int) -> tuple[int, int] | None:
        """How many rows were read for a shard, and how many it holds; None if it is not there, or damaged."""
        try:
            held = read_record(self._directory / f"{number:05}.json")
            return int(held["report"]["rows"]), len(_opened(self._directory / f"{number:05}.arrow", held, held=False))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
            _log.debug("shard %d of %s is made again", number, self._directory, exc_info=True)
            return None

    def add(self, report: Report, rows: Sequence[Tokens]) -> None:
        """Take the rows that were made of the next ones that were read, and what became of those."""
        if self._shard is None:
            self._shard = _Shard(self._directory / f"{self._shards:05}.arrow")
        self._shard.add(report, rows)
        if self._shard.report.tokens >= _SHARD_TOKENS or self._shard.report.rows >= _SHARD_ROWS:
            self.flush()

    def stop(self) -> None:
        """End the shard that is being written before its time, unless it was stopped in the middle of a batch."""
        if self._shard is not None and self._shard.whole:
            self.flush()

    def flush(self) -> None:
        """End the shard that is being written, if there is one."""
        if self._shard is not None:
            self._rows += self._shard.close()
            self._shards += 1
            self._shard = None

    def finish(self) -> None:
        """End the last shard, and then write that the directory is whole."""
        self.flush()
        write_record(self._directory / WHOLE, {"shards": self._shards, "rows": self._rows})


class _Shard:
    """A shard while it is being written. Its record is the last thing that appears."""

    def __init__(self, path: Path):
        self.report = Report()
        self._path, self._unfinished = path, path.with_suffix(".unfinished")
        private.create(self._unfinished)
        self._file = pa.ipc.new_file(pa.OSFile(os.fsencode(self._unfinished), "wb"), _SCHEMA)
        self._lots: list[str] = []
        self._held: list[Any] = []
        self._rows = 0
        self.whole = True

    def add(self, report: Report, rows: Sequence[Tokens]) -> None:
        self.whole = False
        self.report.extend(report)
        batch = _batch(rows)
        self._held.append(batch)
        self._rows += len(rows)
        digest = hashlib.sha256()
        for lists in batch.columns[1:]:
            for part in (lists.flatten(), lists.value_lengths()):
                digest.update(np.ascontiguousarray(np.asarray(part, dtype="<i4")).tobytes())
        self._lots.append(digest.hexdigest())
        if sum(batch.nbytes for batch in self._held) >= _BATCH_BYTES:
            self._write()
        self.whole = True

    def close(self) -> int:
        """End it. Returns how many rows it holds."""
        self._write()
        self._file.close()
        record = {"sha256": sha256(self._unfinished), "lots": self._lots, "report": self.report.as_json()}
        self._unfinished.replace(self._path)
        write_record(self._path.with_suffix(".json"), record)
        return self._rows

    def _write(self) -> None:
        if self._held:
            self._file.write_table(pa.Table.from_batches(self._held).combine_chunks())
            self._held = []


def opened(directory: Path) -> TokenCache | None:
    """The rows in a directory; None if there are none, or they are not what was written."""
    try:
        return TokenCache(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        _log.debug("the rows in %s are not used", directory, exc_info=True)
        return None


def _fingerprint(lots: Iterable[str]) -> str:
    """Of all ids and spans, wherever a shard ended before its time."""
    return hashlib.sha256("".join(lots).encode()).hexdigest()


def read_record(path: Path, *, any_version: bool = False) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError or TypeError: it is not what `write_record` wrote, or, unless `any_version`,
    what a newer release wrote."""
    record: dict[str, Any] = json.loads(read_text(path))
    if record.pop("check") != _check(record):
        raise ValueError(f"{path} is not what was written")
    if (reason := records.newer(records.ROWS, record)) and not any_version:
        raise ValueError(f"{path} {reason}")
    record.pop(records.KEY, None)
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON with a digest of itself; the file is whole as soon as it has its name."""
    unfinished = path.with_suffix(".unfinished")
    private.create(unfinished)
    whole = records.versioned(records.ROWS, record)
    unfinished.write_text(json.dumps(whole | {"check": _check(whole)}))
    unfinished.replace(path)


def _check(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _opened(path: Path, record: dict[str, Any], *, held: bool) -> Any:
    """A shard as a table. held: read into memory, where nothing that is done to the file reaches it, and not mapped."""
    if not is_file(path) or sha256(path) != record["sha256"]:
        raise ValueError(f"{path} is not what was written")
    return pa.ipc.open_file(pa.py_buffer(path.read_bytes()) if held else pa.memory_map(os.fsencode(path))).read_all()


def _batch(rows: Sequence[Tokens]) -> Any:
    return pa.record_batch(
        [
            pa.array([row.where.encode(errors="backslashreplace").decode() for row in rows], pa.string()),
            _lists([row.ids for row in rows]),
            _lists([tuple(chain.from_iterable(row.spans)) for row in rows]),
        ],
        schema=_SCHEMA,
    )


def _lists(values: Sequence[Sequence[int]]) -> Any:
    borders = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in values], out=borders[1:])
    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(borders[-1]))
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(flat))
