"""`loratune evaluate`."""

import glob
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.application import (
    MAX_COUNT,
    STDOUT,
    DataAssignments,
    Debug,
    Force,
    Json,
    app,
    check_paths,
    importing,
    log_all,
    rows_output,
    write_rows,
)
from loratune.cli.boundary import boundary, unread_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from loratune.adapter.directory import AdapterDirectory
    from loratune.commands.evaluate import Tasks
    from loratune.compare.comparison import Comparison
    from loratune.compare.requirements import Requirement
    from loratune.data import DatasetSplit
    from loratune.system.output_file import Output


_NEEDED = {
    **dict.fromkeys(("against", "metrics", "forgetting", "worst", "output", "assignments"), "data"),
    "limit": "tasks",
    "overwrite": "output",
    "allow_overlap": "require",
}
"""Option → the option that it only works with, by the names of their parameters."""
_SPELLED = {"metrics": "metric", "allow_overlap": "allow-overlap", "assignments": "set"}


@app.command()
def evaluate(
    context: typer.Context,
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
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
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="A second adapter to compare with.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="exact_match, label, contains, rouge_l, json or regex:PATTERN; repeatable."
        ),
    ] = None,
    forgetting: Annotated[
        str | None,
        typer.Option("--forgetting", metavar="FILE", help="Unrelated text to measure forgetting on, or `builtin`."),
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
    assignments: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compare an adapter with its base on rows, or on tasks."""
    with boundary(debug, memory_fix="free memory, or shorten the rows with --set data.max_length"):
        check_paths(adapter=adapter, data=data, against=against, forgetting=forgetting, output=output)
        _check_options(context.params)
        names, task_paths = _task_names(tasks)
        with importing(computes=True):
            from loratune.adapter.directory import AdapterDirectory
            from loratune.compare import metrics as known_metrics
            from loratune.compare import requirements

        parsed = known_metrics.parse(metrics or [])
        known = {"against": bool(against), "forgetting": bool(forgetting), "rows": bool(data), "tasks": bool(names)}
        required = requirements.parse(require or [], [metric.name for metric in parsed], **known)
        inputs = [Path(path) for path in (adapter, data, against, forgetting, *task_paths) if path is not None]
        file = rows_output(output, overwrite=overwrite, inputs=inputs)
        info = AdapterDirectory.open(adapter, forced=force, assignments=assignments)
        other = AdapterDirectory.open(against, forced=force) if against is not None else None
        if file is not None:
            file = file.reading(Path(info.base.name_or_path))
        if data is None:
            return _evaluate_tasks(info, names, limit, required, as_json)
        opened = _open_tasks(names, limit, required) if names else None
        split = _read_rows(data, info, required, allow_overlap=allow_overlap)
        fields = split.own_fields() if file is not None or worst else {}
        if parsed and split.kind is not None:
            what, fix = f"the rows are {split.kind}, of which none is written by a model", "leave it out"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, split.source, known_metrics.OPTION, fix))
        unrelated = _unrelated_text(forgetting, info.data.max_length) if forgetting is not None else None

        with importing():
            from loratune.commands.evaluate import evaluate
            from loratune.compare.answers import Judging

        judging = Judging(parsed, file is not None)
        found = evaluate(info, split, against=other, judging=judging, forgetting=unrelated, tasks=opened)
        found = found.judged(required)
        log_all(found.remarks)
        _show(found, file, fields, worst, as_json)
        requirements.check_met(found.requirements)


def _read_rows(
    data: str, info: "AdapterDirectory", required: list["Requirement"], *, allow_overlap: bool
) -> "DatasetSplit":
    """The rows, with what is required of them. Raises as `requirements.check_rows` does."""
    from loratune.compare import requirements
    from loratune.config import Source
    from loratune.console import log
    from loratune.data import read_source, row_hashes

    split = read_source(Source(path=data), info.data)
    if any(not one.of_task for one in required):
        overlap = row_hashes.find_overlap(split, info.files.path)
        requirements.check_rows(required, split, overlap, allow_overlap=allow_overlap)
        if overlap.unknown:
            log(overlap.unknown)
    return split


def _check_options(values: Mapping[str, object]) -> None:
    """Raises ConfigError: there is nothing to score the adapter on, or an option comes without the one that it needs.

    values: of all options, by the names of their parameters.
    """
    if values["data"] is None and values["tasks"] is None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give --data, --tasks, or both"))
    if str(values["output"]) == STDOUT:
        what, fix = "stdout has the metrics", "name a file for the rows"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--output", fix=fix))
    problems = [
        Problem(Code.USAGE_CONFLICT, f"only works with --{needed}", key=f"--{_SPELLED.get(option, option)}")
        for option, needed in _NEEDED.items()
        if values[option] and not values[needed]
    ]
    if problems:
        raise ConfigError(problems)


def _task_names(tasks: str | None) -> tuple[list[str], list[str]]:
    """What --tasks names, and the files that this stands for, as paths and globs. Raises as `tasks.parse` does."""
    from loratune.compare import tasks as known_tasks

    names = known_tasks.parse(tasks) if tasks is not None else []
    paths = [name for name in names if known_tasks.is_path(name)]
    return names, [f"{glob.escape(path)}/**/*.y*ml" if Path(path).is_dir() else path for path in paths]


def _open_tasks(names: list[str], limit: int | None, required: list["Requirement"]) -> "Tasks":
    """Find the tasks, with the harness, which is imported for them only."""
    from loratune.system.environment import kept_environment

    with importing(), kept_environment():
        from loratune.compare import harness

    return partial(harness.run, opened=harness.open_tasks(names, required), limit=limit)


def _evaluate_tasks(
    info: "AdapterDirectory", names: list[str], limit: int | None, required: list["Requirement"], as_json: bool
) -> None:
    """Run tasks alone, without rows."""

    tasks = _open_tasks(names, limit, required)
    with importing():
        from loratune.cli import printing
        from loratune.commands.evaluate import evaluate_tasks
        from loratune.compare import requirements

    results = evaluate_tasks(info, tasks, required)
    log_all(results.remarks)
    printing.print_tasks(results, as_json)
    requirements.check_met(results.requirements)


def _unrelated_text(name: str, max_length: int) -> "DatasetSplit":
    """The rows of a file, or of the text that comes with loratune, in whatever format they are, but no answers that are
    compared. Raises DataError: they are."""
    from loratune import data
    from loratune.config import DataSection, Source

    source = Source(path=str(data.UNRELATED_TEXT) if name == "builtin" else name)
    split = data.read_source(source, DataSection(train=source, max_length=max_length))
    split.check_kind(None)
    return split


def _show(
    found: "Comparison", file: "Output | None", fields: Mapping[str, Mapping[str, Any]], worst: int, as_json: bool
) -> None:
    """Write the rows and print the metrics, which are printed also where there is no room for the rows.

    fields: place → the row's own fields, where rows are written or printed.
    """
    from loratune.cli import printing

    try:
        if file is not None:
            write_rows((copy.as_json() for row in found.rows for copy in row.at_places(fields)), file)
    finally:
        with unread_output():
            if fields:
                found = replace(found, rows=[next(row.at_places(fields)) for row in found.rows])
            printing.print_evaluation(found, worst, as_json)
