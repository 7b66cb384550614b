"""The entries of the cache of tokenized rows, and of numbers that belong to them, such as log-probabilities.

An entry is the directory `loratune/<key>` in the cache of `datasets` (HF_DATASETS_CACHE); the key is a hash of all that
decides its content. It is written under another name and renamed when it is complete, so a reader finds all of an
entry or nothing, and of several processes that write the same one the first counts. What Ctrl-C has stopped is kept as
`<key>.partial`, from which the next run continues.

Rows are trained on without a further check, so only entries that this user wrote, and that nobody else can change, are
read. Directories that hold anything that this module does not write are left alone. Where the cache cannot be used, a
temporary directory takes the rows.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.data.token_cache import UNREADABLE, WHOLE, TokenCache, TokenCacheWriter, read_record, write_record
from loratune.data.upstream import datasets_cache_dir
from loratune.errors import Problem, ResourceError
from loratune.events import progress
from loratune.system.files import (
    UntrustedError,
    create_private_file,
    is_directory,
    is_file,
    make_private_directory,
    open_private_directory,
    ownership_problems,
    read_text,
)

_log = logging.getLogger(__name__)

KEPT_DAYS = 30
"""Entries that no run has used for so long are removed when a run begins."""
_ENTRY, _VALUES = "entry.json", "values"
_NAME = re.compile(r"[0-9a-f]{64}(\..*)?")
_FILE = re.compile(r"[0-9]{5}\.(arrow|json|unfinished)|entry\.(json|unfinished)|whole(\.unfinished)?|values")


def load_or_write(key: str, write: Callable[[TokenCacheWriter], None]) -> TokenCache:
    """Load the rows of a key, or write them if there are none.

    Args:
        key: 64 hexadecimal digits.
        write: Writes the rows, continuing after those that `TokenCacheWriter.read` counts.

    Raises:
        ResourceError: There is no room on the disk. Whatever `write` raises is raised too; then only what Ctrl-C has
            stopped is kept.
    """
    entry = _root() / key
    usable, remark = _secure(entry.parent)
    distrust = ""
    with suppress(OSError):
        distrust = next((f"the cached rows were not used: {reason}" for reason in ownership_problems(entry)), "")
    rows = _load(entry) if usable else None
    if rows is None:
        rows = _write(entry, write, usable)
    rows.remark = "; ".join(filter(None, [remark, distrust]))
    return rows


def open_trusted(directory: Path) -> TokenCache | None:
    """Open rows that another process of this user has written; None if there are none, or others can change them."""
    try:
        return None if any(ownership_problems(directory)) else TokenCache(directory)
    except UNREADABLE:
        _log.debug("the rows in %s are not used", directory, exc_info=True)
        return None


def has_entry(key: str) -> bool:
    """Whether anything is kept under a key, of whatever kind."""
    return os.path.lexists(_root() / key)


def load_values(key: str) -> NDArray[np.float64] | None:
    """The numbers that `store_values` kept under a key of 64 hexadecimal digits; None if there are none."""
    entry = _root() / key
    try:
        if _is_trusted(entry) and (entry / _VALUES).is_file():
            os.utime(entry)
            content = (entry / _VALUES).read_bytes()
            if read_record(entry / WHOLE)["sha256"] == hashlib.sha256(key.encode() + content).hexdigest():
                return np.frombuffer(content, np.float64)
    except UNREADABLE:
        _log.debug("the values in %s are not used", entry, exc_info=True)
    return None


def store_values(key: str, values: NDArray[np.float64]) -> None:
    """Keep numbers that belong to rows, unless the cache cannot be written."""
    entry, content = _root() / key, np.ascontiguousarray(values, np.float64).tobytes()
    if not _secure(entry.parent)[0] or load_values(key) is not None:
        return
    directory = None
    try:
        directory = _new_directory(entry, usable=True)
        write_record(directory / _ENTRY, _owner(entry))
        create_private_file(directory / _VALUES)
        (directory / _VALUES).write_bytes(content)
        write_record(directory / WHOLE, {"sha256": hashlib.sha256(key.encode() + content).hexdigest()})
        _publish(directory, entry)
    except OSError:
        _log.debug("the values of %s are not kept", key, exc_info=True)
    if directory:  # half of them would take the room that others need
        shutil.rmtree(directory, ignore_errors=True)


def discard_values(key: str) -> None:
    """Remove what `store_values` kept, if anything."""
    with suppress(OSError):
        _remove(_root() / key)


def remove_old_entries() -> None:
    """Remove the entries that no run has used for `KEPT_DAYS`. A process that reads them keeps what it has mapped."""
    root, limit = _root(), time.time() - KEPT_DAYS * 86400
    with suppress(OSError), open_private_directory(root):
        for path in sorted(root.iterdir()):
            with suppress(OSError):
                if _NAME.fullmatch(path.name) and path.lstat().st_mtime < limit:
                    _remove(path)


def _root() -> Path:
    return datasets_cache_dir() / "loratune"


def _secure(root: Path) -> tuple[bool, str]:
    """Create the cache if need be, and make sure that only this user can write to it.

    Returns:
        Whether it can be used, and a line for the user, or an empty one.
    """
    try:
        make_private_directory(root)
        with open_private_directory(root, repair=True) as directory:
            return True, f"others could write to {root}: now only you can" if directory.repaired else ""
    except UntrustedError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{root}: {error.strerror}; set HF_DATASETS_CACHE or HF_HOME to a directory that you can write to"
    return False, f"the rows are tokenized for this run only: {reason}"


def _is_trusted(entry: Path) -> bool:
    """Whether an entry is of this key, and nobody else could have changed it. Raises one of `UNREADABLE`."""
    return not any(ownership_problems(entry)) and read_record(entry / _ENTRY) == _owner(entry)


@progress("checking the tokenized rows")
def _load(entry: Path) -> TokenCache | None:
    """Load an entry; None if it cannot be used. It is marked as used first, so that no process removes it."""
    try:
        if entry.exists() and _is_trusted(entry):
            os.utime(entry)
            return TokenCache(entry)
    except UNREADABLE:
        _log.debug("the rows in %s are not used", entry, exc_info=True)
    return None


def _write(entry: Path, write: Callable[[TokenCacheWriter], None], usable: bool) -> TokenCache:
    """Write the rows of an entry, unless another process has published them meanwhile.

    usable: whether the cache may hold them; otherwise a temporary directory does.
    """
    directory, stopped = _new_directory(entry, usable), entry.with_name(f"{entry.name}.partial")
    writer = None
    try:
        if usable and os.path.lexists(stopped) and _is_own(stopped) and not any(ownership_problems(stopped)):
            with suppress(OSError):  # another process continues from there
                stopped.rename(directory)
        write_record(directory / _ENTRY, _owner(entry))
        writer = TokenCacheWriter(directory)
        write(writer)
        writer.finish()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and usable and writer:
            writer.flush()
            with suppress(OSError):
                directory.rename(stopped)
        shutil.rmtree(directory, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        what = f"the tokenized rows cannot be written: {error.strerror}"
        fix = "free some space, or set HF_DATASETS_CACHE to a directory on another disk"
        raise ResourceError(Problem(Code.DATA_UNREADABLE, what, str(directory), fix=fix)) from None
    if usable and (published := _load(entry)) is not None:
        shutil.rmtree(directory, ignore_errors=True)
        return published
    rows = TokenCache(directory)
    if usable and _publish(directory, entry):
        rows.directory = entry
    else:
        weakref.finalize(rows, shutil.rmtree, directory, ignore_errors=True)
    return rows


def _new_directory(entry: Path, usable: bool) -> Path:
    """A new directory, beside the entry where the cache is usable."""
    return Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent if usable else None))


def _publish(directory: Path, entry: Path) -> bool:
    """Rename a complete directory to its entry, in the place of what this module wrote there; False if it cannot be."""
    try:
        if os.path.lexists(entry):
            _remove(entry)
        directory.rename(entry)
    except OSError:
        _log.debug("%s cannot be renamed", directory, exc_info=True)
        return False
    return True


def _owner(path: Path) -> dict[str, str]:
    """The record that says whose a directory is, and of which key."""
    return {"made_by": "loratune, tokenised rows", "key": path.name.partition(".")[0]}


def _is_own(path: Path) -> bool:
    """Whether a directory is an entry that this module wrote for this user, whole or not, with nothing else in it."""
    if not is_directory(path) or path.lstat().st_uid != os.geteuid():
        return False
    files = [*path.iterdir()]
    if not all(_FILE.fullmatch(file.name) and is_file(file) for file in files):
        return False
    if {file.name for file in files} <= {"entry.unfinished"}:
        return True
    with suppress(*UNREADABLE):
        record: Any = json.loads(read_text(path / _ENTRY))
        return bool(record.items() >= _owner(path).items())
    return False


def _remove(path: Path) -> None:
    """Remove an entry, if this module wrote it. It is renamed first, so that no process begins to read it."""
    if _is_own(path):
        removed = _new_directory(path.with_name(path.name.partition(".")[0]), usable=True)
        try:
            path.rename(removed)
        finally:
            shutil.rmtree(removed, ignore_errors=True)
