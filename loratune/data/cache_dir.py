"""The cache of tokenised rows: where they are found, who writes them, and when they are removed.

Rows lie in the cache of `datasets` (HF_DATASETS_CACHE), in `loratune/<key>`, where the key is a hash of all that
decides them. They are written in `<key>.partial`, by the one process that holds a lock on the key, and one rename
publishes them. Nothing is written or removed under the published name, so that whoever reads there finds all of them
or none. Where the cache cannot be written, or another process is writing the same rows, they go to a temporary
directory.

Every directory holds a record of whose it is. What has no such record, or holds anything else, is left alone. Rows are
trained on as they are found, so that they are read only from what this user made and nobody else can change.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from datasets import config as datasets_config

from loratune.data import token_cache
from loratune.data.token_cache import TokenCache, Writer, read_record, write_record
from loratune.errors import Problem, ResourceError
from loratune.system import private
from loratune.system.plain import is_directory, locked

_log = logging.getLogger(__name__)

KEPT_DAYS = 30
"""Rows that nobody wanted for so long are removed when a run begins."""
_ENTRY = "entry.json"
_PARTIAL, _REMOVED = ".partial", ".removed"
_NAMES = re.compile(rf"([0-9a-f]{{64}})({re.escape(_PARTIAL)}|{re.escape(_REMOVED)})?")
_FILES = re.compile(rf"[0-9]{{5}}\.(arrow|json|unfinished)|{re.escape(_ENTRY)}|entry\.unfinished|whole(\.unfinished)?")
_MADE_BY = "loratune, tokenised rows"


def kept(key: str, fill: Callable[[Writer], None]) -> TokenCache:
    """The rows that are kept under a key. Where there are none, `fill` writes them, going on from `Writer.read`.

    Raises what `fill` raises, and then keeps nothing, unless the user stopped it. Raises ResourceError: no room on the
    disk.
    """
    root = _root()
    final = root / key
    usable, remark = _secured(root)
    remarks = [remark, _distrust(final)]
    rows = _found(final) if usable else None
    if rows is None:
        rows = _made(root, key, fill, usable=usable)
    rows.remark = "; ".join(filter(None, remarks))
    return rows


def opened(directory: Path) -> TokenCache | None:
    """Rows that another process of this user has written; None if there are none, or others could have changed them."""
    try:
        return None if any(private.faults(directory)) else token_cache.opened(directory)
    except OSError:
        _log.debug("the rows of another process in %s are not used", directory, exc_info=True)
        return None


def _made(root: Path, key: str, fill: Callable[[Writer], None], *, usable: bool) -> TokenCache:
    """Rows that are written now, or by another process in the meantime."""
    final = root / key
    with _claimed(root, key) if usable else nullcontext(False) as free:
        if free and (there := _found(final)) is not None:
            return there  # another process has published them since
        partial, lifetime = _begun(root, key) if free else None, None
        if partial is None:
            lifetime = tempfile.TemporaryDirectory(prefix="loratune-rows-")
            partial = Path(lifetime.name)
        _fill(partial, fill)
        rows = TokenCache(partial, lifetime)
        if lifetime is None:
            partial.rename(final)
            rows.directory = final
        return rows


def forget_old() -> None:
    """Remove the rows that nobody has wanted for `KEPT_DAYS`. A process that reads them keeps what it has mapped."""
    root = _root()
    with suppress(OSError), private.opened(root):
        for path in sorted(root.iterdir()):
            if (named := _NAMES.fullmatch(path.name)) and is_directory(path) and _is_old(path):
                with _claimed(root, named[1]) as free, suppress(OSError):
                    if free and _is_own(path) and _is_old(path):
                        _remove(path)


def _root() -> Path:
    return Path(datasets_config.HF_DATASETS_CACHE) / "loratune"


def _secured(root: Path) -> tuple[bool, str]:
    """Whether the cache is there, or can be made, and is ours alone, and what to tell the user of it."""
    try:
        private.make(root)
        with private.opened(root, mend=True) as directory:
            return True, f"others could write to {root}: now only you can" if directory.mended else ""
    except private.Untrusted as error:
        return False, f"the rows are prepared for this run alone: {error}"
    except OSError as error:
        return False, f"the rows are prepared for this run alone: {root}: {error.strerror}" if root.is_symlink() else ""


def _distrust(final: Path) -> str:
    """What to tell the user of rows that are there, and that someone else may have changed."""
    with suppress(OSError):
        return next((f"the rows that are kept were not used: {reason}" for reason in private.faults(final)), "")
    return ""


def _found(final: Path) -> TokenCache | None:
    """The rows that are published under a name. They are marked as used before they are read, see `_remove`."""
    try:
        if not any(private.faults(final)) and read_record(final / _ENTRY) == _record(final.name):
            os.utime(final)
            return token_cache.opened(final)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _log.debug("the rows in %s are not used", final, exc_info=True)
    return None


def _record(key: str) -> dict[str, str]:
    """Whose an entry is, and which."""
    return {"made_by": _MADE_BY, "key": key}


@contextmanager
def _claimed(root: Path, key: str) -> Iterator[bool]:
    """Inside, no other process writes or removes what belongs to a key, if this one may; whether it may is told."""
    with ExitStack() as stack:
        try:
            free = stack.enter_context(locked(root / f"{key}.lock"))
        except OSError:
            _log.debug("%s cannot be locked", key, exc_info=True)
            free = False
        yield free


def _begun(root: Path, key: str) -> Path | None:
    """The directory to write in, which goes on from what is there already; None if it cannot be written, or if what is
    in the way is not of this kind. Damaged rows under the key are removed. The key has been claimed."""
    final, partial = root / key, root / f"{key}{_PARTIAL}"
    try:
        if not all(_is_own(path) for path in (final, partial) if os.path.lexists(path)):
            return None
        if final.exists():
            _discard(final)
        if partial.exists() and (any(private.faults(partial)) or not _is_movable(partial, key)):
            _clear(partial)
        partial.mkdir(private.DIRECTORY_MODE, exist_ok=True)
        write_record(partial / _ENTRY, _record(key))
    except OSError:
        _log.debug("rows cannot be written in %s", partial, exc_info=True)
        return None
    return partial


def _is_movable(partial: Path, key: str) -> bool:
    """Whether a directory can be renamed, as it will be; on overlayfs one that an image brought cannot."""
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


def _fill(directory: Path, fill: Callable[[Writer], None]) -> None:
    writer = Writer(directory)
    try:
        fill(writer)
        writer.finish()
    except OSError as error:
        _give_up(directory)
        what = f"the tokenised rows cannot be kept: {error.strerror}"
        raise ResourceError(Problem(what, str(directory), fix="make room, or set HF_DATASETS_CACHE")) from None
    except Exception:
        _give_up(directory)
        raise
    except KeyboardInterrupt:
        writer.stop()
        raise


def _give_up(directory: Path) -> None:
    with suppress(OSError):
        _clear(directory)


def _is_old(path: Path) -> bool:
    """Whether nobody has wanted it for long; what was left half removed is old whenever that was."""
    return path.name.endswith(_REMOVED) or _is_unused(path)


def _is_unused(path: Path) -> bool:
    return path.lstat().st_mtime < time.time() - KEPT_DAYS * 86400


def _is_own(path: Path) -> bool:
    """Whether a directory was made by `kept`, for this user, and holds nothing else. It says so in its record, or, if
    an older release made it, in that of its first shard; an empty one is a loss to nobody."""
    named, names = _NAMES.fullmatch(path.name), set[str]()
    if named is None or not is_directory(path) or path.lstat().st_uid != os.geteuid():
        return False
    with os.scandir(path) as entries:
        for entry in entries:
            if not _FILES.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                return False
            names.add(entry.name)
    return names <= {"entry.unfinished"} or _says_so(path, named[1])


def _says_so(path: Path, key: str) -> bool:
    for name in (_ENTRY, "00000.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = read_record(path / name, any_version=True)
            if record.items() >= _record(key).items() or record.keys() == {"sha256", "lots", "report"}:
                return True
    return False


def _remove(path: Path) -> None:
    """Remove an old directory, unless a process has marked it as used in the meantime."""
    if path.name.endswith((_PARTIAL, _REMOVED)):
        _clear(path)
        return
    moved = _moved(path)
    if _is_unused(moved):
        _clear(moved)
    else:
        moved.rename(path)


def _discard(path: Path) -> None:
    """Remove a damaged entry."""
    _clear(_moved(path))


def _moved(path: Path) -> Path:
    """Take an entry's name away, so that nobody finds it who does not read it already."""
    moved = path.with_name(f"{path.name}{_REMOVED}")
    if moved.exists() and _is_own(moved):
        _clear(moved)
    path.rename(moved)
    return moved


def _clear(path: Path) -> None:
    """Remove the files that this module writes, and the directory, if nothing else is in it."""
    for file in sorted(path.iterdir()):
        if _FILES.fullmatch(file.name):
            file.unlink()
    path.rmdir()
