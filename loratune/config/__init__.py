"""The configuration of a run: read from YAML, validated once, frozen. This package does not import torch."""

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.config import yaml_reader
from loratune.config.data_section import DataSection as DataSection
from loratune.config.data_section import Source as Source
from loratune.config.keys import dotted, groups
from loratune.config.lora_section import LoraSection as LoraSection
from loratune.config.lora_section import has_one_scale as has_one_scale
from loratune.config.lora_section import highest_rank as highest_rank
from loratune.config.lora_section import is_plain as is_plain
from loratune.config.lora_section import portability as portability
from loratune.config.schema import DEFAULT_BETA as DEFAULT_BETA
from loratune.config.schema import PREFERENCE_KEYS as PREFERENCE_KEYS
from loratune.config.schema import ModelSection as ModelSection
from loratune.config.schema import PreferenceSection as PreferenceSection
from loratune.config.schema import RunConfig as RunConfig
from loratune.config.schema import TrainingSection as TrainingSection
from loratune.config.section import AUTO as AUTO
from loratune.config.section import PATH_FORMAT, Section
from loratune.config.section import decided as decided
from loratune.config.yaml_reader import translate
from loratune.config.yaml_writer import Draft as Draft
from loratune.config.yaml_writer import dump_values
from loratune.errors import ConfigError


def load(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply `section.key=value` assignments over it, and validate the whole.

    Raises ConfigError with every problem of the file.
    """
    return load_with_lines(path, assignments)[0]


def load_with_lines(path: Path, assignments: Sequence[str] = ()) -> tuple[RunConfig, yaml_reader.Document]:
    """As `load`; also returns the values as they are written, and the line of each."""
    document = yaml_reader.read(path)
    yaml_reader.override(document, assignments)
    return _validated(document), document


def for_model(name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """The default config for a model, with assignments over it, for what needs no rows. Raises ConfigError."""
    values = {"model": {"name_or_path": name_or_path}, "data": {"train": "rows"}, "output_dir": "adapter"}
    return from_values(values, "--model", assignments)


def from_values(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Validate plain values as those of a file called `source`; assignments are applied to them, and change them.

    Raises ConfigError.
    """
    return from_draft(draft(values, source, assignments))


def draft(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> Draft:
    """A config that is not complete or validated yet; arguments as of `from_values`."""
    document = yaml_reader.Document(source, values)
    yaml_reader.override(document, assignments)
    return Draft(document)


def from_draft(draft: Draft) -> RunConfig:
    """Validate a draft. Raises ConfigError."""
    return _validated(draft.document)


def parse(text: str, source: str) -> RunConfig:
    """Validate YAML text as that of a file called `source`. Raises ConfigError."""
    return _validated(yaml_reader.parse(text, source))


def _validated(document: yaml_reader.Document) -> RunConfig:
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(translate(error, document)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return dump_values(config.resolved())


def read_earlier(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved values of a config that an earlier release recorded, as this release would have written them.

    A key that a later release added has its default.

    Returns:
        The values; and those of keys that this release does not know, by `section.key`.
    """
    try:
        return RunConfig.model_validate(values).resolved(), {}
    except ValidationError as error:
        details = [one for one in error.errors() if one["type"] == "extra_forbidden"]
        unknown = {dotted(yaml_reader.key_path(one)): one["input"] for one in details}
    try:
        return RunConfig.model_validate(values, extra="ignore").resolved(), unknown
    except ValidationError:  # What was valid then is not valid now.
        return dict(values), unknown


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
