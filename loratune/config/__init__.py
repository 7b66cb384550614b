"""The configuration of a run: read from YAML, validated once, frozen. This package does not import torch."""

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from loratune.codes import Code
from loratune.config import yaml_files
from loratune.config.keys import REMOVED, KeyPath, dotted, groups, known_keys, nearest_name, suggestion
from loratune.config.portability import has_one_scale as has_one_scale
from loratune.config.portability import highest_rank as highest_rank
from loratune.config.portability import is_plain as is_plain
from loratune.config.portability import portability as portability
from loratune.config.schema import DEFAULT_BETA as DEFAULT_BETA
from loratune.config.schema import PREFERENCE_KEYS as PREFERENCE_KEYS
from loratune.config.schema import ModelSection as ModelSection
from loratune.config.schema import PreferenceSection as PreferenceSection
from loratune.config.schema import RetentionSection as RetentionSection
from loratune.config.schema import RunConfig as RunConfig
from loratune.config.schema import TrainingSection as TrainingSection
from loratune.config.sections import AUTO as AUTO
from loratune.config.sections import PATH_FORMAT, InvalidSettingError, Section
from loratune.config.sections import DataSection as DataSection
from loratune.config.sections import LoraSection as LoraSection
from loratune.config.sections import Source as Source
from loratune.config.sections import decided as decided
from loratune.config.yaml_files import MAX_PROBLEMS, Document, dump_values, first_problems, kind_of
from loratune.config.yaml_files import Draft as Draft
from loratune.errors import ConfigError, Problem


def load(path: Path, assignments: Sequence[str] = (), *, finished: bool = False) -> RunConfig:
    """Read a config file, apply `section.key=value` assignments, and validate the result.

    Args:
        path: The file.
        assignments: The assignments.
        finished: Whether it is that of a finished run, whose result has the effect of removed keys already.

    Raises ConfigError with every problem of the file.
    """
    return load_with_lines(path, assignments, finished=finished)[0]


def load_with_lines(
    path: Path, assignments: Sequence[str] = (), *, finished: bool = False
) -> tuple[RunConfig, yaml_files.Document]:
    """As `load`; also returns the values as written, and the line of each."""
    document = yaml_files.read(path)
    if finished:
        document.values = _without_removed(document.values, finished=True)
    yaml_files.override(document, assignments)
    return _validated(document), document


