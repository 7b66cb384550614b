"""The cache of tokenized rows: where its entries are, who writes them, and when they are removed.

Entries lie in the cache of `datasets` (HF_DATASETS_CACHE), in `loratune/<key>`, where the key is a hash of all that
decides the rows. They are written in `<key>.partial`, by the one process that holds a lock on the key, and one rename
publishes them. Nothing is written or removed under the published name, so a reader finds there all rows or none. Where
the cache cannot be written, or another process is writing the same rows, they go to a temporary directory.

Every entry holds a record that says whose it is. A directory without such a record, or with anything else in it, is
left alone. Rows are trained on without a further check, so they are read only from what this user wrote and nobody else
can change.
"""

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.console import progress
from loratune.data.token_cache import WHOLE, TokenCache, TokenCacheWriter, open_if_whole, read_record, write_record
from loratune.data.upstream import datasets_cache_dir
from loratune.errors import Problem, ResourceError
from loratune.system.files import (
    DIRECTORY_MODE,
    UntrustedError,
    create_private_file,
    is_directory,
    is_file,
    make_private_directory,
    open_private_directory,
    ownership_problems,
    try_lock,
)

_log = logging.getLogger(__name__)

KEPT_DAYS = 30
"""Entries that no run has used for so long are removed when a run begins."""
_ENTRY = "entry.json"
_PARTIAL, _REMOVED = ".partial", ".removed"
_NAMES = re.compile(rf"([0-9a-f]{{64}})({re.escape(_PARTIAL)}|{re.escape(_REMOVED)})?")
_VALUES = "values"
_FILES = re.compile(
    rf"[0-9]{{5}}\.(arrow|json|unfinished)|{re.escape(_ENTRY)}|entry\.unfinished|whole(\.unfinished)?|{_VALUES}"
)
_WRITER = "loratune, tokenised rows"


def load_or_write(key: str, write: Callable[[TokenCacheWriter], None]) -> TokenCache:
    """Load the rows of a key; where there are none, write them.

    Args:
        key: 64 hexadecimal digits.
        write: Writes the rows, continuing after those that `TokenCacheWriter.read` counts.

    Raises:
        ResourceError: There is no room on the disk. Whatever `write` raises is raised too; then nothing is kept, unless
            the user stopped it.
    """
    root = _root()
    entry = root / key
    usable, remark = _secure(root)
    remarks = [remark, _remark_on_distrust(entry)]
    rows = _load(entry) if usable else None
    if rows is None:
        rows = _write(root, key, write, usable=usable)
    rows.remark = "; ".join(filter(None, remarks))
    return rows


def load_values(key: str) -> NDArray[np.float64] | None:
    """The numbers that `store_values` kept for rows; None if there are none.

    key: 64 hexadecimal digits.
    """
    root = _root()
    entry = root / key
    try:
        if not _secure(root)[0] or any(ownership_problems(entry)) or read_record(entry / _ENTRY) != _record(key):
            return None
        os.utime(entry)
        if not is_file(entry / _VALUES):
            return None
        whole, content = read_record(entry / WHOLE), (entry / _VALUES).read_bytes()
        if whole["sha256"] == _digest(key, content):
            return np.frombuffer(content, np.float64)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _log.debug("the values in %s are not used", entry, exc_info=True)
    return None


def store_values(key: str, values: NDArray[np.float64]) -> None:
    """Keep numbers that belong to rows, such as log-probabilities, unless the cache cannot be written."""
    root, content = _root(), np.ascontiguousarray(values, np.float64).tobytes()
    if not _secure(root)[0]:
        return
    with _claim(root, key) as claimed:
        if not claimed or load_values(key) is not None or (partial := _prepare_partial(root, key)) is None:
            return
        try:
            create_private_file(partial / _VALUES)
            (partial / _VALUES).write_bytes(content)
            write_record(partial / WHOLE, {"sha256": _digest(key, content)})
            partial.rename(root / key)
        except OSError:
            _log.debug("the values of %s are not kept", key, exc_info=True)
            with suppress(OSError):  # Half of them would take the room that others need.
                _clear(partial)


