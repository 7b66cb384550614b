"""Reading rows from files, directories, globs and hub datasets; each row knows the place it comes from.

Rows are streamed: what is held in memory is a block of a file, or one row, where that is longer; of a JSON document its
text.
"""

import os
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from datasets import load_dataset
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loratune.codes import Code
from loratune.config import Source
from loratune.data import upstream
from loratune.data.sources.local import file_slices, find_files, known_endings, looks_like_hub_id, shown
from loratune.data.sources.rows import MAX_PROBLEMS, Row, RowSource, line_of, place_parts, reported
from loratune.data.sources.tables import GIVEN, GivenRows, HubSplit, given_rows
from loratune.data.sources.text_files import jsonl_rows
from loratune.errors import DataError, Problem
from loratune.system.environment import cache_fix

__all__ = [
    "GIVEN", "MAX_PROBLEMS", "GivenRows", "Row", "RowSource", "given_rows", "left_out", "line_of", "looks_like_hub_id",
    "no_rows_error", "open_source", "place_parts", "read_rows", "reported",
]  # fmt: skip


def open_source(source: Source | GivenRows) -> list[RowSource]:
    """The files of a source in order, or its one split on the hub.

    A slice goes over the rows of all files as one sequence, so that a file may have no row in it; where `split` adds up
    several slices, the files come once for each.

    Raises:
        DataError: There is nothing, no permission, a type of file that is not read, a slice that is not valid, a hub
            dataset that cannot be loaded, or rows that only the program of an earlier run had.
    """
    if isinstance(source, GivenRows):
        return [source]
    if source.path == GIVEN:
        what, fix = "a program gave these rows, and they are in no file", "run that program, or name a file of the rows"
        raise DataError(Problem(Code.DATA_NOT_FOUND, what, source.path, fix=fix))
    path = Path(source.path).expanduser()
    if looks_like_hub_id(source.path) and not os.path.exists(path):
        return [_load_hub_split(source)]
    return [*file_slices(find_files(path)[0], source)]


def left_out(source: Source | GivenRows) -> str:
    """A line on what a directory or a glob names and `open_source` does not read; empty if there is nothing."""
    path = Path(source.path).expanduser()
    if isinstance(source, GivenRows) or (looks_like_hub_id(source.path) and not os.path.exists(path)):
        return ""
    others = find_files(path)[1]
    return f"{source.path}: not read: {shown(others)} (files that end in {known_endings()} are)" if others else ""


def read_rows(source: Source, file: BinaryIO | None = None) -> list[Row]:
    """All rows of a source at once, in order, after its slice.

    Args:
        source: Names the rows.
        file: JSON lines that are read instead, as from stdin; the source then only gives them a name.

    Raises:
        DataError: As `open_source` and `RowSource.rows`, behind ten problems also that there may be more; or there are
            no rows.
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
    """The error for a source none of whose files has a row."""
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
        fix = cache_fix(error) or "check the path or hub id"
        raise DataError(Problem(Code.DATA_HUB, what, source.path, fix=fix)) from None
    return HubSplit(f"{source.path}[{split}]", dataset)


def _check_reachable(hub_id: str) -> None:
    """Fail at once without a connection: `load_dataset` retries for 20 s before it looks into its cache.

    Raises:
        DataError: Not a hub id; or there is no connection, and the dataset is not cached.
    """
    if upstream.hub_dataset_cache(hub_id).is_dir():
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "README.md", repo_type="dataset"), timeout=10)
    except HFValidationError:
        code, what = Code.DATA_HUB, "no such file, and not a valid id of a hub dataset"
    except HfHubHTTPError:
        return  # the hub answers; `load_dataset` reports what it says
    except Exception as error:  # whatever the network stack raises
        code = Code.DATA_HUB
        what = f"no such file; the hub cannot be reached and no such dataset is cached ({error})"
    else:
        return
    raise DataError(Problem(code, what, hub_id, fix="check the path, or the connection"))
