"""A file that a command writes to a path given by the user: complete, or not at all.

A regular file is written beside its path, and renamed when it is complete. So there is never half a file, and two
commands that name the same file do not mix. Files that cannot be replaced in this way are written directly: named
pipes, devices such as /dev/null, and open files of this process, such as /dev/stdout.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from loratune.codes import Code
from loratune.errors import ConfigError, Problem, is_disk_full
from loratune.system.directories import CONFIG
from loratune.system.files import contains, explain_full_disk, is_file, kind, sync, written_beside

_OPEN_FILE = re.compile(r"/dev/(?P<name>stdout|stderr)|(/dev|/proc/self)/fd/(?P<number>\d+)")
_STREAMS = {"stdout": 1, "stderr": 2}
_EXISTS = "already exists"
HTML = "<!DOCTYPE html>"
"""How a page begins."""


@dataclass(frozen=True)
class Output:
    """Where a command writes; `output` makes it.

    Attributes:
        named: The path as the user wrote it.
        key: The parameter or option that it is the value of.
        path: The path with symbolic links resolved.
        handle: The open file of this process that the path names, if it does.
        overwrite: Whether an existing file may be replaced; None if the command never does.
        inputs: Files, directories and globs that the command reads. None of them is ever replaced.
        begins: How what is written begins. A file that begins otherwise is something else, and is never replaced.
    """

    named: str
    key: str
    path: Path
    handle: int | None
    overwrite: bool | None
    inputs: tuple[Path, ...]
    begins: str = ""

    def reading(self, *inputs: Path) -> "Output":
        """The same output for a command that also reads these paths. Raises ConfigError: see `output`."""
        extended = replace(self, inputs=(*self.inputs, *inputs))
        extended.check()
        return extended

    def check(self) -> None:
        """Raises ConfigError: see `output`."""
        try:
            what = self._problem(kind(self.path))
        except (OSError, ValueError) as error:
            what = _unreadable(error)
        if not what:
            return
        code, fix = Code.OUTPUT_UNUSABLE, "choose another path"
        if what == _EXISTS:
            code = Code.OUTPUT_EXISTS
            fix += "" if self.overwrite is None else ", or replace the file with `overwrite=True`"
        raise ConfigError(Problem(code, what, self.named, self.key, fix))

    def _problem(self, file_kind: str) -> str:
        """Why the path cannot be written; empty if it can."""
        parent = self.path.parent
        if self.handle is not None:
            return "" if _is_writable(self.handle) else "is not open for writing"
        if file_kind in ("a directory", "a socket", "a block device"):
            return f"is {file_kind}, not a file"
        if not parent.is_dir():
            return f"its directory {Path(self.named).parent} does not exist"
        if not _is_regular(file_kind):
            return "" if os.access(self.path, os.W_OK) else "cannot be written"
        if (source := self._input_at_path()) is not None:
            return f"is, or belongs to, an input ({source})" if file_kind else f"lies in an input ({source})"
        if is_file(parent / CONFIG):
            return "lies in an adapter directory"
        if file_kind and not self._is_alike():
            return f"is another kind of file: it does not begin with `{self.begins}`, and is not replaced"
        if file_kind and not self.overwrite:
            return _EXISTS
        paths = [self.path, parent] if file_kind else [parent]
        return "" if all(os.access(path, os.W_OK) for path in paths) else "cannot be written"

    def _is_alike(self) -> bool:
        """Whether the file that is there is empty, or begins as what is written."""
        expected = self.begins.encode()
        with self.path.open("rb") as file:
            return file.read(len(expected)) in (b"", expected)

    def _input_at_path(self) -> Path | None:
        """The input that the file is or belongs to, or would belong to when it is written, by whatever name."""
        for source in self.inputs:
            given = os.path.expanduser(source)  # as where inputs are read
            for path in [given] if os.path.lexists(given) else glob.iglob(given, recursive=True):
                with suppress(OSError):
                    if contains(Path(path), self.path):
                        return source
        return None

    @contextmanager
    def opened(self) -> Iterator[TextIO]:
        """Open the file in UTF-8; a lone surrogate is written in the way of JSON.

        At the end a regular file is complete and on the disk. If the body raises, no file appears, and a file that was
        to be replaced stays.

        Raises:
            ConfigError: The file cannot be created; or it cannot be renamed at the end because another file has its
                name by then, and the message says where the content is.
            ResourceError: The disk is full.
        """
        with explain_full_disk("the output", None, self.path, "make room", self.named, self.key), ExitStack() as stack:
            try:
                handle = self._open(stack)
            except OSError as error:
                if is_disk_full(error):
                    raise
                what = f"cannot be written: {error.strerror}"
                raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, self.named, self.key)) from None
            yield stack.enter_context(open(handle, "w", encoding="utf-8", errors="backslashreplace"))

    def _open(self, stack: ExitStack) -> int:
        """A new handle: of a file beside the path; or of a pipe, a device, or a file that is open already and is
        continued at its position. Raises OSError."""
        if self.handle is not None:
            return os.dup(self.handle)
        if not _is_regular(kind(self.path)):
            return os.open(self.path, os.O_WRONLY)
        return os.dup(stack.enter_context(written_beside(self.path, self._rename)).fileno())

    def _rename(self, unfinished: Path) -> None:
        """Give the complete file its name, unless another file has taken it in the meantime."""
        try:
            self.check()
            if self.overwrite and kind(self.path):
                unfinished.chmod(stat.S_IMODE(self.path.lstat().st_mode))
                unfinished.replace(self.path)
            else:
                _rename_new(unfinished, self.path)
            sync(self.path.parent)
        except (OSError, ConfigError) as error:
            why = error.problems[0].what if isinstance(error, ConfigError) else error.strerror
            what, fix = f"cannot be put in place: {why}", f"the output is kept in {unfinished}"
            raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, self.named, self.key, fix)) from None


def output(path: Path, key: str, *, overwrite: bool | None, inputs: Sequence[Path] = (), begins: str = "") -> Output:
    """Check where a command is to write, before it begins. See `Output` for the arguments.

    Raises ConfigError: the file exists and may not be replaced; it is, or belongs to, an input; it is in an adapter
    directory; it is a directory, a socket or a disk; its directory does not exist; it cannot be written.
    """
    try:
        resolved, handle = _resolve(path)
    except (OSError, ValueError) as error:
        problem = Problem(Code.OUTPUT_UNUSABLE, _unreadable(error), str(path), key, "choose another path")
        raise ConfigError(problem) from None
    target = Output(str(path), key, resolved, handle, overwrite, tuple(inputs), begins)
    target.check()
    return target


def _unreadable(error: OSError | ValueError) -> str:
    return f"cannot be accessed: {error.strerror if isinstance(error, OSError) else error}"


def _resolve(path: Path) -> tuple[Path, int | None]:
    """The path that symbolic links lead to, and the open file of this process that it names, if it does.

    Raises:
        OSError: A link leads nowhere, or in a circle.
    """
    path = Path(os.path.abspath(path))
    while (match := _OPEN_FILE.fullmatch(str(path))) is None and path.is_symlink():
        path.stat()
        path = Path(os.path.abspath(path.parent / os.readlink(path)))
    if match is not None:
        return path, _STREAMS.get(match["name"]) or int(match["number"])
    return Path(os.path.realpath(path.parent), path.name), None


def _rename_new(path: Path, name: Path) -> None:
    """Rename a file, without replacing another one. Raises FileExistsError."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # The file system has no hard links.
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name)) from None
        path.rename(name)
    else:
        path.unlink()


def _is_regular(file_kind: str) -> bool:
    """Whether a regular file is there, or will be."""
    return file_kind in ("", "a file")


def _is_writable(handle: int) -> bool:
    try:
        os.write(handle, b"")
    except OSError:
        return False
    return True
