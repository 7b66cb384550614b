"""The output directory of a command that reads an adapter: written as a temporary sibling, published whole or not at
all.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loratune.system.directories import EXPORT
from loratune.system.files import check_free_space, explain_full_disk
from loratune.system.output_dir import OutputDirectory


def check(named: Path, *, overwrite: bool, inputs: Mapping[str, Path]) -> OutputDirectory:
    """Check that a directory may be written. Nothing is changed.

    Args:
        named: The directory as the user named it.
        overwrite: Whether an earlier export there may be replaced.
        inputs: What the command reads, by option. None of it is ever replaced.

    Raises:
        ConfigError, LockedError, ResourceError: See `OutputDirectory.check`.
    """
    read = [(name, str(path)) for name, path in inputs.items()]
    return OutputDirectory.at(str(named), overwrite=overwrite, inputs=read, kind=EXPORT).check()


@contextmanager
def staged(directory: OutputDirectory, size: int, what: str) -> Iterator[Path]:
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
    with directory.locked(), explain_full_disk(what, size, directory.partial, "make room, and start again"):
        directory.prepare()
        check_free_space(directory.partial, size, what, directory.kind.key)
        directory.create_staging()
        yield directory.staging
        directory.publish()
