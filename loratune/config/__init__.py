"""The configuration of a run: read from YAML, validated once, frozen. Imports no torch."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from loratune.config import yaml_reader
from loratune.config.messages import translate
from loratune.config.portability import portability
from loratune.config.schema import DataSection, LoraSection, ModelSection, RunConfig, Source, TrainingSection
from loratune.errors import ConfigError

__all__ = [
    "DataSection",
    "LoraSection",
    "ModelSection",
    "RunConfig",
    "Source",
    "TrainingSection",
    "dump",
    "for_model",
    "input_paths",
    "load",
    "portability",
]


def load(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply `section.key=value` assignments over it, and validate the whole.

    Raises ConfigError with every problem of the file.
    """
    return _validate(yaml_reader.read(path), assignments)


def for_model(name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """The default config for a model, with assignments over it, for what needs no rows. Raises ConfigError."""
    values = {"model": {"name_or_path": name_or_path}, "data": {"train": "rows"}, "output_dir": "adapter"}
    return _validate(yaml_reader.Document("--model", values), assignments)


def _validate(document: yaml_reader.Document, assignments: Sequence[str]) -> RunConfig:
    for assignment in assignments:
        yaml_reader.override(document, assignment)
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(translate(error, document)) from None


def input_paths(config_file: Path, run: RunConfig) -> tuple[tuple[str, str], ...]:
    """The files and directories on this machine that a run reads, so that it does not write over them.

    Returns:
        The name of each in messages, e.g. `data.train`, and its path; of a glob, the directory that it searches.
    """
    return tuple((name, path) for name, path in _inputs(config_file, run) if os.path.lexists(path))


def _inputs(config_file: Path, run: RunConfig) -> Iterator[tuple[str, str]]:
    yield "the config file", str(config_file)
    yield "model.name_or_path", os.path.expanduser(run.model.name_or_path)
    if run.data.chat_template is not None:
        yield "data.chat_template", os.path.expanduser(run.data.chat_template)
    for key, sources in (("data.train", run.data.train_sources), ("data.validation", run.data.validation_sources)):
        for source in sources:
            path = os.path.expanduser(source.path)
            if glob.has_magic(path) and not os.path.lexists(path):
                path = str(next(parent for parent in Path(path).parents if not glob.has_magic(str(parent))))
            yield key, path


def dump(config: RunConfig) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.dump(config.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that our reader would not read as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and yaml_reader.reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Dumper.add_representer(str, _text)
