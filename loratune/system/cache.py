"""The cache of this user: what was computed once, and would be the same each time.

An entry is a file, or a directory of files. Its name is its key, a hash of everything that determines it. There are
several kinds of entries, such as results of checks, tokenized rows and compiled libraries, and the same rules for all:

- Entries are used, and libraries executed, without confirmation. So an entry is read only if it and the directory that
  it is in belong to this user, are no links, and cannot be written to by anybody else.
- A digest of key and content detects damage; damaged entries count as missing.
- An entry is written under another name, and renamed when it is complete. So there are no locks: readers see a whole
  entry or none, and of processes that write the same entry, the last or the first one's stays.
- Entries that were not used for some time, and the least recently used ones of too many, are removed. Foreign files
  stay.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from loratune.system import platforms
from loratune.system.files import is_directory, is_file, open_file, written_beside

_log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PACKAGE = Path(__file__).parents[1]
_ELSEWHERE: ContextVar[Path | None] = ContextVar("elsewhere", default=None)

Value = TypeVar("Value")


def cache_directory() -> Path:
    """The directory `loratune` in XDG_CACHE_HOME, or else in ~/.cache. Raises RuntimeError: there is no home directory.

    Tokenized rows, which may be large, are in that of HF_DATASETS_CACHE, see `data.token_cache`.
    """
    value = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(value) if os.path.isabs(value) else Path.home() / ".cache"  # The XDG specification ignores others.
    return parent / "loratune"


@contextmanager
def keeping_in(folder: Path) -> Iterator[None]:
    """Inside, entries of all kinds are kept in another directory, so none of those that were kept before is known."""
    token = _ELSEWHERE.set(folder)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def elsewhere() -> Path | None:
    """The directory of the innermost `keeping_in`; None outside."""
    return _ELSEWHERE.get()


def ownership_problem(status: os.stat_result) -> str:
    """Why somebody else can write to a file or directory, in words; empty if only this user can."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if (owner := platforms.owner()) is not None and status.st_uid != owner:
        return "belongs to another user"
    return "can be written to by others" if owner is not None and status.st_mode & _WRITABLE_BY_OTHERS else ""


@dataclass(frozen=True)
class EntryKind:
    """A kind of entries.

    Attributes:
        place: Returns the directory that they are in. May raise RuntimeError: there is no home directory.
        ending: The end of their names, which follows the key of 64 hexadecimal digits.
        days: Entries that were not used for this many days are removed.
        most: The number of entries of which the least recently used ones are removed.
        files: The names of the files in an entry that is a directory; None: entries are files.
    """

    place: Callable[[], Path]
    ending: str
    days: int
    most: int
    files: re.Pattern[str] | None = None

    @property
    def directory(self) -> Path:
        """Where the entries are. Raises RuntimeError: there is no home directory."""
        return elsewhere() or self.place()

    def path(self, key: str) -> Path:
        """The path of an entry. Raises RuntimeError: there is no home directory."""
        return self.directory / f"{key}{self.ending}"

    def problem(self) -> str:
        """Make the directory if necessary. Returns why entries cannot be kept in it, in words; empty if they can."""
        try:
            _make_private_directory(self.directory)
            why = ownership_problem(self.directory.lstat())
            return f"{self.directory} {why}" if why else ""
        except (OSError, RuntimeError) as error:
            return _reason(error)

    def read(self, key: str) -> bytes | None:
        """The content of a file; None if it is missing or damaged, or if anybody else could have written it."""
        with suppress(OSError, RuntimeError):
            path = self.path(key)
            if ownership_problem(path.parent.lstat()):
                return None
            with open_file(path) as file:
                written = b"" if ownership_problem(os.fstat(file.fileno())) else file.read()
            with suppress(OSError):  # such as a file system that is read-only
                os.utime(path)
            content = written[:-_DIGEST_BYTES]
            return content if written == sealed(key, content) else None
        return None

    def write(self, key: str, content: bytes) -> str:
        """Write a file that only this user can read, whatever the umask is. Returns why it cannot be written, in words;
        nothing is left of it then."""
        if problem := self.problem():
            return problem
        self.remove_old()
        try:
            path = self.path(key)
            with written_beside(path, lambda unfinished: unfinished.replace(path), 0o600) as file:
                file.write(sealed(key, content))
        except OSError as error:
            return _reason(error)
        return ""

    def remove_old(self) -> None:
        """Remove entries, also unfinished ones, by `days` and `most`. Processes that use them are not affected."""
        if self.problem():
            return
        name, found = re.compile(rf"\.?[0-9a-f]{{64}}{re.escape(self.ending)}(\.\w+)*"), list[tuple[float, Path]]()
        with suppress(OSError):
            for path in self.directory.iterdir():
                with suppress(OSError):
                    if name.fullmatch(path.name) and self._is_kind_of_entry(path):
                        found.append((path.lstat().st_mtime, path))
        for number, (used, path) in enumerate(sorted(found, reverse=True)):
            if number >= self.most or used < time.time() - self.days * 86400:
                self.remove(path)

    def remove(self, path: Path) -> None:
        """Remove an entry, unless it is something else or contains foreign files. Readers detect a half-removed entry
        as damaged."""
        with suppress(OSError):
            if not self._is_kind_of_entry(path):
                return
            if self.files is None:
                path.unlink()
            elif all(self.files.fullmatch(file.name) and is_file(file) for file in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)

    def _is_kind_of_entry(self, path: Path) -> bool:
        return is_file(path) if self.files is None else is_directory(path)


