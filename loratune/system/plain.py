"""Files and directories taken for what they are: no link is followed, and nothing waits at a named pipe."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from loratune.errors import LockedError, Problem

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a device",
}  # fmt: skip
LARGEST = 64 << 20
"""Bytes of the largest text file that is read; those of this program take kilobytes."""


def kind(path: Path) -> str:
    """What has this name, in words, e.g. "a file", "a directory" or "a link"; empty if nothing has.

    Raises OSError: it cannot be looked at, which is not the same as being absent.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "of an unknown kind")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def is_file(path: Path) -> bool:
    """Whether a regular file has this name, and not a link to one."""
    return kind(path) == "a file"


def is_directory(path: Path) -> bool:
    """Whether a directory has this name, and not a link to one."""
    return kind(path) == "a directory"


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The content of a regular file. largest: bytes that it may have.

    Raises OSError: it cannot be read, it is of another kind, or too large. Raises ValueError: it is not UTF-8.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(largest + 1)
        if len(content) > largest:
            raise OSError(errno.EFBIG, f"larger than {largest:,} bytes", str(path))
    return content.decode()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock that only one process has at a time; inside is told whether this one has it. Nobody waits.

    The lock is on a file that exists only while it is held. As it is removed by its holder alone, and whoever gets a
    lock looks whether its file still has the name, there are never two holders. The kernel takes the lock back when a
    process ends. Raises OSError: no such file can be made.
    """
    handle = _lock(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _lock(path: Path) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            own = os.fstat(handle)
            if not stat.S_ISREG(own.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(own, path.lstat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass  # its last holder has just removed it
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def open_lock(path: Path, flags: int) -> TextIO:
    """A lock file; no link is followed."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return open(handle, "r" if flags == os.O_RDONLY else "a+", encoding="utf-8")


def hold(file: TextIO, where: str) -> None:
    """Hold a lock until the file is closed. where: that it is of. Raises LockedError: another process holds it."""
    for attempt in range(5):  # another process may only be looking whether it is free
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05 if attempt < 4 else 0)
    else:
        file.seek(0)
        what = f"another run is working there ({file.read().strip() or 'it does not say which'})"
        raise LockedError(Problem(what, where, "output_dir", "wait for it, or choose another"))
