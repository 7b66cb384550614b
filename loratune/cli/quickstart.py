"""The command `quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Debug, Json, Verbose, app, check_paths, program, show
from loratune.cli.boundary import boundary
from loratune.events import Event, FinishedEvent, listener


@app.command()
def quickstart(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where config, rows, model and adapter go; it may exist.")
    ] = Path("quickstart"),
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME_OR_DIR", help="Another base, in place of the one that is downloaded."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again, and replace the adapter of an earlier time.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a small model, train a first adapter, and compare both."""
    with boundary(debug, verbose=verbose):
        check_paths(directory=directory, model=model)

        import loratune

        terminal = listener()

        def listen(event: Event) -> None:
            from loratune.cli import display

            terminal(event)
            if isinstance(event, FinishedEvent):
                match event.result:
                    case loratune.PublishedAdapter() if not as_json:
                        show(display.trained(event.result, program()), None)
                    case loratune.Quickstart():
                        show(display.quickstart(event.result, program()), event.result.to_dict())

        loratune.quickstart(directory, model=model, overwrite=overwrite, on_event=listen)