def _digest(key: str, content: bytes) -> str:
    """SHA-256 of values under their key, as those of another key are none of this one."""
    return hashlib.sha256(key.encode() + content).hexdigest()


def has_entry(key: str) -> bool:
    """Whether anything is kept under a key, of whatever kind."""
    return os.path.lexists(_root() / key)


def discard_values(key: str) -> None:
    """Remove what `store_values` kept, if anything."""
    root = _root()
    if not has_entry(key):
        return
    with _claim(root, key) as claimed, suppress(OSError):
        if claimed and _is_own(root / key):
            _clear(_rename_for_removal(root / key))


def open_trusted(directory: Path) -> TokenCache | None:
    """Open rows that another process of this user has written.

    Returns:
        The rows, or None if there are none, or somebody else could have changed them.
    """
    try:
        return None if any(ownership_problems(directory)) else open_if_whole(directory)
    except OSError:
        _log.debug("the rows of another process in %s are not used", directory, exc_info=True)
        return None


def remove_old_entries() -> None:
    """Remove the entries that no run has used for `KEPT_DAYS`. A process that reads them keeps what it has mapped."""
    root = _root()
    with suppress(OSError), open_private_directory(root):
        for path in sorted(root.iterdir()):
            if (name := _NAMES.fullmatch(path.name)) and is_directory(path) and _is_old(path):
                with _claim(root, name[1]) as claimed, suppress(OSError):
                    if claimed and _is_own(path) and _is_old(path):
                        _remove(path)


def _root() -> Path:
    return datasets_cache_dir() / "loratune"


