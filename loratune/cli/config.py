"""`loratune schema` and `loratune explain`: what a config may say."""

from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Assignments, Debug, Json, app
from loratune.codes import Code
from loratune.commands.boundary import boundary, checked_output
from loratune.errors import ConfigError, Problem

_YAML = (".yaml", ".yml")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a config, for editors."""
    with boundary(debug):
        from loratune.config.json_schema import json_schema
        from loratune.console import print_json

        with checked_output():
            print_json(json_schema())


@app.command()
def explain(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="A key, or its beginning; all without it.")] = None,
    config_file: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a key of the config. Its meaning, default and costs, and with CONFIG the value in force and its line."""
    with boundary(debug):
        from loratune.commands.explain import explain, read_config

        if key and key.endswith(_YAML) and not (config_file and config_file.name.endswith(_YAML)):
            config_file, key = Path(key), str(config_file) if config_file else None
        if assignments and config_file is None:
            raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, "only works with a CONFIG", key="--set"))
        with checked_output():
            explain(key, read_config(config_file, assignments) if config_file else None, as_json)