def for_model(name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """The default config for a model, with assignments applied, for uses without rows. Raises ConfigError."""
    values = {"model": {"name_or_path": name_or_path}, "data": {"train": "rows"}, "output_dir": "adapter"}
    return from_values(values, "`model=...`", assignments)


def from_values(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Validate plain values, with assignments applied in place. source: the file name in messages.

    Raises ConfigError.
    """
    return from_draft(draft(values, source, assignments))


def draft(values: dict[str, Any], source: str, assignments: Sequence[str] = ()) -> Draft:
    """A config that may be incomplete, and is not validated yet. Args as for `from_values`."""
    document = yaml_files.Document(source, values)
    yaml_files.override(document, assignments)
    return Draft(document)


def from_draft(draft: Draft) -> RunConfig:
    """Validate a draft. Raises ConfigError."""
    return _validated(draft.document)


def parse(text: str, source: str) -> RunConfig:
    """Validate YAML text. source: the file name in messages. Raises ConfigError."""
    return _validated(yaml_files.parse(text, source))


def _validated(document: yaml_files.Document) -> RunConfig:
    document.values = _without_removed(document.values)
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(translate(error, document)) from None


def _without_removed(values: Mapping[str, Any], *, finished: bool = False) -> dict[str, Any]:
    """The values without the keys of `REMOVED` that had no effect. finished: without all keys of `REMOVED`."""
    kept = dict(values)
    for place, (neutral, _) in REMOVED.items():
        section, _, key = place.rpartition(".")
        if isinstance(inner := kept.get(section), Mapping) and key in inner and (finished or inner[key] == neutral):
            kept[section] = {name: value for name, value in inner.items() if name != key}
    return kept


def dump(config: RunConfig) -> str:
    """The resolved config as YAML text, from which `load` restores an equal config."""
    return dump_values(config.resolved())


def read_earlier(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved values of a config recorded by an earlier release, as this release would have written them.

    Keys added in later releases have their defaults.

    Returns:
        The values; and `section.key` → value for keys that this release does not know.
    """
    values = _without_removed(values)
    try:
        return RunConfig.model_validate(values).resolved(), {}
    except ValidationError as error:
        details = [one for one in error.errors() if one["type"] == "extra_forbidden"]
        unknown = {dotted(key_path(one)): one["input"] for one in details}
    try:
        return RunConfig.model_validate(values, extra="ignore").resolved(), unknown
    except ValidationError:  # Values that were valid in the earlier release are now invalid.
        return dict(values), unknown


OUTPUT = "output_dir"
"""The only key whose path is written to; all other paths are inputs of a run."""


@cache
def path_keys() -> frozenset[str]:
    """The keys that hold a path, in each of their places: `data.test.path`, also for entries of a list of sources."""
    found = [key for group in groups() for key in group.keys]
    return frozenset(
        place
        for key in found
        for place in key.places
        if PATH_FORMAT in (one.get("format") for one in (key.schema, *key.schema.get("anyOf", ())))
    )


def with_paths(config: RunConfig, replacement: Callable[[str, str], str]) -> RunConfig:
    """The config with its paths replaced. replacement: function of key and path that returns the new path."""

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


def input_paths(config_file: Path | None, config: RunConfig) -> tuple[tuple[str, str], ...]:
    """The existing local files and directories that a run reads, which must not be overwritten.

    Returns:
        The name of each in messages, e.g. `data.train`, and its path; for a glob, the directory that it searches.
    """
    found = [("the config file", str(config_file))] if config_file is not None else []
    for key, named in paths(config):
        path = os.path.expanduser(named)
        if glob.has_magic(path) and not os.path.lexists(path):
            path = str(next(parent for parent in Path(path).parents if not glob.has_magic(str(parent))))
        if key != OUTPUT:
            found.append((key.removesuffix(".path"), path))
    return tuple((name, path) for name, path in found if os.path.lexists(path))


def files_read(config: RunConfig) -> Iterator[tuple[str, str]]:
    """As `input_paths`, of a run whose adapter a command reads: with the files of a directory or glob of rows, beside
    which outputs may be written."""
    for key, named in paths(config):
        path = os.path.expanduser(named)
        found = glob.iglob(path, recursive=True) if glob.has_magic(path) and not os.path.lexists(path) else [path]
        if key.startswith(("data.", "retention.")) and os.path.isdir(path) and os.access(path, os.R_OK):
            found = (entry.path for entry in os.scandir(path) if entry.is_file())
        if key != OUTPUT:
            yield from ((key.removesuffix(".path"), one) for one in found if os.path.lexists(one))


# Errors of pydantic

_FIRST_KEYS = {"model": "name_or_path", "data": "train"}
"""Section → the key to which its value belongs where a text stands in place of the section."""
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section",
    "model_attributes_type": "a section",
}


def translate(error: ValidationError, document: Document) -> list[Problem]:
    """One problem for each error of pydantic, in the order of the keys; the alternatives of a union count as one."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors():
        groups.setdefault(key_path(details), []).append(details)
    groups = _without_alternatives(groups)
    problems = [_problem(path, group, document) for path, group in [*groups.items()][:MAX_PROBLEMS]]
    return first_problems(problems, len(groups))


def key_path(details: ErrorDetails) -> KeyPath:
    """The keys of an error's location, without pydantic's names for the alternatives of a union."""
    alternatives = {"str", "int", "float", "bool", "constrained-int", "constrained-float", "Source"}
    location = details["loc"]
    own = location[-1:] if details["type"] == "extra_forbidden" else ()  # a key of the user, which is always kept
    above = location[: len(location) - len(own)]
    return (*(part for part in above if isinstance(part, int) or not (part in alternatives or "[" in part)), *own)


def _without_alternatives(groups: dict[KeyPath, list[ErrorDetails]]) -> dict[KeyPath, list[ErrorDetails]]:
    """Drop an error like `a: not a number` if one like `a.b: unknown key` explains the intended alternative."""
    parents = {path[:end] for path in groups for end in range(1, len(path))}
    return {
        path: group
        for path, group in groups.items()
        if path not in parents or not all(details["type"] in _EXPECTED for details in group)
    }


def _problem(path: KeyPath, group: list[ErrorDetails], document: Document) -> Problem:
    details = next((details for details in group if details["type"] not in _EXPECTED), group[0])
    where, key, value = document.where(path), dotted(path), f"got {kind_of(details['input'])}"
    kind, error = details["type"], details.get("ctx", {}).get("error")
    if group[0]["type"] == "extra_forbidden":
        what = "this key was removed" if key in REMOVED else "unknown key"
        empty = [name for name, value in document.values.items() if value is None and (name, *path) in known_keys()]
        fix = f"indent it under `{empty[0]}:`" if empty else suggestion(path)
        return Problem(Code.CONFIG_UNKNOWN_KEY, what, where, key, fix)
    if group[0]["type"] == "missing":
        return Problem(Code.CONFIG_MISSING_KEY, "missing", where, key, "this key has no default")
    if isinstance(error, InvalidSettingError) and error.keys:
        paths = [(*path, *name.split(".")) for name in error.keys]
        return Problem(error.code, str(error), document.where(paths[0]), " and ".join(map(dotted, paths)), error.fix)
    fix = ""
    if kind in _EXPECTED or kind == "literal_error":
        what, fix = _expectation(group)
        given = group[0]["input"]
        if isinstance(given, str) and (first := _FIRST_KEYS.get(key)) is not None:
            fix = f"write `{key}:`, and below it, indented, `{first}: {given}`"
        elif isinstance(given, str) and yaml_files.number(given.replace(",", ".")) is not None:
            fix = f"write {given.replace(',', '.')}, with a point"
    elif kind.endswith("too_short"):
        return Problem(Code.CONFIG_BAD_VALUE, "must not be empty", where, key)
    else:
        what = details["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    return Problem(Code.CONFIG_BAD_VALUE, f"{what}, {value}", where, key, fix)


def _expectation(group: list[ErrorDetails]) -> tuple[str, str]:
    """The types or choices that a value may have, and as a question the most similar choice."""
    literals = [each for each in group if each["type"] == "literal_error"]
    named = literals if any(each["ctx"]["expected"] != "'auto'" for each in literals) else group
    expected = [_EXPECTED.get(each["type"]) or each["ctx"]["expected"] for each in named]
    choices = [part.strip("'") for text in expected for part in text.replace(" or ", ", ").split(", ")]
    given = group[0]["input"]
    near = nearest_name(str(given).strip().lower(), choices) if literals and given not in (None, "") else ""
    return f"expected {' or '.join(dict.fromkeys(expected))}", f"did you mean `{near}`?" if near else ""