def _secure(root: Path) -> tuple[bool, str]:
    """Create the cache if need be, and see to it that only this user can write to it.

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


def _remark_on_distrust(entry: Path) -> str:
    """Returns a line for the user if there is an entry that somebody else may have changed; else an empty one."""
    with suppress(OSError):
        return next((f"the cached rows were not used: {reason}" for reason in ownership_problems(entry)), "")
    return ""


@progress("checking the tokenized rows")
def _load(entry: Path) -> TokenCache | None:
    """Load a published entry. It is marked as used before it is read, see `_remove`."""
    try:
        if not any(ownership_problems(entry)) and read_record(entry / _ENTRY) == _record(entry.name):
            os.utime(entry)
            return open_if_whole(entry)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _log.debug("the rows in %s are not used", entry, exc_info=True)
    return None


def _write(root: Path, key: str, write: Callable[[TokenCacheWriter], None], *, usable: bool) -> TokenCache:
    """Write the rows of a key, unless another process has published them in the meantime."""
    entry = root / key
    with _claim(root, key) if usable else nullcontext(False) as claimed:
        if claimed and (published := _load(entry)) is not None:
            return published
        partial, lifetime = _prepare_partial(root, key) if claimed else None, None
        if partial is None:
            lifetime = tempfile.TemporaryDirectory(prefix="loratune-rows-")
            partial = Path(lifetime.name)
        _write_or_clear(partial, write)
        rows = TokenCache(partial, lifetime)
        if lifetime is None:
            partial.rename(entry)
            rows.directory = entry
        return rows


def _record(key: str) -> dict[str, str]:
    """Returns the record that says whose an entry is, and which."""
    return {"made_by": _WRITER, "key": key}


@contextmanager
def _claim(root: Path, key: str) -> Iterator[bool]:
    """Lock a key. Yields whether that succeeded: then no other process writes or removes what belongs to the key."""
    with ExitStack() as stack:
        try:
            claimed = stack.enter_context(try_lock(root / f"{key}.lock"))
        except OSError:
            _log.debug("%s cannot be locked", key, exc_info=True)
            claimed = False
        yield claimed


def _prepare_partial(root: Path, key: str) -> Path | None:
    """Prepare the directory to write an entry in, which keeps the shards that it has already. The key is claimed.

    A damaged entry under the key is removed.

    Returns:
        The directory, or None if it cannot be written, or something else has its name.
    """
    entry, partial = root / key, root / f"{key}{_PARTIAL}"
    try:
        if not all(_is_own(path) for path in (entry, partial) if os.path.lexists(path)):
            return None
        if entry.exists():
            _clear(_rename_for_removal(entry))
        if partial.exists() and (any(ownership_problems(partial)) or not _is_movable(partial, key)):
            _clear(partial)
        partial.mkdir(DIRECTORY_MODE, exist_ok=True)
        write_record(partial / _ENTRY, _record(key))
    except OSError:
        _log.debug("rows cannot be written in %s", partial, exc_info=True)
        return None
    return partial


def _is_movable(partial: Path, key: str) -> bool:
    """Whether a directory can be renamed, as it will be; on overlayfs a directory of the image cannot."""
    aside = partial.with_name(f"{key}{_REMOVED}")
    try:
        if aside.exists() and _is_own(aside):
            _clear(aside)
        partial.rename(aside)
        aside.rename(partial)
    except OSError:
        _log.debug("%s cannot be renamed", partial, exc_info=True)
        return False
    return True


def _write_or_clear(directory: Path, write: Callable[[TokenCacheWriter], None]) -> None:
    """Write the rows, and remove the directory where that fails, unless the user stopped it."""
    writer = TokenCacheWriter(directory)
    try:
        write(writer)
        writer.finish()
    except KeyboardInterrupt:
        writer.stop()
        raise
    except Exception as error:
        with suppress(OSError):
            _clear(directory)
        if isinstance(error, OSError):
            what = f"the tokenized rows cannot be written: {error.strerror}"
            fix = "free some space, or set HF_DATASETS_CACHE to a directory on another disk"
            raise ResourceError(Problem(Code.DATA_CACHE_NOT_WRITTEN, what, str(directory), fix=fix)) from None
        raise


def _is_old(path: Path) -> bool:
    """Whether no run has used an entry for long; one that was only half removed is old in any case."""
    return path.name.endswith(_REMOVED) or _is_unused(path)


def _is_unused(path: Path) -> bool:
    return path.lstat().st_mtime < time.time() - KEPT_DAYS * 86400


def _is_own(path: Path) -> bool:
    """Whether a directory was written by this module, for this user, and holds nothing else.

    Its record says so, or, if an older release wrote it, the record of its first shard. An empty directory counts as
    own, since nothing is lost with it.
    """
    name, files = _NAMES.fullmatch(path.name), set[str]()
    if name is None or not is_directory(path) or path.lstat().st_uid != os.geteuid():
        return False
    with os.scandir(path) as entries:
        for entry in entries:
            if not _FILES.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                return False
            files.add(entry.name)
    return files <= {"entry.unfinished"} or _has_own_record(path, name[1])


def _has_own_record(path: Path, key: str) -> bool:
    """Whether a directory has the record of an entry under this key, or that of a shard of an older release."""
    for name in (_ENTRY, "00000.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = read_record(path / name, any_version=True)
            if record.items() >= _record(key).items() or record.keys() == {"sha256", "lots", "report"}:
                return True
    return False


def _remove(path: Path) -> None:
    """Remove an old entry, unless a process has marked it as used in the meantime."""
    if path.name.endswith((_PARTIAL, _REMOVED)):
        _clear(path)
        return
    renamed = _rename_for_removal(path)
    if _is_unused(renamed):
        _clear(renamed)
    else:
        renamed.rename(path)


def _rename_for_removal(path: Path) -> Path:
    """Rename an entry, so that only processes that read it already still use it. Returns its new path."""
    renamed = path.with_name(f"{path.name}{_REMOVED}")
    if renamed.exists() and _is_own(renamed):
        _clear(renamed)
    path.rename(renamed)
    return renamed


def _clear(path: Path) -> None:
    """Remove the files that this module writes, and the directory, if nothing else is in it."""
    for file in sorted(path.iterdir()):
        if _FILES.fullmatch(file.name):
            file.unlink()
    path.rmdir()
