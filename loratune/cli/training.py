"""The commands `train` and `sweep`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.application import MAX_COUNT, Assignments, ConfigFile, Debug, Json, Verbose, app, needs, program, show
from loratune.cli.boundary import boundary, stop_error, unread_output
from loratune.cli.loss_plot import loss_plot
from loratune.cli.options import as_options
from loratune.codes import Code
from loratune.console import as_json, log, print_lines, print_marked
from loratune.errors import ConfigError, Problem
from loratune.events import Event, FinishedEvent, listener
from loratune.system import launcher, signals
from loratune.system.launcher import Group
from loratune.system.signals import StopSignal
from loratune.text import one_line, shell_word

if TYPE_CHECKING:
    from loratune.training.plan import Plan

_MEMORY_FIX = "free memory, or load the base in fewer bits with --set model.quantization=4bit"


@app.command()
def train(
    config_file: ConfigFile,
    overrides: Assignments = [],  # noqa: B006  typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    changes: Annotated[
        list[str],
        typer.Option("--allow-change", metavar="KEY", help="With --resume: accept a new value of KEY; repeatable."),
    ] = [],  # noqa: B006  typer copies it
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter at output_dir, or an unfinished run.")
    ] = False,
    allow_worse: Annotated[
        bool,
        typer.Option("--allow-worse", help="Write the adapter even if it is worse than its base, or learned nothing."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be trained.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=MAX_COUNT, metavar="N", help="With --dry-run: show N rendered rows.")
    ] = 1,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter from CONFIG, and write it to its output_dir."""
    with boundary(debug, _join, memory_fix=_MEMORY_FIX, verbose=verbose) as group:
        _check_options(resume=resume, overwrite=overwrite, changes=changes)
        if not dry_run and (problems := needs({"rows": rows > 1}, "--dry-run")):
            raise ConfigError(problems)

        import loratune

        run: Any = loratune.load_config(config_file, overrides) if group.main else None  # the others receive it
        allowed = changes if resume else False
        if dry_run:
            plan = loratune.plan(run, resume=allowed, overwrite=overwrite, config_file=config_file, group=group)
            if group.main:
                _print_plan(plan, rows, verbose=verbose)
            return
        terminal = listener()

        def listen(event: Event) -> None:
            terminal(event)
            if isinstance(event, FinishedEvent):
                _show_adapter(event, with_plot=verbose)

        try:
            loratune.train(
                run, resume=allowed, overwrite=overwrite, allow_worse=allow_worse, config_file=config_file,
                group=group, on_event=listen,
            )  # fmt: skip
        except KeyboardInterrupt as stop:
            fix = "the tokenized rows are kept, so that the same command continues from there"
            if isinstance(stop, StopSignal) and stop.published is not None:
                fix = ""
            elif isinstance(stop, StopSignal) and stop.is_resumable:
                processes = f"on {group.count} processes, as before, " if group.count > 1 else ""
                fix = f"{processes}continue with: {_resume_command(config_file, overrides, changes)}"
            raise stop_error(stop, fix) from None


def _check_options(*, resume: bool, overwrite: bool, changes: list[str]) -> None:
    """Raises ConfigError: options of `train` contradict each other."""
    if resume and overwrite:
        what = "--resume and --overwrite contradict each other"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, fix="give one of them"))
    if not resume and (problems := needs({"changes": changes}, "--resume")):
        raise ConfigError(problems)


def _join() -> Group:
    """Join the processes of this run; torch is imported only if there are several."""
    if launcher.world_size() == 1:
        return launcher.Group()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # loratune reports lost connections itself

    from loratune.api.train import join_processes

    with signals.default_actions():
        return join_processes()


def _print_plan(plan: "Plan", rows: int, *, verbose: bool) -> None:
    """Print the plan for `train --dry-run`, with this many training rows."""
    from loratune.cli import display

    if as_json.get():
        show([], display.plan_values(plan, rows))
        return
    before, behind = display.plan(plan) if verbose else ([*display.brief(plan, None)], [])
    print_lines(before)
    log(*plan.all_notes() if verbose else ())
    train = plan.datasets.train
    for number in range(min(rows * train.rows_per_example, len(train.rows))):
        print(f"{one_line(train.rows.row(number).where)}{plan.side_name(number)}, supervised text marked")
        print_marked(plan.row_text(number))
    for title, pieces in plan.other_rows(rows):
        print(title)
        print_marked(pieces)
    print_lines(behind)


def _show_adapter(event: FinishedEvent, *, with_plot: bool) -> None:
    """Print the results of a run. with_plot: its loss curve as well."""
    import loratune
    from loratune.cli import display

    result = event.result
    assert isinstance(result, loratune.PublishedAdapter)
    plot = loss_plot(result.trained.curve, sys.stdout.encoding or "ascii") if with_plot else []
    show([*display.trained(result, program()), *plot], result.to_dict())


def _resume_command(config_file: Path, assignments: list[str], changes: list[str]) -> str:
    """The command that continues a run."""
    overrides = [word for assignment in assignments for word in ("--set", assignment)]
    allowed = [word for key in changes for word in ("--allow-change", key)]
    words = [program(), "train", str(config_file), *overrides, "--resume", *allowed]
    return " ".join(map(shell_word, words))


@app.command()
def sweep(
    config_file: ConfigFile,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=VALUE,...",
            help="Values to try, or a range LOW..HIGH to sample; repeatable.",
        ),
    ] = [],  # noqa: B006  typer copies it
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="PART,...",
            help="Instead of --grid, whether more rows would help: parts of the training rows, such as 1/4,1/2,1.",
        ),
    ] = None,
    overrides: Assignments = [],  # noqa: B006  typer copies it
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", min=1, max=MAX_COUNT, help="Run at most N trials.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Time limit: trials that would exceed it are not started; 30m, 1h, 90 (minutes).",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="A database for the study, to share it between machines."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at output_dir.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train CONFIG with several settings; output the best adapter.

    The adapters are compared on the validation rows. The study is kept in OUTPUT_DIR.study; rerun the same command to
    resume it, or run it in several processes at once.
    """
    with boundary(debug, memory_fix=_MEMORY_FIX):
        import loratune

        swept = loratune.sweep(
            config_file,
            grid,
            rows=rows,
            overrides=overrides,
            budget=budget,
            trials=trials,
            storage=storage,
            overwrite=overwrite,
        )

        from loratune.cli import display

        values = swept.results.to_dict() | {"notes": [*map(as_options, (*swept.results.remarks(), *swept.notes))]}
        if swept.stop is None:
            show(display.study(swept, program()), values)
            return
        with unread_output():
            show(display.study(swept, program()), values)
        raise stop_error(swept.stop, "rerun the same command to resume") from None
