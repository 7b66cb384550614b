"""The output directory and the work in progress beside it.

A run works in `<output_dir>.partial/` and publishes by one rename, so the output directory is whole or absent.
"""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import ConfigError, LockedError, Problem, ResourceError, ResumeError, is_disk_full
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
from loratune.training import belongings, ending, overwriting
from loratune.training.belongings import CHECKPOINT, MANIFEST, Belongings
from loratune.training.ending import PUBLISH, Ending
from loratune.training.overwriting import CONFIG_FILE, Inputs

_NOT_OURS = "which is not of a run's making"
_AWAY = "move that away"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run works and where its result goes. output and partial are siblings on one file system.

    overwrite: the user lets what is at `output`, and the work of an interrupted run, be replaced; named: as the user
    named the output; inputs: what the run reads, and therefore does not remove.
    """

    output: Path
    partial: Path
    named: str
    overwrite: bool = False
    inputs: Inputs = ()

    @property
    def checkpoints(self) -> Path:
        """The directory of the trainer's checkpoints."""
        return self.partial / "checkpoints"

    @property
    def staging(self) -> Path:
        """The directory in which the result is put together and checked."""
        return self.partial / "adapter"

    @property
    def replaced(self) -> Path:
        """Where the old adapter lies for the moment in which the new one takes its place."""
        return self.partial / "replaced"

    @property
    def may_replace(self) -> Path:
        """A mark: the run was started with leave to replace what is at `output`, and is resumed with it."""
        return self.partial / "may_replace"

    @property
    def ended(self) -> Path:
        """The record of how the run ended, if it did and its adapter was not published; see `Ending`."""
        return self.partial / "ended"

    @property
    def lock(self) -> Path:
        """A file that the run holds a lock on, which ends with its process, and that names it."""
        return self.partial / "lock"

    @property
    def unfinished(self) -> Path:
        """The directory that a checkpoint is written in."""
        return self.checkpoints / "unfinished"

    @property
    def moving(self) -> Path:
        """Where the old adapter is moved to file by file, if it cannot be moved as a whole; see `replacing.move`."""
        return self.partial / "moving"

    def strangers(self) -> list[str]:
        """What is in `partial`, by its path there, and not of a run's making. Raises OSError: it cannot be read."""
        own = {path.name for path in (*self._directories, *self._marks)}
        found = sorted(path.name for path in self.partial.iterdir() if path.name not in own)
        found = [name for name in found if not is_incidental_file(name)]
        for path, survey in self._surveys.items():
            if is_directory(path):
                found += [f"{path.name}/{name}" for name in survey(path).strangers]
        return found

    @property
    def _surveys(self) -> dict[Path, Callable[[Path], Belongings]]:
        return {
            self.checkpoints: belongings.of_checkpoints,
            self.staging: belongings.of_staging,
            self.replaced: overwriting.belongings,
        }

    def _remove(self, *directories: Path) -> None:
        """Remove directories of a run's own, but for what is not of its making."""
        for path in directories:
            if is_directory(path):
                belongings.remove(path, self._surveys[path](path))

    @property
    def _directories(self) -> tuple[Path, ...]:
        return self.checkpoints, self.staging, self.replaced, self.moving

    @property
    def _marks(self) -> tuple[Path, ...]:
        return self.may_replace, self.ended, self.lock

    def oddities(self) -> Iterator[Problem]:
        """What has the name of something in the work in progress, and is of another kind. It is never followed."""
        expected = dict.fromkeys((*self._directories, self.unfinished), "a directory")
        for path, right in (expected | dict.fromkeys(self._marks, "a file")).items():
            if path.parent != self.checkpoints or is_directory(self.checkpoints):
                yield from _odd(path, right)
        if is_directory(self.checkpoints):
            for path in sorted(self.checkpoints.glob(f"{CHECKPOINT}*")):
                yield from _odd(path, "a directory")

    def has_checkpoints(self) -> bool:
        """Whether there is anything that is not removed unasked: checkpoints, whole or damaged, or what is no run's."""
        if not is_directory(self.checkpoints):
            return False
        return any(path != self.unfinished or not is_directory(path) for path in self.checkpoints.iterdir())

    def is_resumable(self) -> bool:
        """Whether there is a checkpoint that was written to its end, so that `--resume` may be told of."""
        return any(is_file(path / MANIFEST) for path in self.checkpoints.glob(f"{CHECKPOINT}*") if is_directory(path))

    def ending(self) -> Ending | None:
        """How the run that left its work here ended; None if it was interrupted."""
        return ending.read(self.ended)

    def leave(self) -> None:
        """Remove the work in progress, if nothing could go on from it; and what was not published in any case."""
        self.restore()
        self._remove(self.staging)
        if is_directory(self.partial) and not self.has_checkpoints():
            self._clear()

    def restore(self) -> None:
        """Put the old adapter back, if the new one has not taken its place."""
        if is_directory(self.moving):
            overwriting.move_back(self.moving, self.output)
        if is_directory(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)

    def forget_checkpoints(self) -> None:
        """Remove what a `--resume` could go on from."""
        self._remove(self.checkpoints)

    def begin(self, *, resume: bool) -> None:
        """Make room for the work; what an interrupted run left goes, unless it is resumed.

        Raises ConfigError: something has appeared at the output directory, or an old adapter is in the way. Raises
        ResumeError: see `check_kinds`.
        """
        self.check_kinds()
        self._remove(self.staging, self.replaced, *(() if resume else (self.checkpoints,)))
        if others := self.strangers():
            raise ConfigError(Problem(f"holds {overwriting.shown(others)}, {_NOT_OURS}", str(self.partial), fix=_AWAY))
        self.ended.unlink(missing_ok=True)
        if not resume:
            self.may_replace.unlink(missing_ok=True)
        if self.overwrite:
            self.may_replace.touch()
        self._check_output()
        self.checkpoints.mkdir(exist_ok=True)
        sync(self.partial)
        sync(self.partial.parent)

    def check_kinds(self) -> None:
        """Raises ResumeError: a link, or anything else that is no work of a run, has the name of some."""
        if odd := list(self.oddities()):
            raise ResumeError(odd)

    def _check_output(self) -> None:
        way_on = "go on with --resume" if self.is_resumable() else "start again"
        if os.path.lexists(self.output):
            if not is_file(self.may_replace) or not is_directory(self.output):
                what = "has appeared since the run began, and is left alone"
                fix = f"move it away, and {way_on}"
                raise ConfigError(Problem(what, str(self.output), "output_dir", fix))
            overwriting.check(self.output, str(self.output), self.inputs, way_on)

    def stage(self) -> None:
        """Make the directory in which the result is put together. Raises ConfigError: something has its name."""
        if os.path.lexists(self.staging):
            what = "has appeared since the run began, and is left alone"
            raise ConfigError(Problem(what, str(self.staging), fix="move it away, and go on with --resume"))
        self.staging.mkdir()

    def publish(self) -> list[Path]:
        """Make the staged files durable and move them to the output directory; then clear the work in progress.

        Returns what stays in there, as it is not of a run's making. Raises ConfigError: something has appeared at the
        output directory, which is left alone; the system does not move directories. Raises OSError: the disk is full.
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
                self._take_away()
                overwriting.check(self.replaced, str(self.output), self.inputs)  # nobody finds it by its name any more
            self.staging.rename(self.output)
        except OSError as error:
            self.restore()
            if is_disk_full(error):
                raise
            what = f"the finished adapter cannot be put in its place: {error.strerror}"
            fix = "mend that, or move away what is there, and go on with --resume"
            raise ConfigError(Problem(what, str(self.output), "output_dir", fix)) from None
        except BaseException:
            self.restore()
            raise
        sync(self.output.parent)
        return self._clear()

    def _take_away(self) -> None:
        """Move the old adapter to `replaced`. On overlayfs, as in a container, a directory that came with the image has
        to be moved file by file."""
        try:
            self.output.rename(self.replaced)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            overwriting.move(self.output, self.moving)
            self.moving.rename(self.replaced)

    def _clear(self) -> list[Path]:
        """Remove the work in progress; whatever is in its directory besides stays, and the directory with it."""
        self._remove(self.checkpoints, self.staging, self.replaced)
        for path in (*self._marks, *filter(_is_dropping, self.partial.iterdir())):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.partial.rmdir()
        return [self.partial / name for name in self.strangers()] if is_directory(self.partial) else []


def _is_dropping(path: Path) -> bool:
    return is_incidental_file(path.name) and not is_directory(path)


def _odd(path: Path, right: str) -> Iterator[Problem]:
    if (found := kind(path)) not in ("", right):
        yield Problem(f"is {found} where {right} belongs, and is left alone", str(path), fix="move it away")


def inspect(output_dir: str, *, resume: bool, overwrite: bool, inputs: Inputs = ()) -> RunDirectory:
    """Check that a run may write to `output_dir`, leaving everything as it is. inputs: what the run reads.

    Raises ConfigError: it exists, is a file, a link or a mount point, cannot be written, its parent is missing, or an
    unfinished run is there; it may not be replaced, see `replacing.check`. Raises ResumeError: `resume` where no run
    was interrupted; see `RunDirectory.check_kinds`. Raises LockedError: another run is working there.
    """
    where, key = str(output_dir), "output_dir"
    try:
        space = RunDirectory(*_siblings(output_dir), where, overwrite, inputs)
        if is_directory(space.partial) and is_file(space.lock):
            with open_lock(space.lock, os.O_RDONLY) as file:
                hold_lock(file, where)
        _check_free(space, where, resume=resume, overwrite=overwrite)
    except OSError as error:
        raise ConfigError(Problem(f"cannot be looked at: {error.strerror}", where, key)) from None
    _probe(space, where)
    return space


def _siblings(output_dir: str) -> tuple[Path, Path]:
    output = Path(os.path.abspath(Path(output_dir).expanduser()))
    if not output.name:
        raise ConfigError(Problem("is the root of the file system", output_dir, "output_dir"))
    return output, output.with_name(f"{output.name}.partial")


def _check_free(space: RunDirectory, where: str, *, resume: bool, overwrite: bool) -> None:
    output, partial, key = space.output, space.partial, "output_dir"
    if output.is_symlink() and output.is_dir():
        raise ConfigError(Problem("is a link, and is not followed", where, key, f"name {os.path.realpath(output)}"))
    if os.path.lexists(output) and not output.is_dir():
        raise ConfigError(Problem("is a file", where, key, "name a directory that does not exist yet"))
    if not output.parent.is_dir():
        raise ConfigError(Problem(f"its parent {output.parent} is no directory", where, key, "create it first"))
    if odd := _fault_of(partial, space):
        what = f"{partial.name}, the place of work in progress, {odd}"
        raise ConfigError(Problem(what, where, key, _AWAY))
    if resume and not partial.is_dir():
        raise ResumeError(Problem("no interrupted run to resume", where, fix="leave out --resume to start one"))
    space.check_kinds()
    for directory in (output, partial):
        if directory.exists():
            overwriting.check_unneeded(directory, where if directory == output else str(partial), space.inputs)
    if output.exists() and not overwrite and not (resume and space.may_replace.exists()):
        inside = any(name == CONFIG_FILE and overwriting.holds(output, Path(path)) for name, path in space.inputs)
        fix = f"choose another{' with --set output_dir=NEW' if inside else ''}, or replace it with --overwrite"
        if space.has_checkpoints():
            fix = f"if it is what you want, the run had ended: remove {partial.name}; or replace both with --overwrite"
        raise ConfigError(Problem("already exists", where, key, fix))
    if output.exists():
        overwriting.check(output, where, space.inputs)
    if space.has_checkpoints() and not (resume or overwrite):
        fix = "start afresh with --overwrite"
        if space.is_resumable() and space.ending() is not None:
            what = f"{partial.name} holds a run that ended with an adapter worse than its base"
            fix = f"{PUBLISH}, or {fix} and a lower training.learning_rate"
            raise ConfigError(Problem(what, where, key, fix))
        if space.is_resumable():
            raise ConfigError(
                Problem(f"{partial.name} holds an interrupted run", where, key, f"continue it with --resume, or {fix}")
            )
        raise ConfigError(
            Problem(f"{partial.name} holds what an interrupted run left, and no whole checkpoint", where, key, fix)
        )


def _fault_of(partial: Path, space: RunDirectory) -> str:
    """Why a run may not work in a directory, as nothing but its own work may be in there; empty if it may."""
    if kind(partial) in ("", "a directory"):
        others = space.strangers() if os.path.lexists(partial) else []
        return f"holds {overwriting.shown(others)}, {_NOT_OURS}" if others else ""
    return f"is {kind(partial)}, and is not followed" if partial.is_symlink() else f"is {kind(partial)}"


def _probe(space: RunDirectory, where: str) -> None:
    probe = space.output.with_name(f".{space.output.name}.{os.getpid()}.probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(Problem("the disk is full", where, "output_dir", "make room")) from None
        raise ConfigError(Problem(f"cannot be written: {error.strerror}", where, "output_dir")) from None


@contextmanager
def claimed(space: RunDirectory) -> Iterator[RunDirectory]:
    """Hold the work in progress while the run lasts; a run that left no checkpoint leaves nothing.

    Raises LockedError: another run is working there. Raises ResourceError: the disk is full.
    """
    with explain_full_disk("the work in progress", 4096, space.output.parent, "make room"):
        space.partial.mkdir(exist_ok=True)
    if odd := _fault_of(space.partial, space):
        raise ConfigError(Problem(odd, str(space.partial), "output_dir", _AWAY))
    space.check_kinds()
    with _locked(space, str(space.output)):
        space.restore()  # the last run was killed between the two renames of `publish`
        try:
            yield space
        finally:
            space.leave()


@contextmanager
def _locked(space: RunDirectory, where: str) -> Iterator[None]:
    """Hold the lock. The kernel lets go of it when the process ends, however it does."""
    ended = LockedError(Problem("another run has just ended there", where, "output_dir", "start again"))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_lock(space.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT))
            hold_lock(file, where)
            if not os.path.samestat(os.fstat(file.fileno()), space.lock.stat()):
                raise ended
        except FileNotFoundError:
            raise ended from None
        try:
            with explain_full_disk("the work in progress", 4096, space.partial, "make room"):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
        except ResourceError:
            space.leave()
            raise
        yield
