"""Directories and files that nobody but the user of this process can change.

What lies in a cache is taken without a question: code that is loaded, rows that are trained on. So it must have been
put there by this user, and nobody else may have had the right to write to it.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FILE_MODE, DIRECTORY_MODE = 0o600, 0o700
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(OSError):
    """A directory or file that others can write to, or that is not ours. The message says which and why."""


@dataclass(frozen=True)
class Directory:
    """An open directory that is ours alone. mended: others could write to it until now."""

    descriptor: int
    mended: bool


def fault(found: os.stat_result) -> str:
    """Why something is not ours alone, in words; empty if it is."""
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    return "can be written to by others" if found.st_mode & _OTHERS else ""


def make(path: Path) -> None:
    """Make a directory and those above it, which nobody else can write to whatever the umask is. Raises OSError."""
    if not path.parent.is_dir():
        make(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path, DIRECTORY_MODE)


def create(path: Path) -> None:
    """Make an empty file in place of what has its name; nobody else can write to it whatever the umask is."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE))


def faults(directory: Path) -> Iterator[str]:
    """Why a directory, or something directly in it, is not ours alone, a line each: links are neither.

    Raises OSError: it cannot be read, as where it does not exist.
    """
    for path in (directory, *sorted(directory.iterdir())):
        found = path.lstat()
        if reason := "is a link" if stat.S_ISLNK(found.st_mode) else fault(found):
            yield f"{path} {reason}"


@contextmanager
def opened(path: Path, *, mend: bool = False) -> Iterator[Directory]:
    """A directory, no link, that is ours alone. mend: take from others what right they have to write to it.

    Raises Untrusted; OSError: it is a link, no directory, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        mended = mend and found.st_uid == os.geteuid() and bool(found.st_mode & _OTHERS)
        if mended:
            os.fchmod(descriptor, DIRECTORY_MODE)
        if reason := fault(os.fstat(descriptor)):
            raise Untrusted(f"{path} {reason}")
        yield Directory(descriptor, mended)
    finally:
        os.close(descriptor)
