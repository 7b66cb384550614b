"""`loratune report`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import DataAssignments, Debug, Force, app, check_paths, importing, log_all
from loratune.cli.boundary import boundary
from loratune.codes import Code
from loratune.errors import ConfigError, Problem, missing_package

if TYPE_CHECKING:
    from loratune.adapter.directory import AdapterDirectory
    from loratune.compare.comparison import Comparison


@app.command()
def report(
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", metavar="DIR", help="The study directory of a sweep, instead of an adapter."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="A second adapter to compare with.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows to score; by default none, and no base is loaded."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The HTML file; by default ./ADAPTER-report.html.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    assignments: DataAssignments = [],  # noqa: B006  typer copies it
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write an HTML page on an adapter and its run, or on a sweep. The file is self-contained."""
    with boundary(debug, memory_fix="free memory, or shorten the rows with --set data.max_length"):
        check_paths(adapter=adapter, study=study, against=against, data=data, output=output)
        _check_subject(adapter, study, against, data)
        if assignments and data is None:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with --data", key="--set"))

        from loratune.system import output_file

        subject = adapter or study
        assert subject is not None
        target = output or Path(f"{subject.resolve().name}-report.html")
        inputs = [Path(path) for path in (subject, against, data) if path is not None]
        file = output_file.output(target, "--output", overwrite=overwrite, inputs=inputs)

        with importing():
            from loratune.adapter.directory import AdapterDirectory
            from loratune.commands.report import report, study_report
            from loratune.events import noted

        adapters: list[tuple[AdapterDirectory, list[str]]] = []
        for path, own in ((adapter, assignments), (against, [])):
            if path is not None:
                forced = force or data is None  # the page lists what was edited
                with noted() as lines:
                    adapters.append((AdapterDirectory.open(path, forced=forced, assignments=own), lines))
        if data is not None:
            file = file.reading(Path(adapters[0][0].base.name_or_path))
        if study is not None:
            text = study_report(study)
        else:
            text = report(adapters, _evaluate([one for one, _ in adapters], data) if data is not None else None, data)
        with file.opened() as writable:
            writable.write(text)
        if file.handle is None:
            print(target)


def _check_subject(adapter: Path | None, study: Path | None, against: Path | None, data: str | None) -> None:
    """Raises ConfigError: not exactly one subject is given, an option does not fit it, or matplotlib is missing."""
    if (adapter is None) == (study is None):
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give exactly one of --adapter and --study"))
    options = {"--against": against, "--data": data}
    if adapter is None and (given := [name for name, value in options.items() if value is not None]):
        raise ConfigError([Problem(Code.USAGE_CONFLICT, "only works with --adapter", key=name) for name in given])
    if find_spec("matplotlib") is None:
        raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "matplotlib", "draws the charts", "report"))


def _evaluate(adapters: "Sequence[AdapterDirectory]", data: str) -> "Comparison":
    """Score the adapters on the rows of a file."""
    with importing():
        from loratune.commands.evaluate import evaluate
        from loratune.compare.answers import Judging
        from loratune.config import Source
        from loratune.data import read_source

    first, *others = adapters
    split, judging = read_source(Source(path=data), first.data), Judging(for_readers=True)
    against = others[0] if others else None
    found = evaluate(first, split, against=against, judging=judging)
    log_all(found.remarks)
    return found
