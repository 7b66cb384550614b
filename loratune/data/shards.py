"""Tokenised rows on disk: written once, a shard at a time, and mapped into memory whenever the same are wanted again.

They lie in the cache of `datasets` (HF_DATASETS_CACHE), in `loratune/<key>`, where the key is a hash of all that
decides them. A shard is an Arrow file and a JSON record of what it holds; a preparation that was stopped goes on after
its last shard. Where the cache cannot be written, or another process is writing the same rows, they go to a temporary
directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import config as datasets_config
from numpy.typing import NDArray

from loratune.data.render import Tokens
from loratune.data.report import Report, total
from loratune.digests import sha256
from loratune.errors import Problem, ResourceError

KEPT_DAYS = 30
"""Rows that nobody wanted for so long are removed when others are written."""
_SHARD_TOKENS, _SHARD_ROWS = 8_000_000, 500_000  # what is lost at most when a preparation is stopped
_BATCH_BYTES = 1 << 22  # opening a shard maps the beginning of every batch: 64 KiB each
_LISTS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("where", pa.string()), ("ids", _LISTS), ("spans", _LISTS)])


class Shards(Sequence[dict[str, list[int]]]):
    """Rows of `input_ids` and `labels`, mapped from a directory. report: what became of all rows that were read."""

    def __init__(self, directory: Path, lifetime: Any = None):
        """lifetime: held as long as the rows are, e.g. a temporary directory.

        Raises OSError, ValueError or KeyError: the directory does not hold whole shards.
        """
        self._lifetime, self.directory = lifetime, directory
        records = [_record(path) for path in sorted(directory.glob("*.json"))]
        if not (directory / "whole").is_file():
            raise ValueError("not whole")
        self.report: Report = total(Report.from_json(record["report"]) for record in records)
        self.fingerprint = _fingerprint(lot for record in records for lot in record["lots"])
        self._tables = [_mapped(directory / f"{number:05}.arrow", record) for number, record in enumerate(records)]
        self._ends = list(accumulate(len(table) for table in self._tables))

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
        self.read = self._shards = 0
        for record in sorted(directory.glob("*.json")):
            try:
                held = _record(record)
                _mapped(record.with_suffix(".arrow"), held)
                self.read += held["report"]["rows"]
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
                break
            self._shards += 1
        self._shard: _Shard | None = None

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
            self._shard.close()
            self._shards += 1
            self._shard = None


class _Shard:
    """A shard while it is being written. Its record is the last thing that appears."""

    def __init__(self, path: Path):
        self.report = Report()
        self._path, self._unfinished = path, path.with_suffix(".unfinished")
        self._file = pa.ipc.new_file(str(self._unfinished), _SCHEMA)
        self._lots: list[str] = []
        self._held: list[Any] = []
        self.whole = True

    def add(self, report: Report, rows: Sequence[Tokens]) -> None:
        self.whole = False
        self.report.extend(report)
        batch = _batch(rows)
        self._held.append(batch)
        digest = hashlib.sha256()
        for lists in batch.columns[1:]:
            for part in (lists.flatten(), lists.value_lengths()):
                digest.update(np.ascontiguousarray(np.asarray(part, dtype="<i4")).tobytes())
        self._lots.append(digest.hexdigest())
        if sum(batch.nbytes for batch in self._held) >= _BATCH_BYTES:
            self._write()
        self.whole = True

    def close(self) -> None:
        self._write()
        self._file.close()
        record = {
            "sha256": sha256(self._unfinished),
            "lots": self._lots,
            "report": self.report.as_json(),
        }
        self._unfinished.replace(self._path)
        self._unfinished.write_text(json.dumps(record | {"check": _check(record)}))
        self._unfinished.replace(self._path.with_suffix(".json"))

    def _write(self) -> None:
        if self._held:
            self._file.write_table(pa.Table.from_batches(self._held).combine_chunks())
            self._held = []


def kept(key: str, fill: Callable[[Writer], None]) -> Shards:
    """The rows that are kept under a key. Where there are none, `fill` writes them, going on from `Writer.read`.

    Raises what `fill` raises, and then keeps nothing, unless the user stopped it. Raises ResourceError: no room on the
    disk.
    """
    root = Path(datasets_config.HF_DATASETS_CACHE) / "loratune"
    final = root / key
    if (there := opened(final)) is not None:
        with suppress(OSError):
            os.utime(final)
        return there
    with ExitStack() as stack:
        partial = _claimed(root, key, stack)
        lifetime = None
        if partial is None:
            lifetime = tempfile.TemporaryDirectory(prefix="loratune-rows-")
            partial = Path(lifetime.name)
        _fill(partial, fill)
        if lifetime:
            return Shards(partial, lifetime)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        return Shards(final)


def opened(directory: Path) -> Shards | None:
    """The rows in a directory; None if there are none, or they are not what was written."""
    try:
        return Shards(directory)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _fill(directory: Path, fill: Callable[[Writer], None]) -> None:
    writer = Writer(directory)
    try:
        fill(writer)
        writer.flush()
        (directory / "whole").touch()
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        what = f"the tokenised rows cannot be kept: {error.strerror}"
        raise ResourceError(Problem(what, str(directory), fix="make room, or set HF_DATASETS_CACHE")) from None
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        writer.stop()
        raise


def _claimed(root: Path, key: str, stack: ExitStack) -> Path | None:
    """The directory to write in, which no other process writes in while the stack is open; None if there is none."""
    partial = root / f"{key}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((root / f"{key}.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _forget_old(root)
        partial.mkdir(exist_ok=True)
        (partial / "probe").touch()
        (partial / "probe").unlink()
    except OSError:
        return None
    stack.callback(Path(lock.name).unlink, missing_ok=True)
    return partial


def _forget_old(root: Path) -> None:
    for path in root.iterdir():
        if path.is_dir() and path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            shutil.rmtree(path, ignore_errors=True)


def _fingerprint(lots: Iterable[str]) -> str:
    """Of all ids and spans, wherever a shard ended before its time."""
    return hashlib.sha256("".join(lots).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError or TypeError: it is not what was written."""
    record: dict[str, Any] = json.loads(path.read_text())
    if record.pop("check") != _check(record):
        raise ValueError(f"{path} is not what was written")
    return record


def _check(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path, record: dict[str, Any]) -> Any:
    if sha256(path) != record["sha256"]:
        raise ValueError(f"{path} is not what was written")
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _batch(rows: Sequence[Tokens]) -> Any:
    return pa.record_batch(
        [
            pa.array([row.where for row in rows], pa.string()),
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
