"""Local data files: the files that a path, a directory or a glob names, their rows, and the slices of `split`."""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from loratune.codes import Code
from loratune.config import AUTO, Source
from loratune.data import upstream
from loratune.data.sources import rows as readers
from loratune.data.sources.rows import BLOCK, Row, RowOrProblem, Unreadable
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance, progress
from loratune.system.files import beside, sha256
from loratune.text import listed

ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
DOCUMENT_ENDINGS = (
    ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log", ".py", ".pyi", ".r", ".jl", ".js", ".jsx", ".ts",
    ".tsx", ".java", ".kt", ".scala", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".swift", ".rb",
    ".php", ".pl", ".lua", ".sh", ".sql", ".hs", ".ml", ".el",
)  # fmt: skip
"""The endings of text files that are documents."""
GZIP_ENDINGS = tuple(f"{ending}.gz" for ending in (*ENDINGS, *DOCUMENT_ENDINGS) if ending != ".parquet")
KNOWN_ENDINGS = f"{', '.join(ENDINGS[:-1])} (each also as .gz), .parquet, or of text such as .md, .rst, .py"
FIX_HEADER = "put a line with the names of its columns before it, such as prompt,completion"
_CHECKED_ROWS, _SHOWN_LETTERS = 1_000, 40
"""Rows by which the header of a CSV file is checked, and the letters of each of its names in a message."""
_UNBOUNDED = sys.maxsize
_ANY_DEPTH = re.compile(r"(?:^|(?<=/))\*\*(?:/|$)")

_TEXT_READERS: dict[str, Callable[[BinaryIO, str], Iterator[RowOrProblem]]] = {
    ".jsonl": readers.jsonl_rows,
    ".json": readers.json_document,
    ".csv": readers.csv_rows,
    "line": readers.line_rows,
    "paragraph": readers.paragraph_rows,
    "document": readers.document_rows,
}
"""Ending of a file, or what is a row of a text file → its reader."""


def data_ending(path: Path) -> str:
    """The ending of a data file: `.jsonl`, `.csv.gz`, `.md`, ...; empty for other types of files."""
    name = path.name.lower()
    endings = (*GZIP_ENDINGS, *ENDINGS, *DOCUMENT_ENDINGS)
    return next((ending for ending in endings if name.endswith(ending) and name != ending), "")


def is_text(path: Path) -> bool:
    """Whether a file is a text file: `.txt`, or a document."""
    return data_ending(path).removesuffix(".gz") in (".txt", *DOCUMENT_ENDINGS)


def is_csv(path: Path) -> bool:
    """Whether a file is a CSV file."""
    return data_ending(path).removesuffix(".gz") == ".csv"


def is_document(path: Path) -> bool:
    """Whether a file is a text file that is a document, such as `.md` or `.py`."""
    return is_text(path) and data_ending(path).removesuffix(".gz") != ".txt"


def looks_like_hub_id(path: str) -> bool:
    """Whether a path has the form `name` or `owner/name` without a data file's ending; otherwise it is local."""
    parts = path.split("/")
    if parts[0] in ("", ".", "..") or path.startswith("~") or glob.has_magic(path):
        return False
    return len(parts) <= 2 and bool(parts[-1]) and not data_ending(Path(path))


def find_files(path: Path, sample_by: str = AUTO) -> tuple[list[Path], list[Path]]:
    """The data files of a path, sorted by name, and the other files there.

    Next to files of rows, documents such as README.md are other files; next to `.txt`, they are with `auto`. With
    `document`, only text files are data files, if there are any. A file is read once, even if there are links to it.

    Args:
        path: A file, a directory (not searched recursively), or a glob, whose `**` does not follow links.
        sample_by: As in the configuration.

    Returns:
        The data files; and other files, and directories without data files, except hidden ones.

    Raises:
        DataError: The path does not exist or cannot be read, or it has no data files.
    """
    try:
        if path.is_dir():
            return _data_files(path.iterdir(), path, sample_by, "no data files in this directory")
        if not path.exists():
            if glob.has_magic(str(path)):
                found = {*map(Path, _matches(str(path)))}
                return _data_files(found, path, sample_by, "no data files match this glob")
            raise DataError(
                Problem(
                    Code.DATA_NOT_FOUND, "no such file", str(path), fix=beside(path, Path.is_file) or "check the path"
                )
            )
        if not path.is_file():
            what, fix = "neither a file nor a directory", "write the rows to a file first"
            raise DataError(Problem(Code.DATA_UNREADABLE, what, str(path), fix=fix))
    except OSError as error:
        raise _unreadable_error(error, path) from None
    if not data_ending(path):
        what = f"files of the type `{path.suffix}` are not read"
        raise DataError(Problem(Code.DATA_UNREADABLE, what, str(path), fix=f"use {KNOWN_ENDINGS}"))
    return [path], []


def _matches(pattern: str) -> Iterator[str]:
    """The paths that a glob matches. Unlike in `glob`, `**` does not follow links to directories: they may be loops."""
    if not (found := _ANY_DEPTH.search(pattern)):
        yield from glob.iglob(pattern)
        return
    for top in glob.iglob(pattern[: found.start()] or os.curdir):
        for directory, names, _ in os.walk(top):
            names[:] = [name for name in names if not name.startswith(".")]
            yield from _matches(os.path.join(glob.escape(directory), pattern[found.end() :] or "*"))


