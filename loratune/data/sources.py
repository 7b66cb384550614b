"""Reading rows: files, directories and hub ids → rows that know the line they came from."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ReadInstruction, load_dataset
from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loratune.config import Source
from loratune.errors import DataError, Problem

MAX_PROBLEMS = 10

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # csv's own limit of 128 KiB a cell is shorter than a document


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data. where: `file:line`, or `hub-id[split]:row` counted from 1."""

    where: str
    values: dict[str, Any]


def read(source: Source) -> list[Row]:
    """All rows of a source, in order, after its slice.

    Raises DataError: nothing there, unreadable, not UTF-8, not valid (up to 10 lines named), no rows.
    """
    path = Path(source.path).expanduser()
    if looks_like_hub_id(source.path) and not os.path.exists(path):
        rows = list(_read_hub(source))
    else:
        rows = _sliced([row for file in _files(path) for row in _read_file(file)], source)
    if not rows:
        split = f" in {source.split}" if source.split else ""
        raise DataError(Problem(f"0 rows{split}", source.path, fix="there is nothing to learn from"))
    return rows


def looks_like_hub_id(path: str) -> bool:
    """`name` or `owner/name` without a data file's ending; anything else means a local path."""
    parts = path.split("/")
    return len(parts) <= 2 and parts[0] not in ("", ".", "..", "~") and Path(path).suffix.lower() not in _READERS


def _files(path: Path) -> list[Path]:
    """The data files that `path` names: itself, or those directly in a directory, by name."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS and file.is_file())
            if not files:
                raise DataError(Problem("no data files in this directory", str(path), fix=f"looked for {_endings()}"))
            return files
        if not path.exists():
            raise DataError(Problem("no such file", str(path)))
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    if path.suffix.lower() not in _READERS:
        raise DataError(Problem(f"unknown kind of file `{path.suffix}`", str(path), fix=f"use {_endings()}"))
    return [path]


def _endings() -> str:
    return ", ".join(_READERS)


def _read_file(path: Path) -> Iterator[Row]:
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for item in _READERS[path.suffix.lower()](_lines(path, file, problems), path):
                if not isinstance(item, Problem):
                    yield item
                elif item.where not in [problem.where for problem in problems]:
                    problems.append(item)
                if len(problems) >= MAX_PROBLEMS:
                    break
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    if problems:
        raise DataError(problems)


def _lines(path: Path, file: Iterable[bytes], problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, without line ends; a BOM is dropped, bytes that are not UTF-8 become problems."""
    for number, raw in enumerate(file, start=1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")  # read on, so that the lines after it keep their numbers
            what = f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8"
            problems.append(Problem(what, f"{path}:{number}", fix="save the file as UTF-8"))
            if len(problems) >= MAX_PROBLEMS:
                return
        yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _read_jsonl(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row | Problem]:
    held: Problem | None = None
    for number, line in lines:
        if not line.strip():
            continue
        if held:
            yield held
            held = None
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            held = Problem(f"not valid JSON: {_reason(error)}", where)
        else:
            yield _mapping(values, where)
    if held:
        yield held


def _read_json(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row | Problem]:
    text = "\n".join(line for _, line in lines)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # JSONL under the name of JSON
            yield from _read_jsonl(iter(enumerate(text.split("\n"), start=1)), path)
            return
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        yield Problem(f"not valid JSON: {_reason(error)}", where)
        return
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        yield Problem("expected a list of objects", str(path))
        return
    for number, values in enumerate(rows, start=1):
        yield _mapping(values, f"{path}:row {number}")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # a number of more digits than Python reads
        return str(error)
    cut = error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg
    return f"{'cut off' if cut else error.msg} at column {error.colno}"


def _mapping(values: Any, where: str) -> Row | Problem:
    if isinstance(values, dict):
        return Row(where, values)
    return Problem(f"a row must be an object with named fields, got {type(values).__name__}", where)


def _read_csv(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row | Problem]:
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            where, number = f"{path}:{number}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if doubled := sorted({name for name in header if header.count(name) > 1}):
                    yield Problem(f"the header names {', '.join(doubled)} more than once", where)
                    return
            elif len(cells) != len(header):
                yield Problem(f"{len(cells)} cells, but the header names {len(header)}", where)
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        yield Problem(f"not valid CSV: {error}", f"{path}:{number}")


def _read_txt(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row | Problem]:
    for number, line in lines:
        if line.strip():
            yield Row(f"{path}:{number}", {"text": line})


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def _sliced(rows: list[Row], source: Source) -> list[Row]:
    """The rows that `split` names. As in `datasets`, a local file or directory is one split, called train."""
    if source.split is None:
        return rows
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        fix = "a local file has the one split `train`; write a slice as train[:2000] or train[10%:20%]"
        raise DataError(Problem(f"split `{source.split}`: {error}", source.path, fix=fix)) from None
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _read_hub(source: Source) -> Iterator[Row]:
    split = source.split or "train"
    _check_reachable(source.path)
    try:
        dataset = load_dataset(source.path, split=split)
    except Exception as error:  # every kind of failure of the hub, its cache and its builders ends up here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        what = f"no such file, and it cannot be loaded as a hub dataset ({reason})"
        raise DataError(Problem(what, source.path, fix="check the path, or the hub id")) from None
    for number, values in enumerate(dataset, start=1):
        yield Row(f"{source.path}[{split}]:{number}", values)


def _check_reachable(hub_id: str) -> None:
    """Without a connection `load_dataset` retries for 20 s before it looks into its cache; say it at once instead.

    Raises DataError: not a hub id; no connection, and the dataset is not cached.
    """
    *owner, name = hub_id.split("/")
    if Path(datasets_config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)])).is_dir():
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "README.md", repo_type="dataset"), timeout=10)
    except HFValidationError:
        what = "no such file, and not the id of a hub dataset"
    except HfHubHTTPError:
        return  # the hub answers; `load_dataset` tells what it says
    except Exception as error:  # whatever the network stack of the day raises
        what = f"no such file; the hub cannot be reached and no such dataset is cached ({error})"
    else:
        return
    raise DataError(Problem(what, hub_id, fix="check the path, or the connection"))
