"""Data files on disk, and the slices that `split` makes of them."""

import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from datasets import ReadInstruction

from loratune.config import Source
from loratune.data.sources import documents, lines, tables, text
from loratune.data.sources.files import kind
from loratune.data.sources.rows import BLOCK, MAX_PROBLEMS, Advance, Item, Row, unseen
from loratune.errors import DataError, Problem
from loratune.system.files import sha256

ALL = sys.maxsize

_LINES: dict[str, Callable[[lines.Lines, str], Iterator[Item]]] = {
    ".jsonl": lines.jsonl,
    ".csv": lines.csv_records,
    ".txt": lines.txt,
}


@dataclass(frozen=True)
class DataFile:
    """One file. size: bytes."""

    path: Path
    size: int

    @cached_property
    def content(self) -> str:
        """SHA-256 of its bytes and its kind."""
        with _readable(self.path):
            digest = sha256(self.path)
        return hashlib.sha256(f"{kind(self.path)} {digest}".encode()).hexdigest()

    @cached_property
    def length(self) -> int:
        """How many rows it has, the bad ones included. Raises DataError: as `rows`."""
        return self.count(ALL)

    def count(self, limit: int) -> int:
        """How many rows it has, counted no further than `limit`. Raises DataError: as `rows`."""
        if kind(self.path) == ".parquet":
            with _readable(self.path):
                return min(tables.count(self.path), limit)
        ending = ".txt" if kind(self.path).startswith(".jsonl") else ""  # a row a line: no need to parse them
        return sum(1 for _ in self._collected(unseen, limit, ending))

    def rows(self, advance: Advance, start: int, stop: int) -> Iterator[Row]:
        """Rows number `start` to `stop` (from 0, without the last), see `Opened.rows`."""
        told = 0

        def tell(count: int) -> None:
            nonlocal told
            told += count
            advance(count)

        for number, row in enumerate(self._collected(tell, stop)):
            if number >= start and row is not None:
                yield row
        if told < self.size:
            advance(self.size - told)

    def _collected(self, advance: Advance, stop: int, ending: str = "") -> Iterator[Row | None]:
        """The rows up to `stop`, None for a bad one; at the end the problems are raised."""
        problems: list[Problem] = []
        with _readable(self.path):
            for item in islice(self._items(advance, problems, ending), stop):
                if not isinstance(item, Problem):
                    yield item
                else:
                    if item.where not in [problem.where for problem in problems]:
                        problems.append(item)
                    if len(problems) >= MAX_PROBLEMS:
                        break
                    yield None
        if problems:
            raise DataError(problems[:MAX_PROBLEMS])

    def _items(self, advance: Advance, problems: list[Problem], ending: str) -> Iterator[Item]:
        name, ending = str(self.path), ending or kind(self.path).removesuffix(".gz")
        if ending == ".parquet":
            yield from tables.parquet(self.path, advance)
            return
        with self.path.open("rb", buffering=0) as raw:
            file: BinaryIO = io.BufferedReader(_Watched(raw, advance), BLOCK)
            if kind(self.path).endswith(".gz"):
                file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
            if ending == ".json":
                yield from documents.document(text.pieces(file, name, problems), name)
            else:
                yield from _LINES[ending](text.lines(file, name, problems), name)


class _Watched(io.RawIOBase):
    """Passes bytes on, and tells how many."""

    def __init__(self, raw: io.FileIO, advance: Advance):
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._advance(count)
        return count


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(Problem(f"damaged gzip file: {error}", str(path), fix="fetch or pack it again")) from None
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", str(path))) from None


@dataclass(frozen=True)
class Slice:
    """The rows of one file that belong to a slice over several. part: which of the slices that `split` adds up."""

    files: tuple[DataFile, ...]
    number: int
    source: Source
    part: int

    @property
    def name(self) -> str:
        """The path of the file."""
        return str(self.files[self.number].path)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.files[self.number].size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides which rows these are: with a slice, the other files as well."""
        if self.source.split is None:
            return self.files[self.number].content
        parts = [self.source.split, self.part, self.number, *(file.content for file in self.files)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def rows(self, advance: Advance = unseen) -> Iterator[Row]:
        """See `Opened.rows`; files are counted before, where the slice goes over them too or counts from the end."""
        start, stop = self._bounds()
        for file in self.files[: self.number]:
            passed = file.length if self._relative else file.count(start if stop == ALL else stop)
            start, stop = max(0, start - passed), stop if stop == ALL else max(0, stop - passed)
        return self.files[self.number].rows(advance, start, max(start, stop))

    @property
    def _relative(self) -> bool:
        """Whether the slice cannot be told before the rows are counted."""
        return self.source.split is not None and ("%" in self.source.split or "-" in self.source.split)

    def _bounds(self) -> tuple[int, int]:
        """First row and end in all files together; `ALL` where the end need not be known."""
        if self.source.split is None:
            return 0, ALL
        counted = sum(file.length for file in self.files) if self._relative else ALL
        return _parts(self.source.split, counted, self.source)[self.part]


def slices(paths: list[Path], source: Source) -> Iterator[Slice]:
    """The files, once for each slice that `split` adds up.

    Raises DataError: not a slice; no permission.
    """
    files = tuple(DataFile(path, _size(path)) for path in paths)
    parts = 1 if source.split is None else len(_parts(source.split, 1_000, source))
    for part in range(parts):
        yield from (Slice(files, number, source, part) for number in range(len(files)))


def _size(path: Path) -> int:
    with _readable(path), path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _parts(split: str, rows: int, source: Source) -> list[tuple[int, int]]:
    """The slices that `split` adds up. As in `datasets`, a local source is one split, called train."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": rows})
    except (ValueError, AssertionError) as error:
        fix = "a local file has the one split `train`; write a slice as train[:2000] or train[10%:20%]"
        raise DataError(Problem(f"split `{split}`: {error}", source.path, fix=fix)) from None
    return [(part.from_, part.to) for part in parts]
