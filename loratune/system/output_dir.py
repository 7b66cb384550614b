"""The output directory of a command: written as a sibling, and published whole or not at all by one rename.

`overwrite` replaces a directory of the same kind that holds nothing else, and that nothing else needs.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self, TextIO

from loratune.codes import Code
from loratune.errors import ConfigError, LockedError, Problem, is_disk_full
from loratune.events import note
from loratune.system import directories, files, signals
from loratune.system.directories import Contents, is_recorded, scan, scan_recorded, shortened
from loratune.system.launcher import host

Inputs = Sequence[tuple[str, str]]
"""The inputs of a command: name for the user, e.g. `data.train`, and path."""
_MOST_ENDING = 20
"""How many other commands may end in the directory before this one has its lock."""
CONFIG_INPUT = "the config file"
"""The name of a run's config among its inputs. It is not read again once the run has started."""


@dataclass(frozen=True)
class OutputDirectory:
    """Where a command works and where its result goes; here, a model or adapter that is made from an adapter.

    Attributes:
        noun: The name of the result in messages.
        key: The config key, or the parameter, by which the user names the directory.
        suffix: The end of the name of `partial`.
        output: The output directory.
        partial: The work in progress, a sibling of `output` on the same file system.
        display_name: The output directory as the user named it.
        overwrite: Whether an earlier result at `output`, and the work of an interrupted run, may be replaced.
        inputs: What the command reads and must therefore not remove.
    """

    noun: ClassVar = "exported model or adapter"
    key: ClassVar = "output"
    suffix: ClassVar = "export"
    output: Path
    partial: Path
    display_name: str
    overwrite: bool = False
    inputs: Inputs = ()

    @classmethod
    def at(cls, named: str, *, overwrite: bool, inputs: Inputs = ()) -> Self:
        """The directory that the user names. Raises ConfigError: it is the root of the file system."""
        output = Path(os.path.abspath(Path(named).expanduser()))
        if not output.name:
            what, fix = "is the root of the file system", "name a directory in it"
            raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, named, cls.key, fix))
        return cls(output, output.with_name(f"{output.name}.{cls.suffix}"), named, overwrite, inputs)

    @property
    def staging(self) -> Path:
        """The directory in which the result is put together and checked."""
        return self.partial / "adapter"

    @property
    def replaced(self) -> Path:
        """The temporary location of the old result while the new one replaces it."""
        return self.partial / "replaced"

    @property
    def lock(self) -> Path:
        """The file that the command holds a lock on, and that names its process. The lock ends with the process."""
        return self.partial / "lock"

    @property
    def _scanners(self) -> dict[Path, Callable[[Path], Contents]]:
        """Directory in `partial` → what finds the files in it that a command made."""
        return {self.staging: lambda path: scan(path, lambda _: True, lambda _: True), self.replaced: scan_recorded}

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

    def _holds_output(self, directory: Path) -> bool:
        """Whether a directory holds such a result."""
        record = directories.read_record(directory)
        return isinstance(record, dict) and isinstance(record.get("kind"), str)

    def _is_whole(self, name: str) -> bool:
        """Whether every file in an input belongs to it, if it is a directory. name: that of the input."""
        return True

    def is_kept(self) -> bool:
        """Whether the work in progress holds anything that a user may need."""
        return False

    def _refuse(self, code: Code, what: str, fix: str, where: str = "") -> ConfigError:
        return ConfigError(Problem(code, what, where or self.display_name, self.key, fix))

    # Checks before anything is read or changed

    def check(self, *, resume: bool = False, dry_run: bool = False) -> Self:
        """Check that a command may write there. Nothing is changed.

        Args:
            resume: Whether an interrupted run is to be continued.
            dry_run: Nothing will be written: an earlier run that is in the way is noted, and no error.

        Raises:
            ConfigError: The directory exists, is a file, a link or a mount point, or cannot be written; its parent is
                missing; an unfinished run is there; it may not be replaced, see `_check_replaceable`.
            ResumeError: `resume` where no run was interrupted.
            LockedError: Another command is working there.
            ResourceError: The disk is full.
        """
        try:
            if files.is_directory(self.partial) and files.is_file(self.lock):
                with files.open_lock(self.lock, os.O_RDONLY) as file:
                    files.hold_lock(file, self.display_name, self.key)
            self._check_places(resume=resume)
            try:
                self._check_state(resume=resume)
            except ConfigError as error:
                if not dry_run or self.overwrite:
                    raise
                note(f"training will be refused: {error}")
        except OSError as error:
            what = f"cannot be accessed: {error.strerror}"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "check the path") from None
        try:
            with files.explain_full_disk("the work in progress", 4096, self.output.parent, "make room"):
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
            if self._is_whole(name) and os.path.isdir(read) and files.contains(Path(read), output):
                what = f"is, or is in, a directory that the command reads ({name}: {read})"
                raise self._refuse(Code.OUTPUT_OVERWRITE, what, "choose another directory")
        for path in (output, self.partial):
            if path.exists():
                self._check_unused(path, self.display_name if path == output else str(path))

    def _check_state(self, *, resume: bool) -> None:
        """Check that the user wants to replace, or to resume, what earlier commands left."""
        if self.output.exists() and not self.overwrite and not (resume and self._may_replace):
            configs = [Path(path) for name, path in self.inputs if name == CONFIG_INPUT]
            inside = any(files.contains(self.output, path) for path in configs)
            fix = f"choose another{' with --set output_dir=NEW' if inside else ''}, or replace it with `overwrite=True`"
            if self.is_kept():
                name = self.partial.name
                fix = f"if it is the adapter you want, remove {name}; "
                fix += "to train again and replace both, use `overwrite=True`"
            raise self._refuse(Code.OUTPUT_EXISTS, "already exists", fix)
        if self.output.exists():
            self._check_replaceable(self.output, self.display_name)

    def _check_replaceable(self, directory: Path, where: str, alternative: str = "") -> None:
        """Check that a directory may be replaced. where: it, in messages. alternative: to moving it away.

        Raises ConfigError: it is in use; it holds no such result, one of a newer release, or other files; or its files
        may not be removed.
        """
        self._check_unused(directory, where)
        alternative = alternative or f"or choose another {self.key}"
        fix, code = f"move it away, {alternative}", Code.OUTPUT_OVERWRITE
        if reason := files.newer(directories.read_record(directory)):
            what = f"{reason}, so `overwrite=True` does not replace it"
            raise self._refuse(Code.ADAPTER_NEWER_RECORD, what, fix, str(directory / directories.RECORD))
        contents = scan_recorded(directory)
        is_empty = all(map(files.is_incidental_file, contents.files + contents.foreign))
        if not is_empty and not self._holds_output(directory):
            raise self._refuse(code, f"holds no {self.noun}, so `overwrite=True` does not replace it", fix, where)
        if contents.foreign:
            what = f"also holds {shortened(contents.foreign)}, not part of the {self.noun}"
            what += ", so `overwrite=True` does not replace it"
            raise self._refuse(code, what, f"move or delete these files, {alternative}", where)
        for place, _, _ in os.walk(directory):
            if not os.access(place, os.W_OK | os.X_OK):
                what = f"cannot be replaced: {place} is not writable"
                raise self._refuse(Code.OUTPUT_UNUSABLE, what, fix, where)

    def _check_unused(self, directory: Path, where: str) -> None:
        """Check that a directory can be moved or removed without harm to something else. where: it, in messages.

        Raises ConfigError: it is a mount point; or it is, or holds, the working directory or what the command reads.
        """
        what = ""
        if os.path.ismount(directory):
            what, fix = "is a mount point", "name a directory inside it that does not exist yet"
        elif files.contains(directory, Path.cwd()):
            what, fix = "is, or holds, the working directory", "choose another, or start loratune from elsewhere"
        for name, path in self.inputs if not what else ():
            is_own = name == CONFIG_INPUT and is_recorded(directory, Path(path))
            if files.contains(directory, Path(path)) and not is_own:
                what = f"is, or holds, what the command reads ({name}: {path})"
                fix = "choose another directory, or move that"
        if what:
            raise self._refuse(Code.OUTPUT_OVERWRITE, f"{what}, so it cannot be replaced", fix, where)

    def _check_partial(self, subject: str, where: str) -> None:
        """Check that the work in progress is a directory, or absent, and holds nothing that no command made; else raise
        ConfigError with a message about the place `where` that begins with `subject`."""
        if (actual := files.kind(self.partial)) not in ("", "a directory"):
            what = f"{subject}is {actual}" + (", which is not followed" if self.partial.is_symlink() else "")
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "move it away", where)
        if foreign := self.foreign_files():
            what = f"{subject}holds {shortened(foreign)}, which no run made"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, "move that away", where)

    def foreign_files(self) -> list[str]:
        """What is in `partial` although no command made it, by paths relative to it; links and pipes always are."""
        found: list[Path] = []
        if files.is_directory(self.partial):
            with suppress(FileNotFoundError):  # another command may be removing it as it ends
                found = sorted(self.partial.iterdir())
        foreign = []
        for path in found:
            if path in self._scanners and files.is_directory(path):
                foreign += [f"{path.name}/{name}" for name in self._scanners[path](path).foreign]
            elif path in self._files:
                if files.kind(path) not in ("a file", ""):  # absent: another command has just removed it
                    foreign.append(path.name)
            elif not files.is_incidental_file(path.name):
                foreign.append(path.name)
        return foreign

    # Work

    @contextmanager
    def locked(self, seconds: float = 0.2) -> Iterator[Self]:
        """Create the work in progress and hold its lock inside. At the end, see `clean_up`. seconds: see `hold_lock`.

        Raises:
            LockedError: Another command is working there.
            ConfigError: Something else is in the work in progress.
            ResourceError: The disk is full.
        """
        with ExitStack() as stack:
            with files.explain_full_disk("the work in progress", 4096, self.output.parent, "make room"):
                stack.callback(self._remove_empty_partial)  # a signal may come before there is a lock
                lock = self._hold(stack, seconds)
                stack.callback(self.clean_up)
                lock.truncate(0)
                os.write(lock.fileno(), f"process {os.getpid()} on {host()}\n".encode())  # no buffer to flush later
            self.restore_old()  # the last command may have been killed between the two renames of `publish`
            yield self

    def _hold(self, stack: ExitStack, seconds: float) -> TextIO:
        """The lock file, whose lock is held until the stack is closed, or the process ends in whatever way. A command
        that ends removes the file, and a new one is made."""
        for _ in range(_MOST_ENDING):
            with suppress(FileExistsError):
                self.partial.mkdir()
            self._check_partial("", str(self.partial))
            with suppress(FileNotFoundError):
                file = stack.enter_context(files.open_lock(self.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT))
                files.hold_lock(file, str(self.output), self.key, seconds)
                if os.path.samestat(os.fstat(file.fileno()), self.lock.stat()):
                    return file
        what = "other runs have just ended there"
        raise LockedError(Problem(Code.SYSTEM_LOCKED, what, str(self.output), self.key, "start loratune again"))

    def _remove_empty_partial(self) -> None:
        with suppress(OSError):
            self.partial.rmdir()

    def prepare(self) -> None:
        """Remove an earlier command's result that was not published.

        Raises ConfigError: something has come to the output directory, or what is there cannot be replaced.
        """
        self._remove(self.staging, self.replaced)
        self._check_partial("", str(self.partial))
        self._check_output()
        files.sync(self.partial)
        files.sync(self.partial.parent)

    def _check_output(self) -> None:
        if os.path.lexists(self.output):
            if not self._may_replace or not files.is_directory(self.output):
                raise self._appeared(self.output)
            self._check_replaceable(self.output, str(self.output), f"and {self._proceed}")

    def _appeared(self, path: Path) -> ConfigError:
        what = "has appeared since the run started, and is not replaced"
        return self._refuse(Code.OUTPUT_UNUSABLE, what, f"move it away, and {self._proceed}", str(path))

    def create_staging(self) -> None:
        """Make the directory in which the result is put together. Raises ConfigError: something has its name."""
        try:
            self.staging.mkdir()
        except FileExistsError:
            raise self._appeared(self.staging) from None

    def publish(self) -> list[Path]:
        """Flush the staged files to the disk, move them to the output directory, and remove the work in progress.

        Returns the foreign files that are left in the work in progress.

        Raises ConfigError: something has come to the output directory, which is not replaced then; or the result cannot
        be moved there. OSError: the disk is full. StopSignal: a signal came while the result took its place, see
        `StopSignal.published`.
        """
        self._check_output()
        files.finish(self.staging)
        with signals.hold_signals() as held:
            self._take_place()
            files.sync(self.output.parent)
            left = self._remove_work()
        if held.requested is not None:
            stop = held.requested()
            stop.published = self.output
            raise stop
        return left

    def _take_place(self) -> None:
        """Move the staged result to the output directory, and what was there to `replaced`; or nothing of both."""
        try:
            if os.path.lexists(self.output):
                self.output.rename(self.replaced)
                # Nobody finds the old result by its name any more, so this is the last look at what is in it.
                self._check_replaceable(self.replaced, str(self.output))
            self.staging.rename(self.output)
        except BaseException as error:
            self.restore_old()
            if not isinstance(error, OSError) or is_disk_full(error):
                raise
            what = f"the finished {self.noun} cannot be moved there: {error.strerror}"
            fix = f"repair that, or move away what is there, and {self._proceed}"
            raise self._refuse(Code.OUTPUT_UNUSABLE, what, fix, str(self.output)) from None

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
        with self.locked(), files.explain_full_disk(what, size, self.partial, "make room, and start again"):
            self.prepare()
            files.check_free_space(self.partial, size, what, self.key)
            self.create_staging()
            yield self.staging
            self.publish()

    def restore_old(self) -> None:
        """Move the old result back if the new one has not taken its place."""
        if files.is_directory(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)

    def clean_up(self) -> None:
        """Remove a staged result that was not published; and all work in progress if nothing in it is needed."""
        self.restore_old()
        self._remove(self.staging)
        if files.is_directory(self.partial) and not self.is_kept():
            self._remove_work()

    def remove_all(self) -> list[Path]:
        """Remove the result and the work in progress. Foreign files, and their directories, stay and are returned."""
        left = self._remove_work() if files.is_directory(self.partial) else []
        if files.is_directory(self.output):
            contents = scan_recorded(self.output)
            directories.remove_own(self.output, contents)
            left += [self.output / name for name in contents.foreign]
        return left

    def _remove_work(self) -> list[Path]:
        """Remove the work in progress. Foreign files, and the directory they are in, stay and are returned."""
        self._remove(*self._scanners)
        incidental = [path for path in self.partial.iterdir() if files.is_incidental_file(path.name)]
        for path in (*self._files, *(path for path in incidental if not files.is_directory(path))):
            path.unlink(missing_ok=True)
        self._remove_empty_partial()
        return [self.partial / name for name in self.foreign_files()]

    def _remove(self, *paths: Path) -> None:
        """Remove directories of the work in progress except for foreign files."""
        for path in paths:
            if files.is_directory(path):
                directories.remove_own(path, self._scanners[path](path))
