"""`loratune report`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Assignments, Debug, Force, app, check_paths, importing
from loratune.codes import Code
from loratune.commands.boundary import boundary
from loratune.errors import ConfigError, Problem


@app.command()
def report(
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Another adapter, shown beside it.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows to score; without them, no base is loaded."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page; by default ADAPTER-report.html here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Show an adapter and its run as one HTML page that needs no network."""
    with boundary(debug, memory_fix="free memory, or shorten the rows with --set data.max_length"):
        check_paths(adapter=adapter, against=against, data=data, output=output)
        if find_spec("matplotlib") is None:
            what, fix = (
                "the package matplotlib, which draws the charts, is not installed",
                "pip install 'loratune[report]'",
            )
            raise ConfigError(Problem(Code.REPORT_NO_MATPLOTLIB, what, fix=fix))
        if assignments and data is None:
            raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, "only works with --data", key="--set"))

        from loratune.commands import output_file

        target = output or Path(f"{adapter.resolve().name}-report.html")
        inputs = [Path(path) for path in (adapter, against, data) if path is not None]
        file = output_file.output(target, "--output", overwrite=overwrite, inputs=inputs)

        with importing():
            from loratune.commands.report import report
            from loratune.console import log
            from loratune.training import preflight

        opened, notes = [], []
        for path, own in ((adapter, assignments), (against, [])):
            if path is not None:
                lines: list[str] = []
                opened.append(preflight.open_adapter(path, lines.append, forced=force or data is None, assignments=own))
                notes.append(lines)
        for line in (line for lines in notes for line in lines):
            log(line)
        text = report(opened, notes, None, data)
        with file.opened(log) as writable:
            writable.write(text)
        if file.handle is None:
            print(target)
