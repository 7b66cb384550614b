"""The files and directories that a run reads, so that it does not write over them."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from loratune.config.schema import RunConfig


def inputs(config_file: Path, run: RunConfig) -> tuple[tuple[str, str], ...]:
    """What is on this machine of all that a run reads: how it is named, and its path."""
    return tuple((name, path) for name, path in _named(config_file, run) if os.path.lexists(path))


def _named(config_file: Path, run: RunConfig) -> Iterator[tuple[str, str]]:
    yield "the config file", str(config_file)
    yield "model.name_or_path", os.path.expanduser(run.model.name_or_path)
    if run.data.chat_template is not None:
        yield "data.chat_template", os.path.expanduser(run.data.chat_template)
    for key, sources in (("data.train", run.data.train_sources), ("data.validation", run.data.validation_sources)):
        yield from ((key, _searched(os.path.expanduser(source.path))) for source in sources)


def _searched(path: str) -> str:
    """The path, or of a glob the directory that it searches."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return path
    return str(next(parent for parent in Path(path).parents if not glob.has_magic(str(parent))))
