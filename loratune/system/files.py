"""Files and directories: what they are, locks on them, room for them on the disk, and who may write to them.

No function here follows a link where a file or directory is expected, and none waits at a named pipe.
"""

import difflib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from loratune.codes import Code
from loratune.errors import LockedError, Problem, ResourceError, is_disk_full
from loratune.system import platforms
from loratune.text import listed

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a device",
}  # fmt: skip
MAX_TEXT_BYTES = 64 << 20
"""Bytes of the largest text file that is read; the files that loratune writes take kilobytes."""

_PATH_MAX, _NAME_MAX = 4095, 255  # bytes: PATH_MAX without its final NUL, and NAME_MAX of every usual file system

_UNFINISHED_BYTES = 200
"""The most bytes of a file's name that are used in the name of its unfinished form; a name may have 255."""

_INCIDENTAL_NAMES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"})
_TEMPLATES = "additional_chat_templates/"  # transformers reads every file in it that ends in .jinja


def path_problem(path: str) -> str:
    """Why a text cannot be the path of a file or directory; empty if it can be one."""
    if "\0" in path:
        return "contains a NUL character, which no path may contain"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8, so it could not be recorded"
    if len(raw) > _PATH_MAX or any(len(name) > _NAME_MAX for name in raw.split(os.sep.encode())):
        return "is longer than a path can be"
    try:
        Path(path).expanduser()
    except RuntimeError:
        return "names the home directory of a user who does not exist here"
    return ""


def beside(path: Path, fits: Callable[[Path], bool] = Path.exists) -> str:
    """What the user may have meant by a path that does not exist: the one that is spelt like it, or else what is in the
    same directory; empty if nothing there fits."""
    found = Path(path.anchor)
    with suppress(OSError):
        for part in path.parts[bool(path.anchor) :]:
            if not os.path.lexists(found / part):
                near = difflib.get_close_matches(part, [one.name for one in found.iterdir()], n=1, cutoff=0.6)
                part = near[0] if near else part
            found /= part
        if fits(found):
            return f"did you mean `{found}`?"
        names = sorted(one.name for one in path.parent.iterdir() if not one.name.startswith(".") and fits(one))
        return f"in {path.parent.absolute()}: {listed(names, 5)}" if names else ""
    return ""


def kind(path: Path) -> str:
    """The kind of a path, in words: "a file", "a directory", "a link", ...; empty if it does not exist.

    Raises:
        OSError: The path cannot be examined, for reasons other than absence.
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


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, not through a link. Raises OSError: it is of another kind, or cannot be read."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | platforms.SAFE_OPEN))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a regular file.

    Raises:
        OSError: The file cannot be read, is of another kind, or has more than `max_bytes` bytes.
        ValueError: It is not UTF-8.
    """
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return content.decode()


