"""`loratune schema` and `loratune explain`: what a config may say."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import Assignments, Debug, Json, app
from loratune.cli.boundary import boundary, checked_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from loratune.commands.explain import ExplainedConfig
    from loratune.config.keys import Key, KeyGroup

_YAML = (".yaml", ".yml")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a config, for editors."""
    with boundary(debug):
        from loratune.config.keys import json_schema
        from loratune.console import print_json

        with checked_output():
            print_json(json_schema())


@app.command()
def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, a section, or the start of a key; by default all keys.")
    ] = None,
    config_file: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a key of the config. Prints its meaning, default and cost; with CONFIG, also its value and line."""
    with boundary(debug):
        from loratune.commands.explain import ExplainedConfig, as_json, find_keys
        from loratune.console import print_json

        if key and key.endswith(_YAML) and not (config_file and config_file.name.endswith(_YAML)):
            config_file, key = Path(key), str(config_file) if config_file else None
        if assignments and config_file is None:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with a CONFIG", key="--set"))
        with checked_output():
            config = ExplainedConfig.read(config_file, assignments) if config_file else None
            found = find_keys(key)
            if json:
                print_json(as_json(found, config))
            else:
                _print_found(found, config)


def _print_found(found: "list[KeyGroup | Key]", config: "ExplainedConfig | None") -> None:
    """A block for each key, and one for each section with a line for each of its keys."""
    from loratune.config.keys import KeyGroup
    from loratune.console import print_block

    for number, item in enumerate(found):
        if number:
            print()
        if not isinstance(item, KeyGroup):
            print_block(", ".join(item.places), _key_lines(item, config))
        elif lines := [*_group_lines(item, config)]:
            title = item.name or "Outside the sections"
            width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize
            room = width - max(len(label) for label, _ in lines) - 4
            shown = [(label, text if len(text) <= room else f"{text[: room - 1]}…") for label, text in lines]
            print_block(f"{title}: {item.description}" if item.description else title, shown)


def _key_lines(key: "Key", config: "ExplainedConfig | None") -> Iterator[tuple[str, str]]:
    yield "meaning", key.meaning
    yield "type", key.kind
    yield "default", key.default
    yield "memory and time", key.costs
    if key.other_names:
        yield "elsewhere called", ", ".join(key.other_names)
    settings = config.settings(key) if config else []
    for setting in settings:
        place = "" if setting.key in key.places and len(settings) == 1 else f"{setting.key}: "
        yield "in force", f"{place}{setting}"
    if config and not settings:
        yield "in force", "nothing, as the config has no such entry"


def _group_lines(group: "KeyGroup", config: "ExplainedConfig | None") -> Iterator[tuple[str, str]]:
    """For each key, its meaning or the value in force."""
    for key in group.keys:
        if config is None:
            yield key.label if group.is_section else key.name, key.meaning
        else:
            yield from ((setting.key, str(setting)) for setting in config.settings(key))
