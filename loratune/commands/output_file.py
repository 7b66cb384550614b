"""A file that a command writes to a path that the user names: whole, or not at all.

A regular file is written under a name of its own beside its place, `.NAME.RANDOM.unfinished`, and takes its name by one
step when it is complete. So there is never half a file, and two commands that name the same one do not mix. What cannot
be replaced like this is written to as it comes: named pipes, devices such as /dev/null, and the open files of this
process, such as /dev/stdout.
"""

import errno
import fcntl
import glob
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from loratune.errors import ConfigError, Problem, ResourceError, is_disk_full
from loratune.system.files import kind, sync
from loratune.training.overwriting import holds, is_stuck

_OPEN_FILE = re.compile(
    r"/dev/(?P<name>stdout|stderr)|(/dev/fd|/proc/(self|thread-self|(?P<process>\d+))/fd)/(?P<number>\d+)"
)
_STREAMS = {"stdout": 1, "stderr": 2}
_LINKS = 40
"""Links in a row, as many as the kernel follows."""
_LONGEST = 200
"""Bytes of a file's name that go into that of its unfinished form; a name may have 255."""


@dataclass(frozen=True)
class Output:
    """Where a command writes; made by `output`.

    named, key: the path as the user gave it, and by which option; path: the same without links; handle: the open file
    of this process that is meant, if one is; overwrite: an existing file may be replaced; inputs: files, directories
    and globs that the command reads, and of which nothing is replaced.
    """

    named: str
    key: str
    path: Path
    handle: int | None
    overwrite: bool
    inputs: tuple[Path, ...]

    def reading(self, *inputs: Path) -> "Output":
        """The same for a command that reads these as well. Raises ConfigError: see `output`."""
        more = replace(self, inputs=(*self.inputs, *inputs))
        more.check()
        return more

    def check(self) -> None:
        """Raises ConfigError: see `output`."""
        try:
            found = self._fault()
        except OSError as error:
            found = f"cannot be looked at: {error.strerror}", ""
        if found is not None:
            what, fix = found
            raise ConfigError(Problem(what, self.named, self.key, fix))

    def _fault(self) -> tuple[str, str] | None:
        """What is wrong, and what to do about it."""
        elsewhere = "choose another place"
        if self.handle is not None:
            return None if _is_writable(self.handle) else ("is not open for writing", elsewhere)
        found, parent = kind(self.path), self.path.parent
        if found == "a directory":
            return "is a directory, not a file", elsewhere
        if found in ("a socket", "a block device"):
            return f"is {found}", elsewhere
        if not parent.is_dir():
            return f"its directory {Path(self.named).parent} does not exist", elsewhere
        if _is_regular(found) and (read := self._is_read()) is not None:
            return f"is, or belongs to, what is read ({read})" if found else f"lies in what is read ({read})", elsewhere
        if found == "a file" and not self.overwrite:
            return "already exists", "choose another place, or replace it with --overwrite"
        if found == "a file" and is_stuck(self.path):
            return f"cannot be replaced: only its owner may do so in {parent}, which is sticky", elsewhere
        needed = [self.path] if found else []
        needed += [parent] if _is_regular(found) else []
        return None if all(os.access(path, os.W_OK) for path in needed) else ("cannot be written", elsewhere)

    def _is_read(self) -> Path | None:
        """Which of the inputs the file is, or belongs to, or would when it is made, by whatever name."""
        for given in self.inputs:
            for path in [given] if os.path.lexists(given) else map(Path, glob.iglob(str(given), recursive=True)):
                with suppress(OSError):
                    if holds(path, self.path):
                        return given
        return None

    @contextmanager
    def opened(self, log: Callable[[str], None] = lambda _: None) -> Iterator[TextIO]:
        """The file, in UTF-8; a lone surrogate is written as JSON writes it. A regular file is complete at the end, and
        on the disk. If what is done inside fails, it does not appear, and one that was to be replaced stays.

        log: takes a line where a named pipe has no reader yet, and is waited for.

        Raises ConfigError: it cannot be made; or it cannot take its name at the end, as another file has it by now, and
        then what was written is kept, and told where. Raises ResourceError: the disk is full.
        """
        try:
            with self._beside() if self.handle is None and _is_regular(kind(self.path)) else self._stream(log) as file:
                yield file
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise ResourceError(Problem("no room for what is written", self.named, self.key, "make room")) from None

    @contextmanager
    def _stream(self, log: Callable[[str], None]) -> Iterator[TextIO]:
        """What is written to as it comes; a file that is open already, from where it stands."""
        own = self.handle
        with _text(os.dup(own) if own is not None else self._open(log)) as file:
            yield file

    def _open(self, log: Callable[[str], None]) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            handle = os.open(self.path, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or kind(self.path) != "a named pipe":
                raise
            log(f"{self.named}: a named pipe that nobody reads; waiting for a reader")
            return os.open(self.path, flags)
        os.set_blocking(handle, True)
        return handle

    @contextmanager
    def _beside(self) -> Iterator[TextIO]:
        """A new file, which takes its name at the end."""
        short = os.fsencode(self.path.name)[:_LONGEST].decode(errors="ignore")
        unfinished = self.path.with_name(f".{short}.{secrets.token_hex(6)}.unfinished")
        keep = False  # a signal may come as soon as the file is there
        try:
            try:
                handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except OSError as error:
                keep = True  # what is there is not ours
                if is_disk_full(error):
                    raise
                raise ConfigError(Problem(f"cannot be written: {error.strerror}", self.named, self.key)) from None
            with _text(handle) as file:
                yield file
                file.flush()
                os.fsync(handle)
            try:
                self._name(unfinished)
            except ConfigError:
                keep = True  # the user is told of it
                raise
        except BaseException:
            if not keep:
                unfinished.unlink(missing_ok=True)
            raise

    def _name(self, unfinished: Path) -> None:
        """Give what is complete its name, unless another file has got it in the meantime."""
        try:
            self.check()
            if kind(self.path):
                unfinished.chmod(stat.S_IMODE(self.path.lstat().st_mode))
                unfinished.replace(self.path)
            else:
                _renamed(unfinished, self.path)
            sync(self.path.parent)
        except (OSError, ConfigError) as error:
            why = error.problems[0].what if isinstance(error, ConfigError) else error.strerror
            fix = f"what was written is in {unfinished}"
            raise ConfigError(Problem(f"cannot be put in place: {why}", self.named, self.key, fix)) from None


def output(path: Path, key: str, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Output:
    """Where a command is to write, looked at before it begins. key: the option that names it; the rest as in `Output`.

    Raises ConfigError: it exists, and may not be replaced; it is, or belongs to, what is read; it is a directory, a
    socket or a disk; its directory does not exist; it cannot be written.
    """
    try:
        made = Output(str(path), key, *_meant(path), overwrite, tuple(inputs))
    except FileNotFoundError:
        raise ConfigError(
            Problem("is a link that leads nowhere", str(path), key, "name a file, or remove it")
        ) from None
    except (OSError, ValueError) as error:
        what = f"cannot be looked at: {error.strerror if isinstance(error, OSError) else error}"
        raise ConfigError(Problem(what, str(path), key, "choose another place")) from None
    made.check()
    return made


def _meant(path: Path) -> tuple[Path, int | None]:
    """The path that links lead to, and which open file of this process that is, if it is one."""
    for _ in range(_LINKS):
        path = Path(os.path.abspath(path))
        for name in (path, Path(os.path.realpath(path.parent), path.name)):
            found = _OPEN_FILE.fullmatch(str(name))
            if found and found["process"] in (None, str(os.getpid())):
                return name, _STREAMS.get(found["name"]) or int(found["number"])
        if kind(name) != "a link":
            return name, None
        if not os.path.exists(name) and os.path.lexists(name):
            os.stat(name)  # says whether it leads nowhere or round and round
        path = name.parent / os.readlink(name)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _renamed(path: Path, name: Path) -> None:
    """Rename a file, without replacing another. Raises FileExistsError."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # a file system that has no links
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name)) from None
        path.rename(name)
    else:
        path.unlink()


def _is_regular(found: str) -> bool:
    """Whether a regular file is there, or will be."""
    return found in ("", "a file")


def _is_writable(handle: int) -> bool:
    try:
        return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False


def _text(handle: int) -> TextIO:
    return open(handle, "w", encoding="utf-8", errors="backslashreplace")
