"""The directory that a command makes from an adapter: put together beside its place, published whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.system.files import check_free_space, contains, explain_full_disk
from loratune.training import output_dir, run_dir
from loratune.training.overwrite import EXPORT
from loratune.training.run_dir import RunDirectory


def check(named: Path, *, overwrite: bool, inputs: Mapping[str, Path]) -> RunDirectory:
    """Check that a directory may be written. Nothing is changed.

    Args:
        named: The directory as the user named it.
        overwrite: Whether an earlier export there may be replaced.
        inputs: What the command reads, by option. None of it is ever replaced.

    Raises:
        ConfigError, LockedError, ResourceError: See `output_dir.check`.
    """
    place = named.expanduser()
    for name, path in inputs.items():
        if path.is_dir() and contains(path, place):
            what, fix = f"is, or lies in, what the command reads ({name}: {path})", "choose another directory"
            raise ConfigError(Problem(Code.EXPORT_INSIDE_INPUT, what, str(named), EXPORT.key, fix))
    read = [(name, str(path)) for name, path in inputs.items()]
    return output_dir.check(str(named), overwrite=overwrite, inputs=read, kind=EXPORT)


@contextmanager
def staged(directory: RunDirectory, size: int, what: str) -> Iterator[Path]:
    """A new directory beside the output. It takes the output's place at the end, unless there is an error.

    Whatever it holds is removed on an error. A killed process leaves it, and the next one removes it.

    Args:
        directory: The output, see `check`.
        size: About how many bytes will be written.
        what: What is written, for a message about a full disk.

    Raises:
        ConfigError, LockedError: Something has come to the output in the meantime; another process writes there.
        ResourceError: The disk is too small, or full.
    """
    fix = "make room, and start again"
    with run_dir.locked(directory), explain_full_disk(what, size, directory.partial, fix):
        directory.prepare(resume=False)
        check_free_space(directory.partial, size, what, directory.kind.key)
        directory.create_staging()
        yield directory.staging
        directory.publish()