def _data_files(paths: Iterable[Path], parent: Path, sample_by: str, otherwise: str) -> tuple[list[Path], list[Path]]:
    found = sorted(paths)
    files = [path for path in found[::-1] if data_ending(path) and path.is_file()]
    links_first = sorted(files, key=Path.is_symlink, reverse=True)
    files = sorted({os.path.realpath(path): path for path in links_first}.values())
    if sample_by == "document" and any(map(is_text, files)):
        files = [path for path in files if is_text(path)]
    elif not all(map(is_text, files)) or (sample_by == AUTO and not all(map(is_document, files))):
        files = [path for path in files if not is_document(path)]
    read = {*files, *(directory for file in files for directory in file.parents)}
    others = [path for path in found if path not in read and not path.name.startswith(".")]
    if files:
        return files, others
    what = f"{otherwise}, only {shown(others)}" if others else otherwise
    fix = f"name files that end in {KNOWN_ENDINGS}"
    fix += f", or a glob such as {glob_of(parent, [], '**')}" if any(map(Path.is_dir, others)) else ""
    raise DataError(Problem(Code.DATA_NOT_FOUND, what, str(parent), fix=fix))


def glob_of(path: Path, found: Sequence[Path], *folders: str) -> str:
    """A glob of files like most of those found in a directory, or by a glob. folders: the folders in it."""
    ending = Counter([*map(data_ending, found)] or [".md"]).most_common(1)[0][0]
    return str((path.parent if glob.has_magic(path.name) else path).joinpath(*folders, f"*{ending}"))


def unread(path: Path, read: Sequence[Path], others: Sequence[Path]) -> Iterator[str]:
    """Texts on files that are not read, by reason. path: a directory or a glob. read, others: see `find_files`."""
    targets, reasons, is_text_only = {*map(os.path.realpath, read)}, dict[str, list[Path]](), all(map(is_text, read))
    for other in others:
        alone = f"documents are not rows; {glob_of(path, [other])}, or data.sample_by: document, reads them alone"
        cases = (
            (other.is_dir() and "**" in path.parts, "links to folders, and folders without data files"),
            (other.is_dir(), f"subfolders are not read, except by a glob such as {glob_of(path, read, '**')}"),
            (not other.is_file(), "broken links and special files are not read"),
            (os.path.realpath(other) in targets, "other names of files that are read"),
            (is_document(other), "data.sample_by: document reads them" if is_text_only else alone),
            (data_ending(other), "data.sample_by: document reads only text files; name files of rows themselves"),
            (True, f"files that end in {KNOWN_ENDINGS} are"),
        )
        reasons.setdefault(next(reason for applies, reason in cases if applies), []).append(other)
    return (f"{shown(paths)} ({why})" for why, paths in reasons.items())


def shown(paths: Sequence[Path]) -> str:
    """The names of the first few paths, and the number of the others."""
    return listed([f"{path.name}{'/' if path.is_dir() else ''}" for path in paths])


def _unreadable_error(error: OSError, path: Path) -> DataError:
    return DataError(
        Problem(Code.DATA_UNREADABLE, f"cannot be read: {error.strerror}", str(path), fix="check the path")
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of the operating system and of gzip into a DataError."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        what = f"damaged gzip file: {error}"
        problem = Problem(Code.DATA_UNREADABLE, what, str(path), fix="download it or compress it again")
        raise DataError(problem) from None
    except OSError as error:
        raise _unreadable_error(error, path) from None


@dataclass(frozen=True)
class DataFile:
    """One data file, its size in bytes, and what is a row of a text file, as in the configuration."""

    path: Path
    size: int
    sample_by: str = AUTO

    @property
    def reader(self) -> str:
        """The ending of a file of rows, without `.gz`; what is a row of a text file."""
        if is_text(self.path):
            automatic = "document" if is_document(self.path) else "line"
            return automatic if self.sample_by == AUTO else self.sample_by
        return data_ending(self.path).removesuffix(".gz")

    @cached_property
    @progress("hashing the rows")
    def content_digest(self) -> str:
        """SHA-256 of its content, its ending, and how it is read."""
        with _reading(self.path):
            digest = sha256(self.path)
        return hashlib.sha256(f"{data_ending(self.path)} {self.reader} {digest}".encode()).hexdigest()

    def rows(self, advance: Advance = no_advance) -> Iterator[RowOrProblem]:
        """All rows, see `FileSlice.rows`."""
        with _reading(self.path), self.path.open("rb", buffering=0) as raw:
            if self.reader == ".parquet":
                yield from _parquet_rows(raw, self, advance)
                return
            file: Any = io.BufferedReader(raw, BLOCK)
            if data_ending(self.path).endswith(".gz"):
                file = io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK)
            done = 0
            for row in _TEXT_READERS[self.reader](file, str(self.path)):
                yield row
                advance(raw.tell() - done)
                done = raw.tell()


