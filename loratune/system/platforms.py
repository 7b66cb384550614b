"""What only some systems have: locks, limits, and flags of files. No other module asks which system it runs on.

Linux has all of it. macOS has no processor affinity and no files in memory; Windows lacks most of the rest: directories
are not flushed to the disk, so a power cut may cost the last checkpoint; Ctrl-C and SIGTERM are the only signals; and
who may write to a cache is not checked, as the directories of a user are private there. tests/test_other_systems.py
masks these things on Linux, and compares the bytes that commands write.
"""

import os
import select
import time
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

IS_WINDOWS = os.name == "nt"
if IS_WINDOWS:
    _msvcrt: Any = import_module("msvcrt")
else:
    import fcntl
    import resource

SAFE_OPEN: int = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
"""Flags of `os.open`: follow no link, do not wait at a named pipe, keep the file from child processes, and read the
bytes as they are."""
_LOCKED_BYTE, _PAUSE = 1 << 30, 0.05  # Windows locks bytes, here one that no lock file has; and seconds between tries.


def processor_count() -> int:
    """The number of processors that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lock(file: TextIO, *, wait: bool = False) -> None:
    """Hold an exclusive lock until the file is closed, or the process ends.

    wait: until other processes have given it up; otherwise BlockingIOError is raised if one has it.
    """
    if not IS_WINDOWS:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while True:
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        with suppress(PermissionError):
            _msvcrt.locking(file.fileno(), _msvcrt.LK_NBLCK, 1)
            return
        if not wait:
            raise BlockingIOError
        time.sleep(_PAUSE)


def owner() -> int | None:
    """The user that new files belong to; None on Windows, where the directories of a user are private."""
    return None if IS_WINDOWS else os.geteuid()


def memory_limit() -> int | None:
    """The most bytes of address space of this process (`ulimit -v`); None without a limit."""
    limit = -1 if IS_WINDOWS else resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit in (-1, 2**63 - 1) else limit


def peak_memory() -> int | None:
    """The most bytes of memory of this process or, on Linux, of the process that started it; None on Windows."""
    most = None if IS_WINDOWS else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most << 10 if most and os.uname().sysname != "Darwin" else most


def is_writable(handle: int) -> bool:
    """Whether a write to an open file would not wait; on Windows, this is not known."""
    if IS_WINDOWS:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLOUT)
    return bool(poll.poll(0))


def sealed_file(content: bytes) -> int:
    """The handle of a file in memory that nobody can change. Only on Linux. Raises OSError."""
    handle = os.memfd_create("loratune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(handle, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(handle)
        raise
    return handle
