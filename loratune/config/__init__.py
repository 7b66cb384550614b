"""The configuration of a run: read from YAML, validated once, frozen. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from loratune.config import yaml_reader
from loratune.config.inputs import inputs
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
    "inputs",
    "load",
    "of_model",
    "portability",
]


def load(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply `section.key=value` assignments over it, and validate the whole.

    Raises ConfigError with every problem found.
    """
    return _validated(yaml_reader.read(path), assignments)


def _validated(document: yaml_reader.Document, assignments: Sequence[str]) -> RunConfig:
    for assignment in assignments:
        yaml_reader.override(document, assignment)
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(translate(error, document)) from None


def of_model(name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """The defaults of a run on this model, with assignments over them, for what needs no rows. Raises ConfigError."""
    values = {"model": {"name_or_path": name_or_path}, "data": {"train": "rows"}, "output_dir": "adapter"}
    return _validated(yaml_reader.Document("--model", values), assignments)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.dump(config.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that our reader would not read as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and yaml_reader.reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Dumper.add_representer(str, _text)
