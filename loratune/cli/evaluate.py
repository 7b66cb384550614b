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
    rows: Annotated[
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
            "--metric",
            metavar="NAME",
            help="exact_match, label, contains, rouge_l, json, tool_call or regex:PATTERN; repeatable.",
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
    few_shot: Annotated[
        int | None,
        typer.Option(metavar="K", min=0, max=MAX_COUNT, help="Also ask the base with K training rows as examples."),
    ] = None,
    base_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Also ask the base with this prompt: 'Classify as a or b: {prompt}'."),
    ] = None,
    abstain_for: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="For labels: from which probability on this share of the answers is right, as 0.95."
        ),
    ] = None,
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
    scales: Annotated[
        str,
        typer.Option(
            "--adapter-scale",
            metavar="S,...",
            help="Multiply the adapter's update by S; a table for several, as 0.5,0.7,1 or 0:1:0.1.",
        ),
    ] = "1",
    overrides: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compare an adapter with its base on rows, or on tasks."""
    with boundary(debug, memory_fix=_MEMORY_FIX):
        check_paths(adapter=adapter, rows=rows, against=against, forgetting=forgetting, output=output)
        if rows is None and tasks is None:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give --data, --tasks, or both"))
        if str(output) == STDOUT:
            what, fix = "stdout has the metrics", "name a file for the rows"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--output", fix=fix))
        of_data = {"against": against, "metrics": metrics, "forgetting": forgetting, "worst": worst, "output": output}
        of_data |= {
            "few_shot": few_shot is not None,
            "base_prompt": base_prompt,
            "abstain_for": abstain_for is not None,
        }
        problems = [] if rows else needs(of_data | {"overrides": overrides}, "--data")
        problems += [] if tasks else needs({"limit": limit}, "--tasks")
        problems += [] if output else needs({"overwrite": overwrite}, "--output")
        problems += [] if require else needs({"allow_overlap": allow_overlap}, "--require")
        if problems:
            raise ConfigError(problems)

        import loratune
        from loratune.api.opened import parse_scales

        if len(parsed := parse_scales(scales)) > 1:
            _check_table(
                {
                    "tasks": tasks,
                    "against": against,
                    "require": require,
                    "worst": worst,
                    "output": output,
                    "abstain_for": abstain_for is not None,
                }
            )
            loratune.Adapter(adapter, force=force, overrides=overrides).evaluate_scales(
                rows, parsed, metrics=metrics or [], forgetting=forgetting, on_event=_Shown()
            )
            return
        names, required = tasks.split(",") if tasks is not None else [], require or []
        inputs = [Path(path) for path in (adapter, rows, against, forgetting) if path is not None]
        inputs += [Path(f"{glob.escape(name)}/**/*.y*ml" if Path(name).is_dir() else name) for name in names]
        file = rows_output(output, overwrite=overwrite, inputs=inputs)
        opened = loratune.Adapter(adapter, scale=parsed[0], force=force, overrides=overrides)
        if rows is None:
            opened.run_tasks(names, limit=limit, require=required, on_event=_Shown())
            return
        other = loratune.Adapter(against, force=force) if against is not None else None
        if file is not None:
            file = file.reading(*opened.opened.inputs(), *(other.opened.inputs() if other is not None else ()))
        opened.evaluate(
            rows, against=other, metrics=metrics or [], forgetting=forgetting, tasks=names, limit=limit,
            abstain_for=abstain_for, require=required, allow_overlap=allow_overlap, whole_answers=file is not None,
            few_shot=few_shot, base_prompt=base_prompt, keep_fields=bool(file is not None or worst),
            on_event=_Shown(file, worst),
        )  # fmt: skip


def _check_table(options: Mapping[str, object]) -> None:
    """Raises ConfigError: one of these options is given, which a table of several scales has no room for."""
    if given := [name for name, value in options.items() if value]:
        what, fix = "does not work with several scales", "give one --adapter-scale"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key=given[0], fix=fix))


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
    adapter: AdapterPath,
    against: Against = None,
    rows: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows to score; this loads the base."),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option("--adapter-scale", metavar="LIST", help="Scales to draw as curves, e.g. 0:1:0.1; with --data."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The HTML file; by default ./ADAPTER-report.html.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    overrides: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write an HTML page on an adapter, its run and its sweep. The file is self-contained."""
    with boundary(debug, memory_fix=_MEMORY_FIX):
        check_paths(adapter=adapter, against=against, rows=rows, output=output)
        if not rows and (problems := needs({"overrides": overrides, "scales": scales}, "--data")):
            raise ConfigError(problems)
        if find_spec("matplotlib") is None:
            raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "matplotlib", "draws the charts", "report"))

        import loratune
        from loratune.api.opened import parse_scales

        target = output or Path(f"{os.path.basename(os.path.realpath(adapter))}-report.html")
        forced = force or rows is None  # the page lists what was edited
        opened = loratune.Adapter(adapter, force=forced, overrides=overrides)
        other = loratune.Adapter(against, force=forced) if against is not None else None
        page = opened.report(
            target, rows=rows, against=other, scales=parse_scales(scales) if scales else (), overwrite=overwrite
        )
        if page.is_file() and not str(page).startswith(("/dev/", "/proc/")):
            show([str(target)], {"page": str(target)})
