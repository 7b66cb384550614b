"""Tokenized rows in a directory: written once, a shard at a time, and mapped into memory.

A shard is an Arrow file and a JSON record of it. The record `whole`, which is written last, says how many shards and
rows there are, so a directory from which files are missing is never taken for a smaller one. `token_cache_dir` decides
where such directories are.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
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

WHOLE = "whole"
"""The record of a directory that is complete."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException)
"""What opening a directory raises that does not hold what was written."""
_SHARD_TOKENS, _SHARD_ROWS = 8_000_000, 500_000
"""The size of a shard, which is held in memory until it is written, and is the most that a stopped run loses."""
_LISTS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("where", pa.string()), ("ids", _LISTS), ("spans", _LISTS)])
_SIDE = pa.field("side", pa.int8())
"""A further column of the rows of preference data."""


class TokenCache(Sequence[dict[str, list[int]]]):
    """Rows of `input_ids` and `labels`, mapped from the shards of a directory.

    Attributes:
        directory: Where the shards are.
        report: What became of all rows that were read.
        fingerprint: SHA-256 over every id and supervised span in order.
        remark: A line for the user on where the rows are kept, or empty.
    """

    remark = ""

    def __init__(self, directory: Path):
        """Open a directory. Raises one of `UNREADABLE`: it does not hold what was written."""
        self.directory = directory
        whole = read_record(directory / WHOLE)
        shards = [read_record(directory / f"{number:05}.json") for number in range(whole["shards"])]
        self.report: Report = total(Report.from_json(shard["report"]) for shard in shards)
        digests = "".join(chain.from_iterable(shard["lots"] for shard in shards))
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()  # the same wherever shards begin and end
        self._tables = [_open_shard(directory / f"{number:05}.arrow", shard) for number, shard in enumerate(shards)]
        self._ends = list(accumulate(map(len, self._tables)))
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
        """Returns what a row is in preference data, see `TokenizedRow.side`."""
        return int(self.sides[number]) if self.sides is not None and len(self) else 0

    @cached_property
    def sides(self) -> NDArray[np.int8] | None:
        """(rows,), what each row is in preference data; None for other data."""
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
        for piece in chain.from_iterable(table["spans"].chunks for table in self._tables):
            flat = piece.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
            borders = np.concatenate([[0], np.cumsum(np.asarray(pa.compute.list_value_length(piece)) // 2)])
            sums = np.concatenate([[0], np.cumsum(flat[1::2] - np.maximum(flat[::2], 1))])
            counts.append(sums[borders[1:]] - sums[borders[:-1]])
        return np.concatenate(counts)


class TokenCacheWriter:
    """Writes the shards of a directory. read: how many rows were read for the shards that it has already."""

    def __init__(self, directory: Path):
        """Find the shards that the directory has already."""
        self._directory = directory
        self._unwritten: list[tuple[Report, Any, str]] = []
        self.read = self._shards = self._rows = 0
        with suppress(*UNREADABLE):  # the first shard that is missing or damaged is written next
            while True:
                record = read_record(directory / f"{self._shards:05}.json")
                self._rows += len(_open_shard(directory / f"{self._shards:05}.arrow", record))
                self.read += int(record["report"]["rows"])
                self._shards += 1

    def add(self, report: Report, rows: Sequence[TokenizedRow]) -> None:
        """Add rows, and the report on the examples that they come from."""
        batch = _record_batch(rows)
        self._unwritten.append((report, batch, _digest(batch)))
        held = total(report for report, *_ in self._unwritten)
        if held.tokens >= _SHARD_TOKENS or held.rows >= _SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write a shard with the rows that are not in one yet, if there are any; its record comes last."""
        if not self._unwritten:
            return
        path = self._directory / f"{self._shards:05}.arrow"
        batches = [batch for _, batch, _ in self._unwritten if len(batch)]
        table = pa.Table.from_batches(batches, batches[0].schema if batches else _SCHEMA).combine_chunks()
        create_private_file(path)
        with pa.OSFile(os.fsencode(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        report = total(report for report, *_ in self._unwritten).as_json()
        record = {"sha256": sha256(path), "lots": [digest for *_, digest in self._unwritten], "report": report}
        write_record(path.with_suffix(".json"), record)
        self._rows, self._shards, self._unwritten = self._rows + len(table), self._shards + 1, []

    def finish(self) -> None:
        """Write the last shard, and record that the directory is complete."""
        self.flush()
        write_record(self._directory / WHOLE, {"shards": self._shards, "rows": self._rows})


def read_record(path: Path) -> dict[str, Any]:
    """Read a record. Raises one of `UNREADABLE`: It is not what was written, or a newer release wrote it."""
    record: dict[str, Any] = json.loads(read_text(path))
    if record.pop("check") != _check(record) or records.newer(records.ROWS, record):
        raise ValueError(f"{path} is not what this release writes")
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


def _open_shard(path: Path, record: dict[str, Any]) -> Any:
    """Map a shard as a table. Raises one of `UNREADABLE`."""
    if not is_file(path) or sha256(path) != record["sha256"]:
        raise ValueError(f"{path} is not what was written")
    return pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()


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


def _digest(batch: Any) -> str:
    """SHA-256 of the ids and spans of a batch, and of what its rows are in preference data."""
    digest = hashlib.sha256()
    for lists in batch.columns[1:3]:
        for part in (lists.flatten(), lists.value_lengths()):
            digest.update(np.ascontiguousarray(np.asarray(part, dtype="<i4")).tobytes())
    for sides in batch.columns[3:]:
        digest.update(np.asarray(sides, dtype="<i1").tobytes())
    return digest.hexdigest()
