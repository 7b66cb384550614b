"""The environment of the process: processors and memory of its container, environment variables, cache directories.

Control groups of Linux are read, in their second version, see cgroups(7). The limits of a group also apply to the
groups inside it. So all groups are read, from that of the process up to the outermost visible one, which in a container
is that of the container.
"""

import ctypes
import errno
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratune.system.platforms import processor_count

_log = logging.getLogger(__name__)

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

_THREADS = "OMP_NUM_THREADS"
_PROCESSORS = Path("/proc/cpuinfo")
_ENTRY_CHARACTERS = 1 << 14  # more than the entry of a processor has
_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processor_entry() -> str:
    """What Linux tells about the first processor. Raises OSError: this is another system, or a sandbox hides it."""
    with _PROCESSORS.open(encoding="utf-8", errors="replace") as file:
        return file.read(_ENTRY_CHARACTERS).split("\n\n")[0]


def _processor_fields() -> list[tuple[str, str]]:
    """Name and value of each line on the first processor; none if they cannot be read."""
    try:
        lines = [line.partition(":") for line in processor_entry().splitlines()]
    except OSError:
        _log.debug("the processor is not known", exc_info=True)
        return []
    return [(name.strip(), value.strip()) for name, _, value in lines]


def features() -> frozenset[str]:
    """The processor features that the operating system lets programs use, by the names in `/proc/cpuinfo`.

    Empty if that file cannot be read, as in some sandboxes.
    """
    fields = _processor_fields()
    return frozenset(word for name, value in fields if name.startswith(("flags", "Features")) for word in value.split())


def processor_name() -> str:
    """The model of the processor as Linux names it; empty if it is not known."""
    return next((value for name, value in _processor_fields() if name == "model name"), "")


def processors() -> float:
    """How many processors' time the process may use; infinity without a limit."""
    limits = [float("inf")]
    for group in _groups():
        with suppress(OSError, ValueError, OverflowError):
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max" and min(int(quota), int(period)) > 0:
                limits.append(int(quota) / int(period))
    return min(limits)


def threads() -> int:
    """How many threads a program should have: OMP_NUM_THREADS, or the processors that this process may use."""
    given = os.environ.get(_THREADS, "").partition(",")[0]
    if given.isascii() and given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, math.ceil(min(processor_count(), processors())))


def limit_threads() -> str:
    """Set OMP_NUM_THREADS in a container that may use fewer processors than it sees, unless the user has set it.

    OpenMP reads it as torch is loaded, so it is too late afterwards. With a thread for each processor that is seen, the
    kernel would halt all of them again and again.

    Returns:
        A line for the user, empty where nothing was set.
    """
    seen, allowed = processor_count(), processors()
    if "torch" in sys.modules or allowed > seen - 1 or os.environ.get(_THREADS):
        return ""
    os.environ[_THREADS] = str(threads())
    return f"a container may use {allowed:g} of {seen} processors, so there are fewer threads ({_THREADS}={threads()})"


def free_memory() -> float:
    """Bytes that the process may still take; infinity without a limit.

    What the kernel keeps of files counts as free: it gives that back when it is needed.
    """
    limits = [float("inf")]
    for group in _groups():
        with suppress(OSError, ValueError):
            if (most := (group / "memory.max").read_text().strip()) != "max":
                used = int((group / "memory.current").read_text())
                limits.append(int(most) - used + _file_pages(group / "memory.stat"))
    return min(limits)


def keep_pages() -> None:
    """Keep freed memory in the process, if the C library is glibc.

    By default, each large tensor gets fresh pages from the kernel, with a page fault each: 0.35 s of system time a GB.
    """
    trim_threshold, mmap_max = -1, -4  # Options of mallopt(3).
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def give_back_pages() -> None:
    """Return free memory to the kernel, such as fragments left by loading that are too small to be reused."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _file_pages(statistics: Path) -> int:
    """Bytes of files that a group's memory holds."""
    try:
        pairs = (line.split() for line in statistics.read_text().splitlines())
        values = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return 0
    return values.get("active_file", 0) + values.get("inactive_file", 0)


def _groups() -> Iterator[Path]:
    """The directories of the groups of this process, from its own outwards, as far as they can be seen."""
    own = _ROOT
    with suppress(OSError, ValueError):
        for line in _OWN.read_text().splitlines():
            number, _, path = line.split(":", 2)
            own = _ROOT / path.lstrip("/") if number == "0" else own
    yield own
    yield from (parent for parent in own.parents if parent.is_relative_to(_ROOT))


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restore all environment variables at the end, whatever was set or deleted inside."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def cache_fix(error: BaseException | None) -> str:
    """What to do where a cache of Hugging Face's libraries cannot be used; empty if an error has another reason.

    The variables are documented: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    caches = {name: path for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if (path := os.environ.get(name))}
    caches["HF_HOME"] = os.environ.get("HF_HOME") or str(default)
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
            for name, path in caches.items():
                if Path(os.fsdecode(error.filename)).is_relative_to(Path(path).expanduser()):
                    return f"set {name} to a directory that you can write to"
        error = error.__cause__ or error.__context__
    return ""