def sealed(key: str, content: bytes) -> bytes:
    """What is written for a content: it, and a digest that detects damage, or the name of another entry."""
    return content + hashlib.sha256(key.encode() + content).digest()


def _make_private_directory(path: Path) -> None:
    """Make a directory and those above it, which nobody else can write to whatever the umask is. Raises OSError."""
    if not path.parent.is_dir():
        _make_private_directory(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)


def _reason(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if isinstance(error.filename, str) else "")
    return str(error)


# Results of checks

RESULTS = EntryKind(cache_directory, ".json", days=90, most=10_000)
LAYERS = EntryKind(cache_directory, ".layer", days=90, most=10_000)
"""Kinds of entries: what was found of a model, and of the layers of a family."""
REFUSAL = str | None
"""The type of a kept reason, which is None where there is none."""


class KeptResults:
    """Results by name, in an entry of their own.

    parts: what they depend on, as plain values; None: nothing is kept. of: the kind of the entry; None: `RESULTS`.
    """

    def __init__(self, parts: Any = None, of: EntryKind | None = None):
        self._given = of
        text = json.dumps(parts, sort_keys=True, default=_plain)
        self.key = hashlib.sha256(text.encode()).hexdigest() if parts is not None else ""

    def once(self, name: str, kind: type | UnionType, compute: Callable[[], Value]) -> Value:
        """The result of a function, which is called if none of this type is kept. JSON must be able to hold it."""
        known = self.load()
        if name in known and isinstance(known[name], kind):
            kept: Value = known[name]
            return kept
        value = compute()
        if why := self.store({**self.load(), name: value}):  # Another process may have kept others meanwhile.
            _log.debug("the result of %s is not kept: %s", name, why)
        return value

    def load(self) -> dict[str, Any]:
        """All results; empty if there are none."""
        return dict(json.loads((self._of.read(self.key) if self.key else None) or b"{}"))

    def store(self, results: dict[str, Any]) -> str:
        """Replace all results. Returns why that is not possible, or an empty text."""
        return self._of.write(self.key, json.dumps(results).encode()) if self.key else "their conditions are unknown"

    @property
    def _of(self) -> EntryKind:
        return self._given or RESULTS


def _plain(value: Any) -> Any:
    """A value for JSON. The order of a set differs from process to process."""
    return sorted(value, key=str) if isinstance(value, set) else str(value)


NOTHING_KEPT = KeptResults()
"""Computes each result anew."""


@cache
def source_digest() -> str:
    """SHA-256 of the source code of this package, on which results depend."""
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("py", "c", "h", "json") for path in _PACKAGE.rglob(f"*.{ending}")):
        digest.update(f"{path.relative_to(_PACKAGE)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
