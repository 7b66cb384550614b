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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loratune.errors import ConfigError, LockedError, Problem, ResourceError, ResumeError, is_disk_full


@dataclass(frozen=True)
class Workspace:
    """Where a run works and where its result goes. output and partial are siblings on one file system.

    overwrite: the user lets what is at `output`, and the work of an interrupted run, be replaced; named: as the user
    named the output.
    """

    output: Path
    partial: Path
    named: str
    overwrite: bool = False

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
    def lock(self) -> Path:
        """A file that the run holds a lock on, which ends with its process, and that names it."""
        return self.partial / "lock"

    @property
    def ours(self) -> bool:
        """Whether nothing but a run's own work is in `partial`."""
        own = {path.name for path in (self.checkpoints, self.staging, self.replaced, self.may_replace, self.lock)}
        return self.partial.is_dir() and {path.name for path in self.partial.iterdir()} <= own

    def has_checkpoints(self) -> bool:
        """Whether there is anything that a later `--resume` could go on from."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def leave(self) -> None:
        """Remove the work in progress, if nothing could go on from it; and what was not published in any case."""
        shutil.rmtree(self.staging, ignore_errors=True)
        if self.partial.exists() and not self.has_checkpoints():
            shutil.rmtree(self.partial)

    def forget_checkpoints(self) -> None:
        """Remove what a `--resume` could go on from."""
        shutil.rmtree(self.checkpoints)

    def begin(self, *, resume: bool) -> None:
        """Make room for the work; what an interrupted run left goes, unless it is resumed.

        Raises ConfigError: something has appeared at the output directory.
        """
        for path in self.partial.iterdir():
            if path not in (self.lock, *((self.checkpoints, self.may_replace) if resume else ())):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.overwrite:
            self.may_replace.touch()
        self._check_output()
        self.checkpoints.mkdir(exist_ok=True)
        sync(self.partial)
        sync(self.partial.parent)

    def _check_output(self) -> None:
        if self.output.exists() and not self.may_replace.exists():
            what, fix = "has appeared since the run began, and is left alone", "move it away, and go on with --resume"
            raise ConfigError(Problem(what, str(self.output), "output_dir", fix))

    def publish(self) -> None:
        """Make the staged files durable and move them to the output directory; then clear the work in progress.

        Raises ConfigError: something has appeared there.
        """
        self._check_output()
        umask = os.umask(0)
        os.umask(umask)
        for path in sorted(self.staging.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~umask)
            sync(path)
        sync(self.staging)
        if self.output.exists():
            self.output.rename(self.replaced)
        self.staging.rename(self.output)
        sync(self.output.parent)
        shutil.rmtree(self.partial)


def inspect(output_dir: str, *, resume: bool, overwrite: bool) -> Workspace:
    """Check that a run may write to `output_dir`, leaving everything as it is.

    Raises ConfigError: it exists, is a file, cannot be written, its parent is missing, or an unfinished run is there.
    Raises ResumeError: `resume` where no run was interrupted. Raises LockedError: another run is working there.
    """
    where, key = str(output_dir), "output_dir"
    try:
        space = Workspace(*_siblings(output_dir), where, overwrite)
        if space.lock.is_file():
            with space.lock.open(encoding="utf-8") as file:
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
    if os.path.lexists(output) and not output.is_dir():
        raise ConfigError(Problem("is a file", where, key, "name a directory that does not exist yet"))
    if not output.parent.is_dir():
        raise ConfigError(Problem(f"its parent {output.parent} is no directory", where, key, "create it first"))
    if os.path.lexists(partial) and not space.ours:
        what = f"{partial.name}, the place of work in progress, holds something else"
        raise ConfigError(Problem(what, where, key, "move that away"))
    if resume and not partial.is_dir():
        raise ResumeError(Problem("no interrupted run to resume", where, fix="leave out --resume to start one"))
    if output.exists() and not overwrite and not (resume and space.may_replace.exists()):
        fix = "choose another, or replace it with --overwrite"
        if space.has_checkpoints():
            fix = f"if it is what you want, the run had ended: remove {partial.name}; or replace both with --overwrite"
        raise ConfigError(Problem("already exists", where, key, fix))
    if output.exists() and any(output.iterdir()) and not (output / "adapter_config.json").is_file():
        raise ConfigError(Problem("holds no adapter, so --overwrite leaves it alone", where, key, "choose another"))
    if space.has_checkpoints() and not (resume or overwrite):
        fix = "continue it with --resume, or start afresh with --overwrite"
        raise ConfigError(Problem(f"{partial.name} holds an interrupted run", where, key, fix))


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
    with _locked(space, str(space.output)):
        if space.replaced.exists() and not space.output.exists():
            space.replaced.rename(space.output)  # the last run was killed between the two renames of `publish`
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
            file = stack.enter_context(space.lock.open("a+", encoding="utf-8"))
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
