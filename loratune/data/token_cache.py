"""Tokenized rows, in entries of the cache.

An entry is the directory `loratune/<key>` in the cache of `datasets` (HF_DATASETS_CACHE). It has Arrow files, the
shards, and the file `whole`, written last, with their SHA-256. After Ctrl-C the incomplete entry is kept as
`<key>.partial`, from which the next run continues. Where the cache cannot be used, the rows are written to a temporary
directory.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.report import Report, total
from loratune.data.sources.rows import place_in_cache
from loratune.data.upstream import datasets_cache_dir
from loratune.errors import Problem, ResourceError
from loratune.events import progress
from loratune.system.cache import EntryKind, ownership_problem
from loratune.system.files import open_file, sha256

_log = logging.getLogger(__name__)

ROWS = EntryKind(
    lambda: datasets_cache_dir() / "loratune", "", days=30, most=10_000,
    files=re.compile(r"[0-9]{5}\.(arrow|unfinished)|whole"),
)  # fmt: skip
"""Old entries are removed when a run begins."""
_SHARD_TOKENS, _SHARD_ROWS = 8_000_000, 500_000
"""The maximum size of a shard. A shard is held in memory until it is written."""
_LISTS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("where", pa.string()), ("ids", _LISTS), ("spans", _LISTS), ("side", pa.int8()),
                     ("weight", pa.float64()), ("block", pa.int32())])  # fmt: skip
_METADATA = b"loratune"
"""The metadata key of a shard. Its value is JSON: the report on the rows, and the digest of each batch of rows."""
_WHOLE = "whole"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file of an entry. Raises OSError: it is not a regular file, or cannot be read."""
    open_file(path).close()
    return sha256(path)


