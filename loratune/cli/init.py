"""`loratune init`: from rows and a model's name to a config."""

from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Assignments, Debug, app, check_paths, importing, program
from loratune.commands.boundary import boundary, checked_output

STDOUT = "-"


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Rows: a file, a directory, a glob, or a hub id.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME_OR_DIR", help="The base model.")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The config, which must not exist yet; - for stdout.")
    ] = "config.yaml",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    debug: Debug = False,
) -> None:
    """Write a config for rows and a model, with its reasons. No weights are loaded or downloaded."""
    with boundary(debug):
        check_paths(DATA=data, model=model, output=output)

        from loratune import config
        from loratune.commands import output_file

        file = output_file.output(Path(output), "--output", overwrite=None) if output != STDOUT else None

        with importing(computes=True):
            from loratune.console import log, show_progress
            from loratune.data.sources import open_source
            from loratune.data.sources.local import data_ending
            from loratune.model.source import is_directory

        from loratune.commands.init_start import SOURCE, checked, first_values
        from loratune.training import output_dir

        if file is not None and data_ending(file.path):
            file = file.reading(Path(data).expanduser())  # It would be read as rows itself.
        draft = config.draft(first_values(data, model, log), SOURCE, assignments)
        run = checked(draft)
        output_dir.check(run.output_dir, overwrite=True, inputs=config.input_paths(Path(output), run))
        for source in run.data.train_sources:
            open_source(source)
        base = run.model
        is_directory(base.name_or_path, base.revision, base.gguf_file, trusted=base.trust_remote_code)

        with importing():
            from loratune.commands import printing
            from loratune.commands.init import init

        started = init(run, draft, show_progress, log)
        if file is None:
            print(started.text, end="")
        else:
            with file.opened(log) as writable:
                writable.write(started.text)
        is_piped = file is None or file.handle is not None or not file.path.is_file()
        with checked_output():
            printing.print_started(started, output, program(), to_stderr=is_piped)
