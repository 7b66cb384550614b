"""The commands `evaluate` and `report`."""

import glob
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import (
    MAX_COUNT,
    STDOUT,
    AdapterPath,
    DataAssignments,
    Debug,
    Force,
    Json,
    app,
    check_paths,
    needs,
    rows_output,
    show,
    write_rows,
)
from loratune.cli.boundary import boundary, unread_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem, missing_package
from loratune.events import Event, FinishedEvent, listener
from loratune.system.output_file import Output

Against = Annotated[Path | None, typer.Option("--against", metavar="DIR", help="A second adapter to compare with.")]
_MEMORY_FIX = "free memory, or shorten the rows with --set data.max_length"


@app.command()
def evaluate(
    adapter: AdapterPath,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows, in the same format as the training rows."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="lm-evaluation-harness tasks, or YAML files or directories of tasks (their code is executed).",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, max=MAX_COUNT, help="At most N rows of each task.")
    ] = None,
    against: Against = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="exact_match, label, contains, rouge_l, json or regex:PATTERN; repeatable."
        ),
    ] = None,
    forgetting: Annotated[
        str | None,
        typer.Option(
            "--forgetting",
            metavar="FILE",
            help="Measure forgetting on this text, or on `builtin`; and on the base's answers.",
        ),
    ] = None,
    worst: Annotated[
        int,
        typer.Option(
            "--worst", metavar="N", min=0, max=MAX_COUNT, help="Show the N rows with the largest loss increase."
        ),
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write each row, its answers and scores to FILE: CSV if it ends in .csv, else JSONL.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC<BOUND",
            help="Exit code 11 if not met, e.g. 'exact_match>=0.9', 'loss<base', 'TASK.METRIC>base'; repeatable.",
        ),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="With --require: accept rows that are also in train.")
    ] = False,
    scale: Annotated[
        str,
        typer.Option(
            "--adapter-scale",
            metavar="S,...",
            help="Multiply the adapter's update by S; a table for several, as 0.5,0.7,1 or 0:1:0.1.",
        ),
    ] = "1",
    assignments: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compare an adapter with its base on rows, or on tasks."""
    with boundary(debug, memory_fix=_MEMORY_FIX):
        check_paths(adapter=adapter, data=data, against=against, forgetting=forgetting, output=output)
        if data is None and tasks is None:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give --data, --tasks, or both"))
        if str(output) == STDOUT:
            what, fix = "stdout has the metrics", "name a file for the rows"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--output", fix=fix))
        of_data = {"against": against, "metric": metrics, "forgetting": forgetting, "worst": worst, "output": output}
        problems = [] if data else needs(of_data | {"set": assignments}, "--data")
        problems += [] if tasks else needs({"limit": limit}, "--tasks")
        problems += [] if output else needs({"overwrite": overwrite}, "--output")
        problems += [] if require else needs({"allow-overlap": allow_overlap}, "--require")
        if problems:
            raise ConfigError(problems)

        import loratune
        from loratune.api.opened import parse_scales

        if len(scales := parse_scales(scale)) > 1:
            _check_table({"tasks": tasks, "against": against, "require": require, "worst": worst, "output": output})
            loratune.Adapter(adapter, force=force, overrides=assignments).evaluate_scales(
                data, scales, metrics=metrics or [], forgetting=forgetting, on_event=_Shown()
            )
            return
        names, required = tasks.split(",") if tasks is not None else [], require or []
        inputs = [Path(path) for path in (adapter, data, against, forgetting) if path is not None]
        inputs += [Path(f"{glob.escape(name)}/**/*.y*ml" if Path(name).is_dir() else name) for name in names]
        file = rows_output(output, overwrite=overwrite, inputs=inputs)
        opened = loratune.Adapter(adapter, scale=scales[0], force=force, overrides=assignments)
        if data is None:
            opened.run_tasks(names, limit=limit, require=required, on_event=_Shown())
            return
        other = loratune.Adapter(against, force=force) if against is not None else None
        if file is not None:
            file = file.reading(*opened.opened.inputs(), *(other.opened.inputs() if other is not None else ()))
        opened.evaluate(
            data, against=other, metrics=metrics or [], forgetting=forgetting, tasks=names, limit=limit,
            require=required, allow_overlap=allow_overlap, whole_answers=file is not None,
            keep_fields=bool(file is not None or worst), on_event=_Shown(file, worst),
        )  # fmt: skip


def _check_table(options: Mapping[str, object]) -> None:
    """Raises ConfigError: one of these options is given, which a table of several scales has no room for."""
    if given := [name for name, value in options.items() if value]:
        what, fix = "does not work with several scales", "give one --adapter-scale"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key=f"--{given[0]}", fix=fix))


class _Shown:
    """Shows events; at the end, writes the rows and prints the metrics.

    Metrics are printed even if the rows cannot be written or a requirement is not met.
    """

    def __init__(self, file: Output | None = None, worst: int = 0):
        self._file, self._worst = file, worst
        self._terminal = listener()

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        import loratune

        self._terminal(event)
        if isinstance(event, FinishedEvent):
            try:
                if self._file is not None and isinstance(event.result, loratune.Comparison):
                    write_rows((row.to_dict() for row in event.result.every_row()), self._file)
            finally:
                with unread_output():
                    self._print(event)

    def _print(self, event: FinishedEvent) -> None:
        import loratune
        from loratune.cli import display

        result, worst = event.result, self._worst
        if isinstance(result, loratune.Comparison):
            rows = {"worst": display.worst_rows(result, worst)} if worst else {}
            show(display.comparison(result, worst), result.to_dict() | rows)
        elif isinstance(result, loratune.ScaleComparison):
            show(display.scales(result), result.to_dict())
        elif isinstance(result, loratune.TaskResults):
            show(display.tasks(result), result.to_dict())


@app.command()
def report(
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", metavar="DIR", help="The study directory of a sweep, instead of an adapter."),
    ] = None,
    against: Against = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows to score; this loads the base."),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option("--adapter-scale", metavar="LIST", help="Scales to draw as curves, e.g. 0:1:0.1; with --data."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The HTML file; by default ./ADAPTER-report.html.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    assignments: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write an HTML page on an adapter and its run, or on a sweep. The file is self-contained."""
    with boundary(debug, memory_fix=_MEMORY_FIX):
        check_paths(adapter=adapter, study=study, against=against, data=data, output=output)
        if (adapter is None) == (study is None):
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give exactly one of --adapter and --study"))
        problems = [] if adapter else needs({"against": against, "data": data}, "--adapter")
        problems += [] if data else needs({"set": assignments, "adapter-scale": scale}, "--data")
        if problems:
            raise ConfigError(problems)
        if find_spec("matplotlib") is None:
            raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "matplotlib", "draws the charts", "report"))

        import loratune
        from loratune.api.opened import parse_scales

        if study is not None:
            target = output or Path(f"{os.path.basename(os.path.realpath(study))}-report.html")
            page = loratune.report_study(study, target, overwrite=overwrite)
        else:
            assert adapter is not None
            target = output or Path(f"{os.path.basename(os.path.realpath(adapter))}-report.html")
            forced = force or data is None  # the page lists what was edited
            opened = loratune.Adapter(adapter, force=forced, overrides=assignments)
            other = loratune.Adapter(against, force=forced) if against is not None else None
            scales = parse_scales(scale) if scale else ()
            page = opened.report(target, rows=data, against=other, scales=scales, overwrite=overwrite)
        if page.is_file() and not str(page).startswith(("/dev/", "/proc/")):
            show([str(target)], {"page": str(target)})