class TokenCache(Sequence[dict[str, list[int]]]):
    """Rows of `input_ids` and `labels`, memory-mapped from the shards of a directory.

    Attributes:
        directory: The directory of the shards.
        key: The key of the entry.
        report: Counts of all rows that were read.
        fingerprint: SHA-256 over every id and supervised span in order.
        remark: A line for the user if the cache cannot be used; otherwise empty.
    """

    remark = ""

    def __init__(self, directory: Path):
        """Open a directory. Raises one of `_UNREADABLE`: it is incomplete or damaged."""
        with open_file(directory / _WHOLE) as file:
            whole = json.loads(file.read())
        paths = [_shard(directory, number) for number in range(len(whole["shards"]))]
        if [_file_digest(path) for path in paths] != whole["shards"]:
            raise ValueError(f"{directory} does not hold what was written")
        self.directory, self.key = directory, whole["key"]
        shards = [_open_shard(path) for path in paths]
        self._table = pa.concat_tables([_SCHEMA.empty_table(), *shards])
        metadata = [_metadata(shard) for shard in shards]
        self.report: Report = total(Report.from_json(shard["report"]) for shard in metadata)
        digests = "".join(chain.from_iterable(shard["batches"] for shard in metadata))
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()  # the same wherever shards begin and end

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: Any) -> Any:
        row = self.row(number)
        return {"input_ids": list(row.ids), "labels": row.labels}

    def row(self, number: int) -> TokenizedRow:
        """Returns a row with its place and its supervised spans."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        where, ids, flat, side, weight, block = (self._table[name][number].as_py() for name in _SCHEMA.names)
        spans = tuple(zip(flat[::2], flat[1::2], strict=True))
        return TokenizedRow(where, tuple(ids), spans, side=side, weight=weight, block=block)

    def side(self, number: int) -> int:
        """Returns the role of a row in preference data, see `TokenizedRow.side`."""
        return int(self.sides[number]) if self.sides is not None else 0

    @cached_property
    def sides(self) -> NDArray[np.int8] | None:
        """(rows,), the role of each row in preference data; None for other data."""
        sides = np.asarray(self._table["side"], dtype=np.int8)
        return sides if sides.any() else None

    @cached_property
    def weights(self) -> NDArray[np.float64] | None:
        """(rows,), the factor of each row in the loss; None if all are 1."""
        weights = np.asarray(self._table["weight"], dtype=np.float64)
        return weights if (weights != 1).any() else None

    @cached_property
    def owners(self) -> NDArray[np.int64] | None:
        """(rows,), for each block the number of the row that was split, counted from 0; None if no row was."""
        blocks = np.asarray(self._table["block"])
        return np.cumsum(blocks == 0) - 1 if blocks.any() else None

    def rows(self) -> Iterator[TokenizedRow]:
        """Yields all rows in order."""
        return map(self.row, range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,), the number of tokens of each row."""
        return np.asarray(pc.list_value_length(self._table["ids"]), dtype=np.int64)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,), the number of supervised tokens of each row."""
        spans = self._table["spans"]
        flat = np.asarray(pc.list_flatten(spans), dtype=np.int64)
        rows = np.repeat(np.arange(len(self)), np.asarray(pc.list_value_length(spans)) // 2)
        counts = np.bincount(rows, flat[1::2] - np.maximum(flat[::2], 1), len(self))
        return counts.astype(np.int64)


class TokenCacheWriter:
    """Writes the shards of a directory. read: the number of source rows that existing shards cover."""

    def __init__(self, directory: Path):
        """Find the existing shards of the directory; damaged ones are written again."""
        self._directory = directory
        self._unwritten: list[tuple[Report, Any]] = []
        self._digests: list[str] = []
        self.read = 0
        with suppress(*_UNREADABLE):
            while (path := _shard(directory, len(self._digests))).exists():
                self.read += int(_metadata(_open_shard(path))["report"]["rows"])
                self._digests.append(sha256(path))

    def add(self, report: Report, rows: Sequence[TokenizedRow]) -> None:
        """Add a batch of rows, and the report on the examples that it was made from."""
        self._unwritten.append((report, _record_batch(rows)))
        held = total(report for report, *_ in self._unwritten)
        if held.tokens >= _SHARD_TOKENS or held.rows >= _SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write a shard with the pending rows, if there are any."""
        if not self._unwritten:
            return
        table = _shard_table([report for report, *_ in self._unwritten], [batch for _, batch in self._unwritten])
        path = _shard(self._directory, len(self._digests))
        unfinished = path.with_suffix(".unfinished")
        with pa.OSFile(os.fsencode(unfinished), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        unfinished.replace(path)
        self._digests.append(sha256(path))
        self._unwritten = []

    def finish(self, key: str) -> None:
        """Write the last shard, and record that the directory is complete."""
        self.flush()
        (self._directory / _WHOLE).write_text(json.dumps({"key": key, "shards": self._digests}))


def _shard(directory: Path, number: int) -> Path:
    return directory / f"{number:05}.arrow"


def _open_shard(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()


def _shard_table(reports: Sequence[Report], batches: Sequence[Any]) -> Any:
    table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
    metadata = {"report": total(reports).to_dict(), "batches": [*map(_digest, batches)]}
    return table.replace_schema_metadata({_METADATA: json.dumps(metadata)})


def _metadata(table: Any) -> dict[str, Any]:
    return dict(json.loads(table.schema.metadata[_METADATA]))


def _record_batch(rows: Sequence[TokenizedRow]) -> Any:
    columns = {
        "where": [place_in_cache(row.where) for row in rows],
        "ids": _list_array([row.ids for row in rows]),
        "spans": _list_array([tuple(chain.from_iterable(row.spans)) for row in rows]),
        "side": [row.side for row in rows],
        "weight": [row.weight for row in rows],
        "block": [row.block for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, _SCHEMA)


def _list_array(values: Sequence[Sequence[int]]) -> Any:
    borders = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(borders[-1]))
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(flat))


def _digest(batch: Any) -> str:
    """SHA-256 of the ids and spans of a batch, of the roles of its rows in preference data, and of their weights."""
    digest = hashlib.sha256()
    for lists in batch.columns[1:3]:
        for part in (lists.flatten(), lists.value_lengths()):
            digest.update(np.ascontiguousarray(np.asarray(part, dtype="<i4")).tobytes())
    if (sides := np.asarray(batch.columns[3], dtype="<i1")).any():
        digest.update(sides.tobytes())
    if ((weights := np.asarray(batch.columns[4], dtype="<f8")) != 1).any():
        digest.update(weights.tobytes())
    return digest.hexdigest()


# Entries


def load_or_write(key: str, write: Callable[[TokenCacheWriter], None]) -> TokenCache:
    """Load the rows of a key, or write them if the entry is missing.

    Args:
        key: 64 hexadecimal digits.
        write: Writes the rows, continuing after those that `TokenCacheWriter.read` counts.

    Raises:
        ResourceError: There is no space on the disk. Errors of `write` are passed on; the partial entry is kept only
            after Ctrl-C.
    """
    entry, problem = ROWS.path(key), ROWS.problem()
    rows = None if problem else _load(entry)
    if rows is None:
        rows = _write(entry, write, usable=not problem)
    fix = "set HF_DATASETS_CACHE or HF_HOME to a directory that only you can write to"
    rows.remark = f"the rows are tokenized for this run only: {problem}; {fix}" if problem else ""
    return rows


def open_trusted(directory: Path) -> TokenCache | None:
    """Open rows that another process of this user has written; None if they are missing, or others can change them."""
    try:
        return None if ownership_problem(directory.lstat()) else TokenCache(directory)
    except _UNREADABLE:
        _log.debug("the rows in %s are not used", directory, exc_info=True)
        return None


@progress("checking the tokenized rows")
def _load(entry: Path) -> TokenCache | None:
    """Load an entry; None if it cannot be used. It is first marked as used, so that no process removes it."""
    with suppress(OSError):
        os.utime(entry, follow_symlinks=False)
        rows = open_trusted(entry)
        return rows if rows is not None and rows.key == entry.name else None
    return None


def _write(entry: Path, write: Callable[[TokenCacheWriter], None], usable: bool) -> TokenCache:
    """Write the rows of an entry, unless another process publishes it meanwhile.

    usable: whether the cache can be used; otherwise a temporary directory is.
    """
    stopped = entry.with_suffix(".partial")
    directory = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent if usable else None))
    try:
        with suppress(OSError):
            if usable and not ownership_problem(stopped.lstat()):
                stopped.rename(directory)
        writer = TokenCacheWriter(directory)
        try:
            write(writer)
        except KeyboardInterrupt:
            writer.flush()
            with suppress(OSError):
                if usable:
                    directory.rename(stopped)
            raise
        writer.finish(entry.name)
        rows = TokenCache(directory)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        what = f"the tokenized rows cannot be written: {error.strerror}"
        fix = "free some space, or set HF_DATASETS_CACHE to a directory on another disk"
        raise ResourceError(Problem(Code.DATA_UNREADABLE, what, str(directory), fix=fix)) from None
    for _ in range(2 if usable else 0):
        with suppress(OSError):
            directory.rename(entry)
            rows.directory = entry
            return rows
        if (published := _load(entry)) is not None:  # another process was first
            shutil.rmtree(directory, ignore_errors=True)
            return published
        ROWS.remove(entry)
    weakref.finalize(rows, shutil.rmtree, directory, ignore_errors=True)
    return rows
