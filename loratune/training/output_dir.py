"""Whether a run may write to an output directory, checked before anything is read or changed."""

import os
from collections.abc import Callable
from pathlib import Path

from loratune.codes import Code
from loratune.errors import ConfigError, Problem, ResourceError, ResumeError, is_disk_full
from loratune.system.files import contains, hold_lock, is_directory, is_file, open_lock
from loratune.training.overwrite import (
    ADAPTER,
    CONFIG_INPUT,
    START_INPUT,
    Inputs,
    OutputKind,
    check_replaceable,
    check_unused,
)
from loratune.training.run_dir import RunDirectory
from loratune.training.run_dir_files import PUBLISH_WORSE


def check(
    output_dir: str,
    *,
    resume: bool = False,
    overwrite: bool,
    inputs: Inputs = (),
    kind: OutputKind = ADAPTER,
    log: Callable[[str], None] | None = None,
) -> RunDirectory:
    """Check that a run may write to `output_dir`. Nothing is changed.

    Args:
        output_dir: As the user named it.
        resume: Whether an interrupted run is to be continued.
        overwrite: Whether what is there may be replaced.
        inputs: What the run reads.
        kind: What is to be written there.
        log: Of a command that writes nothing: takes a line where an earlier run is in the way, which is no error then.

    Raises:
        ConfigError: The directory exists, is a file, a link or a mount point, or cannot be written; its parent is
            missing; an unfinished run is there; it may not be replaced, see `overwrite.check_replaceable`.
        ResumeError: `resume` where no run was interrupted; see `RunDirectory.check_kinds`.
        LockedError: Another run is working there.
        ResourceError: The disk is full.
    """
    output = Path(os.path.abspath(Path(output_dir).expanduser()))
    if not output.name:
        raise _refused(
            kind, Code.RUN_OUTPUT_IS_ROOT, "is the root of the file system", output_dir, "name a directory in it"
        )
    try:
        partial = output.with_name(f"{output.name}.{kind.unfinished}")
        directory = RunDirectory(output, partial, str(output_dir), overwrite, inputs, kind)
        if is_directory(partial) and is_file(directory.lock):
            with open_lock(directory.lock, os.O_RDONLY) as file:
                hold_lock(file, directory.display_name, kind.key)
        _check_places(directory, resume=resume)
        try:
            _check_state(directory, resume=resume)
        except ConfigError as error:
            if log is None or overwrite:
                raise
            log(f"training will be refused: {error}")
    except OSError as error:
        what = f"cannot be looked at: {error.strerror}"
        raise _refused(kind, Code.RUN_OUTPUT_UNREADABLE, what, str(output_dir), "check the path") from None
    _check_writable(directory)
    return directory


def _refused(kind: OutputKind, code: Code, what: str, where: str, fix: str) -> ConfigError:
    return ConfigError(Problem(code, what, where, kind.key, fix))


def _check_places(directory: RunDirectory, *, resume: bool) -> None:
    """Check what kinds of things are at the places of a run."""
    output, partial, where = directory.output, directory.partial, directory.display_name
    if output.is_symlink() and output.is_dir():
        fix = f"name {os.path.realpath(output)} instead"
        raise _refused(directory.kind, Code.RUN_OUTPUT_IS_LINK, "is a symbolic link, which is not followed", where, fix)
    if os.path.lexists(output) and not output.is_dir():
        raise _refused(
            directory.kind, Code.RUN_OUTPUT_IS_FILE, "is a file", where, "name a directory that does not exist yet"
        )
    if not output.parent.is_dir():
        what = f"its parent {output.parent} is not a directory"
        raise _refused(directory.kind, Code.RUN_OUTPUT_NO_PARENT, what, where, "create it first")
    directory.check_partial(f"{partial.name}, where work in progress is kept, ", where)
    if resume and not partial.is_dir():
        fix = "start one without --resume"
        raise ResumeError(Problem(Code.RESUME_NO_RUN, "there is no interrupted run to resume", where, fix=fix))
    directory.check_kinds()
    for name, read in directory.inputs:
        if name == START_INPUT and os.path.isdir(read) and contains(Path(read), output):
            what, fix = f"lies in the adapter that the run starts from ({name}: {read})", "choose another directory"
            raise _refused(directory.kind, Code.RUN_OVERWRITE_INPUT, what, where, fix)
    for path in (output, partial):
        if path.exists():
            check_unused(path, where if path == output else str(partial), directory.inputs, directory.kind)


def _check_state(directory: RunDirectory, *, resume: bool) -> None:
    """Check that the user wants to replace, or to resume, what earlier runs left."""
    output, partial, where = directory.output, directory.partial.name, directory.display_name
    if output.exists() and not directory.overwrite and not (resume and directory.overwrite_mark.exists()):
        inputs = directory.inputs
        inside = any(name == CONFIG_INPUT and contains(output, Path(path)) for name, path in inputs)
        fix = f"choose another{' with --set output_dir=NEW' if inside else ''}, or replace it with --overwrite"
        if directory.has_checkpoints():
            fix = f"if it is the adapter you want, remove {partial}; to train again and replace both, use --overwrite"
        raise _refused(directory.kind, Code.RUN_OUTPUT_EXISTS, "already exists", where, fix)
    if output.exists():
        check_replaceable(output, where, directory.inputs, output=directory.kind)
    if not directory.has_checkpoints() or resume or directory.overwrite:
        return
    fix = "start afresh with --overwrite"
    if not directory.is_resumable():
        what = f"{partial} holds files of an interrupted run, but no whole checkpoint"
        raise _refused(directory.kind, Code.RUN_LEFTOVERS, what, where, fix)
    if directory.rejected_adapter() is not None:
        what = f"{partial} holds a finished run whose adapter does worse than its base"
        fix = f"{PUBLISH_WORSE}, or {fix} and a lower training.learning_rate"
        raise _refused(directory.kind, Code.TRAINING_WORSE_THAN_BASE, what, where, fix)
    what = f"{partial} holds an interrupted run"
    raise _refused(directory.kind, Code.RUN_INTERRUPTED, what, where, f"continue it with --resume, or {fix}")


def _check_writable(directory: RunDirectory) -> None:
    probe = directory.output.with_name(f".{directory.output.name}.{os.getpid()}.probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        where = directory.display_name
        if is_disk_full(error):
            problem = Problem(Code.SYSTEM_DISK_FULL, "the disk is full", where, directory.kind.key, "make room")
            raise ResourceError(problem) from None
        what = f"cannot be written: {error.strerror}"
        raise _refused(
            directory.kind, Code.RUN_OUTPUT_NOT_WRITABLE, what, where, "choose another, or change permissions"
        ) from None