@dataclass(frozen=True)
class FileSlice:
    """The rows of one file that belong to a slice over several files. A `RowSource`.

    Attributes:
        files: All files of the source.
        number: The index of this file.
        split: The slices of the source; None for all rows.
        part: The index of this slice.
        start: The first row of the file that belongs to the slice.
        stop: The row after the last one.
    """

    files: tuple[DataFile, ...]
    number: int
    split: str | None = None
    part: int = 0
    start: int = 0
    stop: int = _UNBOUNDED

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
        """SHA-256 of everything that determines the rows; with a slice, this includes the other files."""
        if self.split is None:
            return self.files[self.number].content_digest
        parts = [self.split, self.part, self.number, *(file.content_digest for file in self.files)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def rows(self, advance: Advance = no_advance) -> Iterator[RowOrProblem]:
        """Stream the rows in order; a row that cannot be read is yielded as a `Problem`.

        It may be called more than once.

        Args:
            advance: Called with numbers of bytes, which add up to `size` once all rows are read.

        Raises:
            DataError: The file is damaged, has changed, or no longer exists.
        """
        bytes_read = 0

        def count(number: int) -> None:
            nonlocal bytes_read
            bytes_read += number
            advance(number)

        yield from islice(self.files[self.number].rows(count), self.start, self.stop)
        if bytes_read < self.size:
            advance(self.size - bytes_read)

    def header_remark(self) -> str:
        """A line if it is a CSV file whose header looks like its first rows; otherwise empty. Raises as `rows`."""
        if not is_csv(self.files[self.number].path):
            return ""
        first = islice(self.files[self.number].rows(), _CHECKED_ROWS)
        rows = [row.values for row in first if isinstance(row, Row)]
        if not rows or not readers.is_doubtful_header([*rows[0]], rows):
            return ""
        shown = listed([repr(name if len(name) < _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}…") for name in rows[0]])
        return f"{self.name}: the first line names the columns, but looks like a row ({shown}): if it is, {FIX_HEADER}"


def file_slices(paths: list[Path], source: Source, sample_by: str = AUTO) -> list[FileSlice]:
    """The files in order, once for each slice of `split`. sample_by: as in the configuration.

    Rows are counted first if the slices depend on it: with several files, percentages, or negative indices.

    Raises:
        DataError: `split` is not a slice, or a file cannot be read.
    """
    files, split = tuple(DataFile(path, _file_size(path), sample_by) for path in paths), source.split
    if split is None:
        return [FileSlice(files, number) for number in range(len(files))]
    _slice_bounds(split, 1_000, source)
    lengths = [_UNBOUNDED]
    if files[1:] or "%" in split or "-" in split:
        lengths = [sum(1 for _ in file.rows()) for file in files]
    starts = list(accumulate(lengths, initial=0))
    return [
        FileSlice(files, number, split, part, max(0, start - first), max(0, start - first, stop - first))
        for part, (start, stop) in enumerate(_slice_bounds(split, starts[-1], source))
        for number, first in enumerate(starts[:-1])
    ]


def _file_size(path: Path) -> int:
    with _reading(path), path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _slice_bounds(split: str, rows: int, source: Source) -> list[tuple[int, int]]:
    """(start, stop) of each slice of `split`, for `rows` rows of the only split `train`."""
    try:
        return upstream.slice_bounds(split, rows)
    except (ValueError, AssertionError) as error:
        fix = "a local file has only the split `train`; write a slice as train[:2000] or train[10%:20%]"
        raise DataError(Problem(Code.DATA_FORMAT, f"split `{split}`: {error}", source.path, fix=fix)) from None


# Parquet

# `pre_buffer` would hold whole row groups, which are often the whole file.
_STREAMED = {"buffer_size": BLOCK, "pre_buffer": False, "page_checksum_verification": True}


def _parquet_rows(raw: BinaryIO, source: DataFile, advance: Advance) -> Iterator[RowOrProblem]:
    """Rows of a Parquet file. Raises DataError: it is damaged, or two columns have the same name."""
    try:
        with pq.ParquetFile(raw, **_STREAMED) as file:
            if problem := readers.duplicate_columns(file.schema_arrow.names, str(source.path)):
                raise DataError(problem)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes = [8 * BLOCK * group.num_rows // max(group.total_byte_size, 1) for group in groups if group.num_rows]
            size, total, number = source.size, file.metadata.num_rows, 0
            for batch in file.iter_batches(max(1, min([2048, *sizes])), use_threads=False):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    yield Row(f"{source.path}:row {number}", dict(zip(batch.schema.names, values, strict=True)))
                advance(size * number // total - size * (number - batch.num_rows) // total)
    except (pa.ArrowException, OSError) as error:
        what = f"damaged Parquet file: {_first_line(error)}"
        problem = Problem(Code.DATA_UNREADABLE, what, str(source.path), fix="download it or write it again")
        raise DataError(problem) from None


def _values(column: Any) -> list[Any]:
    """The values of a column; values that Python cannot represent become `Unreadable`, as their field may be unused."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Unreadable(_first_line(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
