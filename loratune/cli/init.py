"""`loratune init`: from rows and a model's name to a config."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import STDOUT, Assignments, Debug, app, check_paths, importing, program
from loratune.cli.boundary import boundary, checked_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from loratune.config import ModelSection


@app.command()
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="The training rows: a file, a directory, a glob, or a hub id.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME_OR_DIR", help="The base model.")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The config to write, which must not exist; - is stdout.")
    ] = "config.yaml",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    debug: Debug = False,
) -> None:
    """Write a config for rows and a model, with reasons. No weights are loaded or downloaded."""
    with boundary(debug):
        check_paths(DATA=data, model=model, output=output)
        _check_named_once(assignments)

        from loratune import config
        from loratune.system import output_file

        file = output_file.output(Path(output), "--output", overwrite=None) if output != STDOUT else None

        with importing(computes=True):
            from loratune.data.sources import open_source
            from loratune.data.sources.files import data_ending

        from loratune.commands.init_start import SOURCE, checked, first_values
        from loratune.training.checkpoints import run_dir

        if file is not None and data_ending(file.path):
            file = file.reading(Path(data).expanduser())  # It would be read as rows itself.
        draft = config.draft(first_values(data, model), SOURCE, assignments)
        run = checked(draft)
        run_dir.check(run.output_dir, overwrite=True, inputs=config.input_paths(Path(output), run))
        for source in run.data.train_sources:
            open_source(source)
        _find_model(run.model)

        with importing():
            from loratune.cli import printing
            from loratune.commands.init import init

        started = init(run, draft)
        if file is None:
            print(started.text, end="")
        else:
            with file.opened() as writable:
                writable.write(started.text)
        is_piped = file is None or file.handle is not None or not file.path.is_file()
        with checked_output():
            printing.print_started(started, output, program(), to_stderr=is_piped)


def _check_named_once(assignments: list[str]) -> None:
    """Raises ConfigError: rows or model are named by `--set` too."""
    given = {"data.train": "DATA", "model.name_or_path": "--model"}
    for key in (assignment.partition("=")[0].strip() for assignment in assignments):
        if key in given:
            what = f"is also given by {given[key]}"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, "--set", key, "name it once"))


def _find_model(section: "ModelSection") -> None:
    """Raises ModelError: there is no such model."""
    from loratune.model.source import is_directory

    is_directory(section.name_or_path, section.revision, section.gguf_file, trusted=section.trust_remote_code)
