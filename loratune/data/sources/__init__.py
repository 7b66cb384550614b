"""Reads rows from files, directories, globs and hub datasets. Each row records its place in its source.

Rows are streamed: one block of a file, or one row if it is longer, is in memory. A JSON document is read whole.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from loratune.codes import Code
from loratune.config import AUTO, Source
from loratune.data import upstream
from loratune.data.sources import files
from loratune.data.sources.rows import (
    MAX_PROBLEMS,
    Row,
    RowOrProblem,
    Unreadable,
    duplicate_columns,
    jsonl_rows,
    place_parts,
    repeated_key,
    reported,
    to_json_line,
    to_row,
)
from loratune.errors import DataError, Problem
from loratune.events import Advance, no_advance, note
from loratune.system.environment import cache_fix
from loratune.system.files import beside

GIVEN = "(rows given by the program)"
"""The path, in a config, of a source whose rows were passed in memory by a program."""


MOST_BITS = 14_000
"""Of a whole number; Python writes as text what has at most 4,300 digits, about 14,284 bits."""


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub dataset, or a slice of one. A `RowSource`.

    `datasets` loads it into its cache of Arrow files, which are memory-mapped.
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
        """Size of its Arrow table in bytes."""
        return int(self.dataset.data.nbytes)

    def rows(self, advance: Advance = no_advance) -> Iterator[Row]:
        """See `FileSlice.rows`."""
        size, total = self.size, self.dataset.num_rows
        for number, values in enumerate(self.dataset):
            yield Row(f"{self.name}:{number + 1}", values)
            advance(size * (number + 1) // total - size * number // total)


@dataclass(frozen=True)
class GivenRows:
    """Rows that a program holds in memory. A `RowSource` that can be used in place of a `Source`.

    Attributes:
        name: Prefix of the places: the fourth row is at `name[3]`, as in Python.
        items: The rows, each a mapping of its fields.
    """

    name: str
    items: Sequence[Any]
    split = weight = None

    @property
    def path(self) -> str:
        """The name, for compatibility with `Source`."""
        return self.name

    @property
    def size(self) -> int:
        """The number of rows, the unit of progress."""
        return len(self.items)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all rows."""
        digest = hashlib.sha256()
        for item in self.rows():
            digest.update(f"{to_json_line(item.values)}\n".encode() if isinstance(item, Row) else b"\n")
        return digest.hexdigest()

    def rows(self, advance: Advance = no_advance) -> Iterator[RowOrProblem]:
        """See `FileSlice.rows`."""
        for number, item in enumerate(self.items):
            where = f"{self.name}[{number}]"
            try:
                row = to_row(_plain(item), where)
            except RecursionError:
                what, fix = "the row is nested too deeply, or contains itself", "give plain values"
                row = Problem(Code.DATA_SYNTAX, what, where, fix=fix)
            yield row
            advance(1)


RowSource: TypeAlias = files.FileSlice | HubSplit | GivenRows
"""A source of rows: a file, a split of a hub dataset, or a program. It has a `name`, the path or `hub-id[split]`; a
`digest`, SHA-256 that depends on the content but not on the name; a `size` in bytes; and `rows`.
"""


def given_rows(rows: Any, name: str) -> GivenRows:
    """Rows of a Python program, to be read like those of a file.

    Args:
        rows: A `datasets.Dataset`, with the columns chosen by `with_format`; a pandas DataFrame, whose
            missing values become null, and whose index is read if it has a name; or an iterable of dicts.
        name: Prefix of the places of rows, such as `train`.

    Raises:
        DataError: `rows` is something else; a dataset has a transform; two columns of a frame have the same name.
    """
    if isinstance(rows, Dataset):
        return GivenRows(name, _as_python(rows, name))
    if hasattr(rows, "columns") and hasattr(rows, "notna"):
        frame = rows.reset_index(allow_duplicates=True) if any(rows.index.names) else rows
        if problem := duplicate_columns(map(str, frame.columns), name):
            raise DataError(problem)
        return GivenRows(name, frame.astype(object).where(frame.notna(), None).to_dict("records"))
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping | IterableDataset):
        return GivenRows(name, rows if isinstance(rows, Sequence) else list(rows))
    what = f"rows must be a list of dicts, a datasets.Dataset or a pandas frame, got {type(rows).__name__}"
    fix = "give one dict for each row"
    if isinstance(rows, DatasetDict):
        fix = f"give one split: ...[{next(iter(rows), 'train')!r}]"
    if isinstance(rows, IterableDataset):
        fix = "give what it yields: datasets.Dataset.from_list([*rows])"
    raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix=fix))


