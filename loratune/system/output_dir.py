"""The output directory of a command: written as a sibling, and published whole or not at all by one rename."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from loratune.codes import Code
from loratune.errors import ConfigError, LockedError, Problem, is_disk_full
from loratune.events import note
from loratune.system.directories import (
    ADAPTER,
    CONFIG_INPUT,
    EXPORT,
    START_INPUT,
    Contents,
    Inputs,
    OutputKind,
    check_replaceable,
    check_unused,
    remove_own,
    scan_all,
    scan_recorded,
    shortened,
)
from loratune.system.files import (
    check_free_space,
    contains,
    explain_full_disk,
    hold_lock,
    is_directory,
    is_file,
    is_incidental_file,
    kind,
    open_lock,
    sync,
)


@dataclass(frozen=True)
class OutputDirectory:
    """Where a command works and where its result goes.

    Attributes:
        output: The output directory.
        partial: The work in progress, a sibling of `output` on the same file system.
        display_name: The output directory as the user named it.
        overwrite: Whether an earlier result at `output`, and the work of an interrupted run, may be replaced.
        inputs: What the command reads and must therefore not remove.
        kind: What is put together and published.
    """

    output: Path
    partial: Path
    display_name: str
    overwrite: bool = False
    inputs: Inputs = ()
    kind: OutputKind = ADAPTER

    @classmethod
    def at(cls, named: str, *, overwrite: bool, inputs: Inputs = (), kind: OutputKind = ADAPTER) -> Self:
        """The directory that the user names. Raises ConfigError: it is the root of the file system."""
        output = Path(os.path.abspath(Path(named).expanduser()))
        if not output.name:
            what, fix = "is the root of the file system", "name a directory in it"
            raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, named, kind.key, fix))
        return cls(output, output.with_name(f"{output.name}.{kind.unfinished}"), named, overwrite, inputs, kind)

    @property
    def staging(self) -> Path:
        """The directory in which the result is put together and checked."""
        return self.partial / "adapter"

    @property
    def replaced(self) -> Path:
        """Where the old result is for the moment in which the new one takes its place."""
        return self.partial / "replaced"

    @property
    def lock(self) -> Path:
        """The file that the command holds a lock on, and that names its process. The lock ends with the process."""
        return self.partial / "lock"

    @property
    def _scanners(self) -> dict[Path, Callable[[Path], Contents]]:
        """Directory in `partial` → what finds the files in it that a command made."""
        return {self.staging: scan_all, self.replaced: scan_recorded}

    @property
    def _files(self) -> tuple[Path, ...]:
        """The files in `partial`."""
        return (self.lock,)

    @property
    def _may_replace(self) -> bool:
        return self.overwrite

    @property
    def _proceed(self) -> str:
        return "start again"

    def is_kept(self) -> bool:
        """Whether the work in progress holds anything that a user may need."""
        return False

    def _refuse(self, code: Code, what: str, fix: str, where: str = "") -> ConfigError:
        return ConfigError(Problem(code, what, where or self.display_name, self.kind.key, fix))

    # Checks before anything is read or changed

    def check(self, *, resume: bool = False, dry_run: bool = False) -> Self:
        """Check that a command may write there. Nothing is changed.

        Args:
            resume: Whether an interrupted run is to be continued.
            dry_run: Nothing will be written: an earlier run that is in the way is noted, and no error.

        Raises:
            ConfigError: The directory exists, is a file, a link or a mount point, or cannot be written; its parent is
                missing; an unfinished run is there; it may not be replaced, see `check_replaceable`.
            ResumeError: `resume` where no run was interrupted.
            LockedError: Another command is working there.
            ResourceError: The disk is full.
        """
        try:
            if is_directory(self.partial) and is_file(self.lock):
                with open_lock(self.lock, os.O_RDONLY) as file:
                    hold_lock(file, self.display_name, self.kind.key)
            self._check_places(resume=resume)
            try:
                self._check_state(resume=resume)
            except ConfigError as error:
                if not dry_run or self.overwrite:
                    raise
                note(f"training will be refused: {error}")
        except OSError as error:
            what = f"cannot be looked at: {error.strerror}"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "check the path") from None
        try:
            with explain_full_disk("the work in progress", 4096, self.output.parent, "make room"):
                tempfile.TemporaryDirectory(dir=self.output.parent, prefix=".loratune-").cleanup()
        except OSError as error:
            what, fix = f"cannot be written: {error.strerror}", "choose another, or change permissions"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, fix) from None
        return self

    def _check_places(self, *, resume: bool) -> None:
        """Check what is at the places of the output and of the work in progress."""
        output = self.output
        if output.is_symlink() and output.is_dir():
            fix = f"name {os.path.realpath(output)} instead"
            raise self._refuse(Code.OUTPUT_UNUSABLE, "is a symbolic link, which is not followed", fix)
        if os.path.lexists(output) and not output.is_dir():
            raise self._refuse(Code.OUTPUT_UNUSABLE, "is a file", "name a directory that does not exist yet")
        if not output.parent.is_dir():
            what = f"its parent {output.parent} is not a directory"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "create it first")
        self._check_partial(f"{self.partial.name}, where work in progress is kept, ", self.display_name)
        for name, read in self.inputs:
            is_whole = name == START_INPUT or self.kind == EXPORT
            if is_whole and os.path.isdir(read) and contains(Path(read), output):
                what = f"is, or is in, a directory that the command reads ({name}: {read})"
                raise self._refuse(Code.OUTPUT_OVERWRITE, what, "choose another directory")
        for path in (output, self.partial):
            if path.exists():
                check_unused(path, self.display_name if path == output else str(path), self.inputs, self.kind)

    def _check_state(self, *, resume: bool) -> None:
        """Check that the user wants to replace, or to resume, what earlier commands left."""
        if self.output.exists() and not self.overwrite and not (resume and self._may_replace):
            inside = any(name == CONFIG_INPUT and contains(self.output, Path(path)) for name, path in self.inputs)
            fix = f"choose another{' with --set output_dir=NEW' if inside else ''}, or replace it with --overwrite"
            if self.is_kept():
                name = self.partial.name
                fix = f"if it is the adapter you want, remove {name}; to train again and replace both, use --overwrite"
            raise self._refuse(Code.OUTPUT_EXISTS, "already exists", fix)
        if self.output.exists():
            check_replaceable(self.output, self.display_name, self.inputs, self.kind)

    def _check_partial(self, subject: str, where: str) -> None:
        """Check that the work in progress is a directory, or absent, and holds nothing that no command made.

        Raises ConfigError with a message about the place `where` that begins with `subject`.
        """
        if (actual := kind(self.partial)) not in ("", "a directory"):
            what = f"{subject}is {actual}" + (", which is not followed" if self.partial.is_symlink() else "")
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "move it away", where)
        if foreign := self.foreign_files():
            what = f"{subject}holds {shortened(foreign)}, which no run made"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "move that away", where)

    def foreign_files(self) -> list[str]:
        """What is in `partial` although no command made it, by paths relative to it; links and pipes always are.

        Raises:
            OSError: The directory cannot be read.
        """
        foreign = []
        for path in sorted(self.partial.iterdir()) if is_directory(self.partial) else []:
            if path in self._scanners and is_directory(path):
                foreign += [f"{path.name}/{name}" for name in self._scanners[path](path).foreign]
            elif not (path in self._files and is_file(path)) and not is_incidental_file(path.name):
                foreign.append(path.name)
        return foreign

    # Work

    def _make_partial(self) -> None:
        try:
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            if is_disk_full(error):
                raise
            what, fix = f"cannot be written: {error.strerror}", "choose another, or change permissions"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, fix) from None

    def _remove_empty_partial(self) -> None:
        with suppress(OSError):
            self.partial.rmdir()

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Create the work in progress and hold its lock inside. At the end, see `clean_up`.

        Raises:
            LockedError: Another command is working there.
            ConfigError: Something else is in the work in progress.
            ResourceError: The disk is full.
        """
        with ExitStack() as stack:
            with explain_full_disk("the work in progress", 4096, self.output.parent, "make room"):
                self._make_partial()
                stack.callback(self._remove_empty_partial)  # a signal may come before there is a lock
                self._check_partial("", str(self.partial))
                lock = self._hold(stack)
                stack.callback(self.clean_up)
                lock.truncate(0)
                os.write(
                    lock.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode()
                )  # no buffer to flush later
            self.restore_old()  # the last command may have been killed between the two renames of `publish`
            yield self

    def _hold(self, stack: ExitStack) -> TextIO:
        """The lock file, whose lock is held until the stack is closed, or the process ends in whatever way."""
        try:
            file = stack.enter_context(open_lock(self.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT))
            hold_lock(file, str(self.output), self.kind.key)
            if os.path.samestat(os.fstat(file.fileno()), self.lock.stat()):
                return file
        except FileNotFoundError:
            pass
        what, fix = "another run has just ended there", "start loratune again"
        raise LockedError(Problem(Code.SYSTEM_LOCKED, what, str(self.output), self.kind.key, fix))

    def prepare(self, *, resume: bool = False) -> None:
        """Make room for the work. What an interrupted command left is removed, unless it is resumed.

        Raises:
            ConfigError: Something has come to the output directory, or what is there cannot be replaced.
        """
        self._remove(self.staging, self.replaced)
        self._check_partial("", str(self.partial))
        self._check_output()
        sync(self.partial)
        sync(self.partial.parent)

    def _check_output(self) -> None:
        if os.path.lexists(self.output):
            if not self._may_replace or not is_directory(self.output):
                raise self._appeared(self.output)
            check_replaceable(self.output, str(self.output), self.inputs, self.kind, self._proceed)

    def _appeared(self, path: Path) -> ConfigError:
        what = "has appeared since the run started, and is not replaced"
        return self._refuse(Code.OUTPUT_UNUSABLE, what, f"move it away, and {self._proceed}", str(path))

    def create_staging(self) -> None:
        """Make the directory in which the result is put together. Raises ConfigError: something has its name."""
        if os.path.lexists(self.staging):
            raise self._appeared(self.staging)
        self.staging.mkdir()

    def publish(self) -> list[Path]:
        """Flush the staged files to the disk, move them to the output directory, and remove the work in progress.

        Returns:
            The foreign files that are left in the work in progress.

        Raises:
            ConfigError: Something has come to the output directory, which is not replaced then; or the result cannot
                be moved there.
            OSError: The disk is full.
        """
        self._check_output()
        umask = os.umask(0)
        os.umask(umask)
        for path in sorted(self.staging.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~umask)
            sync(path)
        sync(self.staging)
        try:
            if os.path.lexists(self.output):
                self.output.rename(self.replaced)
                # Nobody finds the old result by its name any more, so this is the last look at what is in it.
                check_replaceable(self.replaced, str(self.output), self.inputs, self.kind)
            self.staging.rename(self.output)
        except OSError as error:
            self.restore_old()
            if is_disk_full(error):
                raise
            what = f"the finished {self.kind.noun} cannot be moved there: {error.strerror}"
            fix = f"repair that, or move away what is there, and {self._proceed}"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, fix, str(self.output)) from None
        except BaseException:
            self.restore_old()
            raise
        sync(self.output.parent)
        return self._remove_work()

    @contextmanager
    def staged(self, size: int, what: str) -> Iterator[Path]:
        """A new directory beside the output, which takes the output's place at the end unless there is an error.

        What an interrupted command left is removed first.

        Args:
            size: About how many bytes will be written.
            what: What is written, for a message about a full disk.

        Raises:
            ConfigError, LockedError: Something has come to the output in the meantime; another process writes there.
            ResourceError: The disk is too small, or full.
        """
        with self.locked(), explain_full_disk(what, size, self.partial, "make room, and start again"):
            self.prepare()
            check_free_space(self.partial, size, what, self.kind.key)
            self.create_staging()
            yield self.staging
            self.publish()

    def restore_old(self) -> None:
        """Move the old result back if the new one has not taken its place."""
        if is_directory(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)

    def clean_up(self) -> None:
        """Remove a staged result that was not published; and all work in progress if nothing in it is needed."""
        self.restore_old()
        self._remove(self.staging)
        if is_directory(self.partial) and not self.is_kept():
            self._remove_work()

    def remove_all(self) -> list[Path]:
        """Remove the result and the work in progress. Foreign files, and their directories, stay and are returned."""
        left = self._remove_work() if is_directory(self.partial) else []
        if is_directory(self.output):
            contents = scan_recorded(self.output)
            remove_own(self.output, contents)
            left += [self.output / name for name in contents.foreign]
        return left

    def _remove_work(self) -> list[Path]:
        """Remove the work in progress. Foreign files, and the directory they are in, stay and are returned."""
        self._remove(*self._scanners)
        incidental = [path for path in self.partial.iterdir() if is_incidental_file(path.name)]
        for path in (*self._files, *(path for path in incidental if not is_directory(path))):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.partial.rmdir()
        return [self.partial / name for name in self.foreign_files()]

    def _remove(self, *directories: Path) -> None:
        """Remove directories of the work in progress except for foreign files."""
        for path in directories:
            if is_directory(path):
                remove_own(path, self._scanners[path](path))
