"""The output directory of a run, and the directory beside it that holds its work in progress.

A run works in `<output_dir>.partial/` and publishes its adapter with one rename, so the output directory is either
whole or absent.
"""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratune.codes import Code
from loratune.errors import ConfigError, LockedError, Problem, ResourceError, ResumeError, is_disk_full
from loratune.system.directories import Contents, remove_own, scan_all
from loratune.system.files import (
    explain_full_disk,
    hold_lock,
    is_directory,
    is_file,
    is_incidental_file,
    kind,
    open_lock,
    sync,
)
from loratune.system.signals import defer_signals
from loratune.training import run_dir_files
from loratune.training.overwrite import (
    ADAPTER,
    Inputs,
    OutputKind,
    check_replaceable,
    move_files,
    move_files_back,
    scan_recorded,
    shortened,
)
from loratune.training.run_dir_files import CHECKPOINT, MANIFEST, RejectedAdapter


@dataclass(frozen=True)
class RunDirectory:
    """Where a run works and where its adapter goes.

    Attributes:
        output: The output directory.
        partial: The work in progress, a sibling of `output` on the same file system.
        display_name: The output directory as the user named it.
        overwrite: Whether an adapter at `output`, and the work of an interrupted run, may be replaced.
        inputs: What the run reads and must therefore not remove.
        kind: What is put together and published.
    """

    output: Path
    partial: Path
    display_name: str
    overwrite: bool = False
    inputs: Inputs = ()
    kind: OutputKind = ADAPTER

    @property
    def checkpoints(self) -> Path:
        """The directory of the trainer's checkpoints."""
        return self.partial / "checkpoints"

    @property
    def unfinished(self) -> Path:
        """The directory in which a checkpoint is written."""
        return self.checkpoints / "unfinished"

    @property
    def staging(self) -> Path:
        """The directory in which the adapter is put together and checked."""
        return self.partial / "adapter"

    @property
    def replaced(self) -> Path:
        """Where the old adapter is for the moment in which the new one takes its place."""
        return self.partial / "replaced"

    @property
    def moving(self) -> Path:
        """Where the old adapter is moved to file by file, if it cannot be moved as a whole; see `move_files`."""
        return self.partial / "moving"

    @property
    def overwrite_mark(self) -> Path:
        """A file that exists if the run was started with --overwrite: then --resume alone may replace the adapter."""
        return self.partial / "may_replace"

    @property
    def rejection(self) -> Path:
        """The record of an adapter that was not published; see `RejectedAdapter`."""
        return self.partial / "ended"

    @property
    def lock(self) -> Path:
        """The file that the run holds a lock on, and that names its process. The lock ends with the process."""
        return self.partial / "lock"

    @property
    def _directories(self) -> tuple[Path, ...]:
        return self.checkpoints, self.staging, self.replaced, self.moving

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.overwrite_mark, self.rejection, self.lock

    @property
    def _scanners(self) -> dict[Path, Callable[[Path], Contents]]:
        return {
            self.checkpoints: run_dir_files.scan_checkpoints,
            self.staging: run_dir_files.scan_staging if self.kind == ADAPTER else scan_all,
            self.replaced: scan_recorded,
        }

    def foreign_files(self) -> list[str]:
        """What is in `partial` although no run made it, by paths relative to it.

        Raises:
            OSError: The directory cannot be read.
        """
        own = {path.name for path in (*self._directories, *self._files)}
        names = sorted(path.name for path in self.partial.iterdir() if path.name not in own)
        foreign = [name for name in names if not is_incidental_file(name)]
        for path, scan in self._scanners.items():
            if is_directory(path):
                foreign += [f"{path.name}/{name}" for name in scan(path).foreign]
        return foreign

    def check_partial(self, subject: str, where: str) -> None:
        """Check that the work in progress is a directory, or absent, and holds nothing that no run made.

        Args:
            subject: How a message begins.
            where: The place that a message names.

        Raises:
            ConfigError: It is of another kind, or holds other files.
        """
        if (actual := kind(self.partial)) not in ("", "a directory"):
            what = f"{subject}is {actual}" + (", which is not followed" if self.partial.is_symlink() else "")
            raise ConfigError(Problem(Code.RUN_PARTIAL_KIND, what, where, self.kind.key, "move it away"))
        if os.path.lexists(self.partial) and (foreign := self.foreign_files()):
            raise _foreign_files_error(f"{subject}holds {shortened(foreign)}", where, self.kind.key)

    def check_kinds(self) -> None:
        """Check that no link, pipe or the like has the name of a file or directory of the run. None is followed.

        Raises:
            ResumeError: Something has another kind than it should have.
        """
        expected = dict.fromkeys((*self._directories, self.unfinished), "a directory")
        expected |= dict.fromkeys(self._files, "a file")
        if is_directory(self.checkpoints):
            expected |= dict.fromkeys(sorted(self.checkpoints.glob(f"{CHECKPOINT}*")), "a directory")
        else:
            del expected[self.unfinished]
        if problems := [
            Problem(
                Code.RUN_PARTIAL_ENTRY_KIND, f"is {actual} and should be {right}", str(path), fix="move or delete it"
            )
            for path, right in expected.items()
            if (actual := kind(path)) not in ("", right)
        ]:
            raise ResumeError(problems)

    def has_checkpoints(self) -> bool:
        """Whether `checkpoints` holds anything that a user may need: checkpoints, even damaged, or foreign files."""
        if not is_directory(self.checkpoints):
            return False
        return any(path != self.unfinished or not is_directory(path) for path in self.checkpoints.iterdir())

    def is_resumable(self) -> bool:
        """Whether there is a checkpoint that was written to its end, so that `--resume` may be suggested."""
        return any(is_file(path / MANIFEST) for path in self.checkpoints.glob(f"{CHECKPOINT}*") if is_directory(path))

    def rejected_adapter(self) -> RejectedAdapter | None:
        """The adapter that the last run did not publish; None if that run was interrupted."""
        return RejectedAdapter.read(self.rejection)

    def prepare(self, *, resume: bool) -> None:
        """Make room for the work of a run. What an interrupted run left is removed, unless it is resumed.

        Raises:
            ConfigError: Something has come to the output directory, or the old adapter cannot be replaced.
            ResumeError: See `check_kinds`.
        """
        self.check_kinds()
        self._remove(self.staging, self.replaced, *(() if resume else (self.checkpoints,)))
        if foreign := self.foreign_files():
            raise _foreign_files_error(f"holds {shortened(foreign)}", str(self.partial), "")
        self.rejection.unlink(missing_ok=True)
        if not resume:
            self.overwrite_mark.unlink(missing_ok=True)
        if self.overwrite:
            self.overwrite_mark.touch()
        self._check_output()
        if self.kind == ADAPTER:
            self.checkpoints.mkdir(exist_ok=True)
        sync(self.partial)
        sync(self.partial.parent)

    @property
    def _proceed(self) -> str:
        return "continue with --resume" if self.is_resumable() else "start again"

    def _check_output(self) -> None:
        if os.path.lexists(self.output):
            if not is_file(self.overwrite_mark) or not is_directory(self.output):
                raise _appeared_error(self.output, self.kind.key, self._proceed)
            check_replaceable(self.output, str(self.output), self.inputs, f"and {self._proceed}", self.kind)

    def create_staging(self) -> None:
        """Make the directory in which the adapter is put together.

        Raises:
            ConfigError: Something has its name.
        """
        if os.path.lexists(self.staging):
            raise _appeared_error(self.staging, "", self._proceed)
        self.staging.mkdir()

    def publish(self) -> list[Path]:
        """Flush the staged files to the disk, move them to the output directory, and remove the work in progress.

        Returns:
            The foreign files that are left in the work in progress.

        Raises:
            ConfigError: Something has come to the output directory, which is not replaced then; or the adapter cannot
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
                self._move_old_adapter()
                # Nobody finds the old adapter by its name any more, so this is the last look at what is in it.
                check_replaceable(self.replaced, str(self.output), self.inputs, output=self.kind)
            self.staging.rename(self.output)
        except OSError as error:
            self.restore_old_adapter()
            if is_disk_full(error):
                raise
            what = f"the finished {self.kind.noun} cannot be moved there: {error.strerror}"
            fix = f"repair that, or move away what is there, and {self._proceed}"
            raise ConfigError(Problem(Code.RUN_OUTPUT_NOT_MOVED, what, str(self.output), self.kind.key, fix)) from None
        except BaseException:
            self.restore_old_adapter()
            raise
        sync(self.output.parent)
        return self._remove_work()

    def _move_old_adapter(self) -> None:
        """Move the old adapter to `replaced`.

        On overlayfs, as in a container, a directory that came with the image has to be moved file by file.
        """
        try:
            self.output.rename(self.replaced)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            move_files(self.output, self.moving)
            self.moving.rename(self.replaced)

    def restore_old_adapter(self) -> None:
        """Move the old adapter back if the new one has not taken its place."""
        if is_directory(self.moving):
            move_files_back(self.moving, self.output)
        if is_directory(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)

    def clean_up(self) -> None:
        """Remove a staged adapter that was not published; and all work in progress if there is no checkpoint."""
        self.restore_old_adapter()
        self._remove(self.staging)
        if is_directory(self.partial) and not self.has_checkpoints():
            self._remove_work()

    def remove_all(self) -> list[Path]:
        """Remove the adapter and the work in progress. Foreign files, and their directories, stay and are returned."""
        left = self._remove_work() if is_directory(self.partial) else []
        if is_directory(self.output):
            contents = scan_recorded(self.output)
            remove_own(self.output, contents)
            left += [self.output / name for name in contents.foreign]
        return left

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, so that the run cannot be resumed."""
        self._remove(self.checkpoints)

    def _remove_work(self) -> list[Path]:
        """Remove the work in progress. Foreign files, and the directory they are in, stay and are returned."""
        self._remove(self.checkpoints, self.staging, self.replaced)
        incidental = [path for path in self.partial.iterdir() if is_incidental_file(path.name)]
        for path in (*self._files, *(path for path in incidental if not is_directory(path))):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.partial.rmdir()
        return [self.partial / name for name in self.foreign_files()] if is_directory(self.partial) else []

    def _remove(self, *directories: Path) -> None:
        """Remove directories of the run except for foreign files."""
        for path in directories:
            if is_directory(path):
                remove_own(path, self._scanners[path](path))