def _as_python(dataset: Dataset, name: str) -> Dataset:
    """A dataset of the same rows and columns as plain values. Raises DataError: it has a transform."""
    chosen = dataset.format
    if chosen["type"] == "custom":
        what = (
            "the dataset has a transform, which would run whenever a row is read, and might give other values each time"
        )
        fix = "apply it once, by .map(..., batched=True), or remove it, by .with_format(None)"
        raise DataError(Problem(Code.DATA_SYNTAX, what, name, fix=fix))
    plain = dataset.with_format(None)
    if not chosen["output_all_columns"] and {*chosen["columns"]} != {*plain.column_names}:
        plain = plain.select_columns([column for column in plain.column_names if column in chosen["columns"]])
    return _without_media(plain, name)


def _without_media(dataset: Dataset, name: str) -> Dataset:
    """A dataset without columns of images, audio and the like, which would be decoded with each row."""
    if media := [column for column, feature in dataset.features.items() if upstream.is_media(feature)]:
        note(f"{name}: {', '.join(media)}: not read, as models are trained on text alone")
    return dataset.remove_columns(media) if media else dataset


def _plain(value: Any) -> Any:
    """A value with JSON types: lists instead of tuples and arrays, Python numbers instead of NumPy's."""
    if isinstance(value, Mapping):
        names = [*map(str, value)]
        plain = dict(zip(names, map(_plain, value.values()), strict=True))
        return plain if len(plain) == len(names) else repeated_key(names)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return Unreadable("a number of too many digits")
    return _plain(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value


def open_source(source: Source | GivenRows, sample_by: str = AUTO) -> list[RowSource]:
    """The files of a source in order, or its one split on the hub. sample_by: as in the configuration.

    A slice counts the rows of all files as one sequence, so a file may have no rows in it; if `split` is a sum of
    slices, the files are repeated for each slice.

    Raises:
        DataError: The path does not exist or cannot be read; the type of file is not supported; the slice is not valid;
            a hub dataset cannot be loaded; or the rows were passed in memory in an earlier run.
    """
    if isinstance(source, GivenRows):
        return [source]
    if source.path == GIVEN:
        what, fix = "a program gave these rows, and they are in no file", "run that program, or name a file of the rows"
        raise DataError(Problem(Code.DATA_NOT_FOUND, what, source.path, fix=fix))
    path = _local_path(source)
    if path is None:
        return [_load_hub_split(source)]
    return [*files.file_slices(files.find_files(path, sample_by)[0], source, sample_by)]


def text_files(source: Source) -> list[Path]:
    """The files of a source that are text files, if all data files are. Raises DataError: as `open_source`."""
    path = _local_path(source)
    found, others = files.find_files(path, "document") if path else ([], [])
    return found if all(files.is_text(one) for one in (*found, *others) if files.data_ending(one)) else []


def left_out(source: Source | GivenRows, sample_by: str = AUTO) -> str:
    """A line on files of a directory or a glob that `open_source` does not read, or on a setting that has no effect on
    the source; empty if there are none."""
    path = None if isinstance(source, GivenRows) else _local_path(source)
    read, others = files.find_files(path, sample_by) if path else ([], [])
    lines = ["data.sample_by has no effect, as there is no text file"]
    lines = lines if sample_by != AUTO and not any(map(files.is_text, read)) else []
    lines += [f"not read: {'; '.join(files.unread(path, read, others))}"] if path and others else []
    return f"{source.path}: {'; '.join(lines)}" if lines else ""


def header_fix(where: str) -> str:
    """The end of a fix for wrong names of fields, by the place of a row; empty unless the row is in a CSV file."""
    is_csv = files.is_csv(Path(place_parts(where)[0].removesuffix(":")))
    return f"; if the first line of the file is a row, {files.FIX_HEADER}" if is_csv else ""


def format_error(problems: Sequence[Problem], source: Source | GivenRows, sample_by: str) -> DataError:
    """The error of a source; if its rows fit no format, with where the fields of a CSV file have their names from, and
    with the files that are not read, such as documents."""
    first, *others = problems
    if first.code == Code.DATA_FORMAT:
        first = replace(first, fix=f"{first.fix}{header_fix(first.where)}")
    if first.code == Code.DATA_FORMAT and (line := left_out(source, sample_by)):
        first = replace(first, fix=f"{first.fix}; {line}")
    return DataError([first, *others])


def _local_path(source: Source | GivenRows) -> Path | None:
    """The path of files; None for a hub id."""
    path = Path(source.path).expanduser()
    return None if files.looks_like_hub_id(source.path) and not os.path.exists(path) else path


def read_rows(source: Source | GivenRows, file: BinaryIO | None = None) -> list[Row]:
    """All rows of a source as a list, in order, with its slice applied.

    Args:
        source: The source.
        file: JSON lines that are read instead, for example stdin; the path of the source is then used in messages only.

    Raises:
        DataError: As `open_source` and `RowSource.rows`, after ten problems with a note that there may be more; or
            there are no rows.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        parts = (part.rows() for part in open_source(source)) if file is None else [jsonl_rows(file, source.path)]
        for item in chain.from_iterable(parts):
            if isinstance(item, Row):
                rows.append(item)
            else:
                problems.append(item)
            if len(problems) == MAX_PROBLEMS:
                break
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(reported(problems, source.path))
    if rows:
        return rows
    raise no_rows_error(source)


def no_rows_error(source: Source | GivenRows, why: str = "") -> DataError:
    """The error for a source without rows."""
    what = f"0 rows in {source.split}" if source.split else "0 rows"
    what += f" ({why})" if why else ""
    return DataError(Problem(Code.DATA_EMPTY, what, source.path, fix="name a source that has rows"))


def _load_hub_split(source: Source) -> HubSplit:
    """A dataset of the hub, from the cache or downloaded into it. Raises DataError."""
    split = source.split or "train"
    _check_reachable(source.path)
    try:
        dataset = load_dataset(source.path, split=split)
    except Exception as error:  # every kind of failure of the hub, its cache and its builders ends up here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        what = f"no such file, and it cannot be loaded as a hub dataset ({reason})"
        fix = cache_fix(error) or beside(Path(source.path), Path.is_file) or "check the path or hub id"
        raise DataError(Problem(Code.DATA_HUB, what, source.path, fix=fix)) from None
    name = f"{source.path}[{split}]"
    return HubSplit(name, _without_media(dataset, name))


def _check_reachable(hub_id: str) -> None:
    """Fail fast without a connection: `load_dataset` retries for 20 s before it looks into its cache.

    Raises:
        DataError: The path is not a hub id; or there is no connection, and the dataset is not cached.
    """
    if upstream.hub_dataset_cache(hub_id).is_dir():
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "README.md", repo_type="dataset"), timeout=10)
    except HfHubHTTPError:
        pass  # the hub answers; `load_dataset` reports what it says
    except Exception as error:  # whatever the network stack raises
        what = f"no such file; the hub cannot be reached and no such dataset is cached ({error})"
        fix = beside(Path(hub_id), Path.is_file) or "check the path, or the connection"
        raise DataError(Problem(Code.DATA_HUB, what, hub_id, fix=fix)) from None
