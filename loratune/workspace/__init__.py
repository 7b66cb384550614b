"""The output directory and the work in progress beside it.

A run works in `<output_dir>.partial/` and publishes by one rename, so the output directory is whole or absent.
"""

import fcntl
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loratune.errors import ConfigError, LockedError, Problem, ResourceError, ResumeError, is_disk_full
from loratune.workspace import ending, replacing
from loratune.workspace.ending import PUBLISH as PUBLISH
from loratune.workspace.ending import Ending as Ending
from loratune.workspace.plain import is_directory, is_file
from loratune.workspace.plain import kind as kind
from loratune.workspace.replacing import Inputs

CHECKPOINT = "checkpoint-"
"""How the name of a checkpoint begins; the step follows."""
MANIFEST = "manifest.json"
"""The file that is written last to a checkpoint."""


@dataclass(frozen=True)
class Workspace:
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
    def ours(self) -> bool:
        """Whether `partial` is a directory, and nothing but a run's own work is in it."""
        own = {path.name for path in (*self._directories, *self._marks)}
        return is_directory(self.partial) and {path.name for path in self.partial.iterdir()} <= own

    @property
    def _directories(self) -> tuple[Path, ...]:
        return self.checkpoints, self.staging, self.replaced

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
        shutil.rmtree(self.staging, ignore_errors=True)
        if is_directory(self.partial) and not self.has_checkpoints():
            self._clear()

    def restore(self) -> None:
        """Put the old adapter back, if the new one has not taken its place."""
        if is_directory(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)

    def forget_checkpoints(self) -> None:
        """Remove what a `--resume` could go on from."""
        shutil.rmtree(self.checkpoints)

    def begin(self, *, resume: bool) -> None:
        """Make room for the work; what an interrupted run left goes, unless it is resumed.

        Raises ConfigError: something has appeared at the output directory, or an old adapter is in the way. Raises
        ResumeError: see `check_kinds`.
        """
        self.check_kinds()
        for path in (self.checkpoints, self.staging):
            if is_directory(path) and not (resume and path == self.checkpoints):
                shutil.rmtree(path)
        if is_directory(self.replaced) and not replacing.remove(self.replaced):
            what = "holds files that do not belong to the adapter that was replaced"
            raise ConfigError(Problem(what, str(self.replaced), fix="move it away"))
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
        fix = f"move it away, and {'go on with --resume' if self.is_resumable() else 'start again'}"
        if os.path.lexists(self.output):
            if not is_file(self.may_replace) or not is_directory(self.output):
                what = "has appeared since the run began, and is left alone"
                raise ConfigError(Problem(what, str(self.output), "output_dir", fix))
            replacing.check(self.output, str(self.output), self.inputs, fix)

    def publish(self) -> None:
        """Make the staged files durable and move them to the output directory; then clear the work in progress.

        Raises ConfigError: something has appeared there, which is left alone.
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
                replacing.check(self.replaced, str(self.output), self.inputs)  # nobody finds it by its name any more
            self.staging.rename(self.output)
        except BaseException:
            self.restore()
            raise
        sync(self.output.parent)
        self._clear()

    def _clear(self) -> None:
        """Remove the work in progress; whatever is in its directory besides stays, and the directory with it."""
        for path in (self.checkpoints, self.staging):
            if is_directory(path):
                shutil.rmtree(path)
        if is_directory(self.replaced):
            replacing.remove(self.replaced)
        for path in self._marks:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.partial.rmdir()


def _odd(path: Path, right: str) -> Iterator[Problem]:
    if (found := kind(path)) not in ("", right):
        yield Problem(f"is {found} where {right} belongs, and is left alone", str(path), fix="move it away")


def inspect(output_dir: str, *, resume: bool, overwrite: bool, inputs: Inputs = ()) -> Workspace:
    """Check that a run may write to `output_dir`, leaving everything as it is. inputs: what the run reads.

    Raises ConfigError: it exists, is a file, a link or a mount point, cannot be written, its parent is missing, or an
    unfinished run is there; it may not be replaced, see `replacing.check`. Raises ResumeError: `resume` where no run
    was interrupted; see `Workspace.check_kinds`. Raises LockedError: another run is working there.
    """
    where, key = str(output_dir), "output_dir"
    try:
        space = Workspace(*_siblings(output_dir), where, overwrite, inputs)
        if is_directory(space.partial) and is_file(space.lock):
            with _opened(space.lock, os.O_RDONLY) as file:
                _lock(file, where)
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


def _check_free(space: Workspace, where: str, *, resume: bool, overwrite: bool) -> None:
    output, partial, key = space.output, space.partial, "output_dir"
    if output.is_symlink() and output.is_dir():
        raise ConfigError(Problem("is a link, and is not followed", where, key, f"name {os.path.realpath(output)}"))
    if os.path.lexists(output) and not output.is_dir():
        raise ConfigError(Problem("is a file", where, key, "name a directory that does not exist yet"))
    if not output.parent.is_dir():
        raise ConfigError(Problem(f"its parent {output.parent} is no directory", where, key, "create it first"))
    if os.path.lexists(partial) and not space.ours:
        odd = "is a link, and is not followed" if partial.is_symlink() else "holds something else"
        what = f"{partial.name}, the place of work in progress, {odd}"
        raise ConfigError(Problem(what, where, key, "move that away"))
    if resume and not partial.is_dir():
        raise ResumeError(Problem("no interrupted run to resume", where, fix="leave out --resume to start one"))
    space.check_kinds()
    for directory in (output, partial):
        if directory.exists():
            replacing.check_unneeded(directory, where if directory == output else str(partial), space.inputs)
    if output.exists() and not overwrite and not (resume and space.may_replace.exists()):
        fix = "choose another, or replace it with --overwrite"
        if space.has_checkpoints():
            fix = f"if it is what you want, the run had ended: remove {partial.name}; or replace both with --overwrite"
        raise ConfigError(Problem("already exists", where, key, fix))
    if output.exists():
        replacing.check(output, where, space.inputs)
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


def _probe(space: Workspace, where: str) -> None:
    probe = space.output.with_name(f".{space.output.name}.{os.getpid()}.probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(Problem("the disk is full", where, "output_dir", "make room")) from None
        raise ConfigError(Problem(f"cannot be written: {error.strerror}", where, "output_dir")) from None


@contextmanager
def claimed(space: Workspace) -> Iterator[Workspace]:
    """Hold the work in progress while the run lasts; a run that left no checkpoint leaves nothing.

    Raises LockedError: another run is working there. Raises ResourceError: the disk is full.
    """
    with room_for("the work in progress", 4096, space.output.parent, "make room"):
        space.partial.mkdir(exist_ok=True)
    if not space.ours:
        raise ConfigError(Problem("holds something else", str(space.partial), "output_dir", "move that away"))
    space.check_kinds()
    with _locked(space, str(space.output)):
        space.restore()  # the last run was killed between the two renames of `publish`
        try:
            yield space
        finally:
            space.leave()


@contextmanager
def _locked(space: Workspace, where: str) -> Iterator[None]:
    """Hold the lock. The kernel lets go of it when the process ends, however it does."""
    ended = LockedError(Problem("another run has just ended there", where, "output_dir", "start again"))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_opened(space.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT))
            _lock(file, where)
            if not os.path.samestat(os.fstat(file.fileno()), space.lock.stat()):
                raise ended
        except FileNotFoundError:
            raise ended from None
        try:
            with room_for("the work in progress", 4096, space.partial, "make room"):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
        except ResourceError:
            space.leave()
            raise
        yield


def check_room(space: Workspace, needed: int) -> None:
    """Raises ResourceError: fewer than `needed` bytes are free where the run writes."""
    if (free := shutil.disk_usage(space.partial).free) < needed:
        what = f"checkpoints and the adapter directory take {needed:,} bytes, {free:,} are free"
        raise ResourceError(Problem(what, str(space.partial), "output_dir", "make room, or choose another disk"))


@contextmanager
def room_for(what: str, size: int, where: Path, fix: str) -> Iterator[None]:
    """Something of about `size` bytes is written inside.

    Raises ResourceError: the disk is full, or the user's share of it.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors have errors of their own for it
        if not is_disk_full(error):
            raise
        left, (limit, _) = f"{shutil.disk_usage(where).free:,} are free", resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY:
            left += f", and a file may hold {limit:,} (ulimit -f)"
        what = f"no room for {what}: it takes {size:,} bytes, {left}"
        raise ResourceError(Problem(what, str(where), fix=fix)) from None


def _opened(path: Path, flags: int) -> TextIO:
    """A lock file; no link is followed."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return open(handle, "r" if flags == os.O_RDONLY else "a+", encoding="utf-8")


def _lock(file: TextIO, where: str) -> None:
    for attempt in range(5):  # another process may only be looking whether it is free
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05 if attempt < 4 else 0)
    else:
        file.seek(0)
        what = f"another run is working there ({file.read().strip() or 'it does not say which'})"
        raise LockedError(Problem(what, where, "output_dir", "wait for it, or choose another"))


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON with a final newline; keys keep their order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
