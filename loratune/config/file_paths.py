"""The paths in a config. Whatever treats them goes through here, so that a key of type `FilePath` is never left out."""

import glob
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from loratune.config.keys import groups
from loratune.config.schema import RunConfig
from loratune.config.section import PATH_FORMAT, Section

OUTPUT = "output_dir"
"""The only key whose path is written to; a run reads what is at the others."""


@cache
def path_keys() -> frozenset[str]:
    """The keys that hold a path, in each of their places: `data.test.path`, also where that is a list of sources."""
    found = [key for group in groups() for key in group.keys]
    return frozenset(
        place
        for key in found
        for place in key.places
        if PATH_FORMAT in (one.get("format") for one in (key.schema, *key.schema.get("anyOf", ())))
    )


def with_paths(config: RunConfig, replacement: Callable[[str, str], str]) -> RunConfig:
    """The config with other paths: `replacement` takes the key and the path of each."""

    def replaced(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(key, item) for item in value]
        if isinstance(value, Section):
            parts = {name: replaced(f"{key}.{name}".lstrip("."), part) for name, part in value}
            return value.model_copy(update={name: part for name, part in parts.items() if part != getattr(value, name)})
        return replacement(key, value) if key in path_keys() and value is not None else value

    result: RunConfig = replaced("", config)
    return result


def paths(config: RunConfig) -> list[tuple[str, str]]:
    """Key and path of each path in the config, in the order of the schema."""
    found = list[tuple[str, str]]()

    def noted(key: str, path: str) -> str:
        found.append((key, path))
        return path

    with_paths(config, noted)
    return found


def input_paths(config_file: Path | None, run: RunConfig) -> tuple[tuple[str, str], ...]:
    """The files and directories on this machine that a run reads, so that it does not write over them.

    Returns:
        The name of each in messages, e.g. `data.train`, and its path; of a glob, the directory that it searches.
    """
    return tuple((name, path) for name, path in _inputs(config_file, run) if os.path.lexists(path))


def _inputs(config_file: Path | None, run: RunConfig) -> Iterator[tuple[str, str]]:
    if config_file is not None:
        yield "the config file", str(config_file)
    for key, named in paths(run):
        path = os.path.expanduser(named)
        if glob.has_magic(path) and not os.path.lexists(path):
            path = str(next(parent for parent in Path(path).parents if not glob.has_magic(str(parent))))
        if key != OUTPUT:
            yield key.removesuffix(".path"), path