def _appeared_error(path: Path, key: str, proceed: str) -> ConfigError:
    what, fix = "has appeared since the run started, and is not replaced", f"move it away, and {proceed}"
    return ConfigError(Problem(Code.RUN_OUTPUT_APPEARED, what, str(path), key, fix))


def _foreign_files_error(what: str, where: str, key: str) -> ConfigError:
    return ConfigError(
        Problem(Code.RUN_PARTIAL_OTHER_FILES, f"{what}, which no run made", where, key, "move that away")
    )


@contextmanager
def locked(directory: RunDirectory) -> Iterator[RunDirectory]:
    """Create the work in progress and hold its lock while the run lasts. At the end, see `RunDirectory.clean_up`.

    Raises:
        LockedError: Another run is working there.
        ConfigError: Something else is in the work in progress.
        ResourceError: The disk is full.
    """
    with ExitStack() as stack:
        # A signal that came between the steps of this would leave a directory that nobody removes.
        with defer_signals(lambda _: None) as stop:
            with explain_full_disk("the work in progress", 4096, directory.output.parent, "make room"):
                directory.partial.mkdir(exist_ok=True)
            directory.check_partial("", str(directory.partial))
            directory.check_kinds()
            stack.enter_context(_hold(directory))
            stack.callback(directory.clean_up)
        if stop.requested is not None:
            raise stop.requested
        directory.restore_old_adapter()  # the last run may have been killed between the two renames of `publish`
        yield directory


@contextmanager
def _hold(directory: RunDirectory) -> Iterator[None]:
    """Hold the lock. The kernel releases it when the process ends, in whatever way."""
    where = str(directory.output)
    just_ended = LockedError(
        Problem(
            Code.RUN_JUST_ENDED, "another run has just ended there", where, directory.kind.key, "start loratune again"
        )
    )
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_lock(directory.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT))
            hold_lock(file, where, directory.kind.key)
            if not os.path.samestat(os.fstat(file.fileno()), directory.lock.stat()):
                raise just_ended
        except FileNotFoundError:
            raise just_ended from None
        try:
            with explain_full_disk("the work in progress", 4096, directory.partial, "make room"):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
        except ResourceError:
            directory.clean_up()
            raise
        yield