def state(path: Path) -> tuple[int, ...] | None:
    """Size, times and place on the disk of a file: another state is that of another content. None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or directory to the disk; Windows flushes no directories, and files only if they can be written."""
    if platforms.IS_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if platforms.IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finish(directory: Path) -> None:
    """Give the files of a new directory the permissions that the umask allows, and flush all of it to the disk.
    Libraries write some files for this user alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)
        sync(path)
    sync(directory)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with a final newline; keys keep their order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def written_beside(path: Path, rename: Callable[[Path], object], mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file, `.NAME.RANDOM.unfinished` beside a path, that gets its name when its content is on the disk.

    If there is an error, or a signal, nothing is left of it; but what `rename` leaves when it raises anything else
    than OSError.

    Args:
        path: Where the file is to be in the end.
        rename: Gives the complete file, whose present path it takes, its name.
        mode: The permissions of the file, less those that the umask forbids.

    Raises:
        OSError: The file cannot be created, written or renamed.
    """
    short = os.fsencode(path.name)[:_UNFINISHED_BYTES].decode(errors="ignore")
    unfinished = path.with_name(f".{short}.{secrets.token_hex(6)}.unfinished")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | platforms.SAFE_OPEN
    try:
        with open(os.open(unfinished, flags, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # also of a signal between the creation of the file, whose name is random, and its use
        with suppress(OSError):
            unfinished.unlink()
        raise
    try:
        rename(unfinished)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


VERSION_KEY, VERSION = "schema_version", 1
"""The field of a record with its version, and the version that this release writes and reads. A record without one, as
releases wrote it before there were versions, is of version 1. Keys may be added within a version; a change that an
older release would misread requires a new one."""


def versioned(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record to be written."""
    return {VERSION_KEY: VERSION, **values}


def newer(record: Any) -> str:
    """Why this release cannot read a record, in words; empty if it can, or if it is no JSON object at all."""
    version = record.get(VERSION_KEY, 1) if isinstance(record, Mapping) else 1
    if type(version) is int and 1 <= version <= VERSION:
        return ""
    return f"has {VERSION_KEY} {version!r}, and this release of loratune reads versions up to {VERSION}"


def check_free_space(
    directory: Path, needed: int, what: str = "checkpoints and the adapter directory", key: str = "output_dir"
) -> None:
    """Check that bytes are free where something is to be written.

    Args:
        directory: Where.
        needed: How many bytes.
        what: What is to be written, in the plural where it is many.
        key: The config key or option that names the place.

    Raises:
        ResourceError: They are not.
    """
    if (free := shutil.disk_usage(directory).free) < needed:
        what = f"{needed:,} bytes are needed for {what}, but {free:,} are free"
        fix = "make room, or choose another disk"
        raise ResourceError(Problem(Code.SYSTEM_DISK_FULL, what, str(directory), key, fix))


@contextmanager
def explain_full_disk(
    what: str, size: int | None, where: Path, fix: str, named: str = "", key: str = ""
) -> Iterator[None]:
    """Turn a full disk or an exceeded quota into a ResourceError.

    Args:
        what: What is written inside.
        size: About how many bytes it takes, if that is known.
        where: The file or directory that is written.
        fix: What the user can do about it.
        named: The file or directory as the user named it, if it is not `where`.
        key: The option that names it.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors raise errors of their own for it
        if not is_disk_full(error):
            raise
        takes = f": it takes {size:,} bytes, {shutil.disk_usage(where).free:,} are free" if size is not None else ""
        problem = Problem(Code.SYSTEM_DISK_FULL, f"no room for {what}{takes}", named or str(where), key, fix)
        raise ResourceError(problem) from None


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to hold an exclusive lock; yields whether this process has it. Never waits.

    The kernel releases the lock when the process ends; its file stays. Raises OSError if the file cannot be made.
    """
    with open_lock(path, os.O_RDWR | os.O_CREAT) as file:
        try:
            platforms.lock(file)
        except BlockingIOError:
            yield False
        else:
            yield True


def open_lock(path: Path, flags: int) -> TextIO:
    """Open a lock file without following a link, or truncating what its holder wrote, as package filelock would."""
    handle = os.open(path, flags | platforms.SAFE_OPEN, 0o666)
    return open(handle, "r" if flags == os.O_RDONLY else "a+", encoding="utf-8")


def hold_lock(file: TextIO, where: str, key: str = "output_dir", seconds: float = 0.2) -> None:
    """Hold the lock of a run until the file is closed.

    Args:
        file: The lock file, in which its holder has written who it is.
        where: The directory that it locks.
        key: The config key or option that names the directory.
        seconds: How long to wait for it: another process may only be checking whether the lock is free.

    Raises:
        LockedError: Another process holds the lock.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            platforms.lock(file)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
    file.seek(0)
    what = f"another run is using this directory ({file.read().strip() or 'it does not say which'})"
    fix = "wait until it ends, or choose another directory"
    raise LockedError(Problem(Code.SYSTEM_LOCKED, what, where, key, fix))


def is_incidental_file(name: str) -> bool:
    """Whether systems, Jupyter or the hub's client leave such a file in any directory; it holds nothing of a user's.

    Such a file neither keeps a directory from being replaced nor counts as a change of it.

    Args:
        name: The path of the file within a directory that is taken as a whole, with `/`.
    """
    last = name.rpartition("/")[2]
    by_name = last.lower() in _INCIDENTAL_NAMES or (last.startswith("._") and not name.startswith(_TEMPLATES))
    return by_name or name == ".gitattributes" or name.startswith(".cache/huggingface/")


def is_incidental_directory(name: str) -> bool:
    """Whether an empty directory of this name is one that they leave, see `is_incidental_file`."""
    return name == ".cache" or f"{name}/".startswith(".cache/huggingface/")


def contains(directory: Path, path: Path) -> bool:
    """Whether a path is a directory or something in it, under any name: links, bind mounts, upper and lower case."""
    status = directory.stat()
    for start in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for candidate in (start, *start.parents):
            with suppress(OSError):
                if os.path.samestat(status, candidate.stat()):
                    return True
    return False
