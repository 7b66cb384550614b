"""`loratune push`: what hands an adapter to others."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Debug, Json, app, check_paths, importing
from loratune.cli.boundary import boundary, checked_output, stop_error


@app.command()
def push(
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub.")],
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="USER/MODEL", help="The name of the base on the hub, if it was trained from a local path."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload an adapter to the hub. The upload is one commit without local paths, and is verified."""
    with boundary(debug):
        check_paths(adapter=adapter)
        with importing():
            from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # exported lazily

            from loratune.cli import printing
            from loratune.commands.push import push

        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            upload = push(adapter, repository, public=public, base=base)
        except KeyboardInterrupt as stop:
            fix = "the repository holds the whole adapter or nothing of it; the same command completes it"
            raise stop_error(stop, fix) from None
        with checked_output():
            printing.print_upload(upload, as_json)
