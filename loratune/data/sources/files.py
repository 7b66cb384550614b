"""Which data files a path, a directory or a glob names."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from loratune.errors import DataError, Problem

KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
PACKED = tuple(f"{kind}.gz" for kind in KINDS if kind != ".parquet")


def kind(path: Path) -> str:
    """`.jsonl`, `.csv.gz`, ...; empty for a file that is not read."""
    name = path.name.lower()
    return next((ending for ending in (*PACKED, *KINDS) if name.endswith(ending) and name != ending), "")


def looks_like_hub_id(path: str) -> bool:
    """`name` or `owner/name` without a data file's ending; anything else means a local path."""
    parts = path.split("/")
    starts_local = parts[0] in ("", ".", "..") or path.startswith("~")
    return (
        len(parts) <= 2 and bool(parts[-1]) and not starts_local and not kind(Path(path)) and not glob.has_magic(path)
    )


def find(path: Path) -> list[Path]:
    """The data files that `path` names: itself, those directly in a directory, those that match a glob; by name.

    Raises DataError: nothing there, no permission, not a kind of file that is read.
    """
    try:
        if path.is_dir():
            return _known(path.iterdir(), path, "no data files in this directory")
        if not path.exists():
            if glob.has_magic(str(path)):
                return _known(_matches(path), path, "no data files match this glob")
            raise DataError(Problem("no such file", str(path), fix="check the path"))
        if not path.is_file():
            raise DataError(Problem("neither a file nor a directory", str(path)))
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    if not kind(path):
        raise DataError(Problem(f"unknown kind of file `{path.suffix}`", str(path), fix=f"use {_endings()}"))
    return [path]


def _known(paths: Iterable[Path], asked: Path, otherwise: str) -> list[Path]:
    if files := sorted(path for path in paths if kind(path) and path.is_file()):
        return files
    raise DataError(Problem(otherwise, str(asked), fix=f"looked for {_endings()}"))


def _matches(pattern: Path) -> set[Path]:
    """Raises OSError: the directory that the search starts from may not be listed, which `glob` does not tell."""
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if fixed.is_dir():
        os.listdir(fixed)
    return {Path(name) for name in glob.iglob(str(pattern), recursive=True)}


def _endings() -> str:
    return ", ".join(kind for kind in KINDS if kind != ".parquet") + " (each also as .gz), .parquet"
