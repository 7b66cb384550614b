"""`loratune sweep`: the same run with other settings, and the best of them as an adapter."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import MAX_COUNT, Assignments, Debug, Json, app, importing, log_all, program
from loratune.cli.boundary import boundary, checked_output, stop_error, unread_output
from loratune.codes import Code
from loratune.errors import ConfigError, missing_package


@app.command()
def sweep(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=VALUE,...",
            help="Values to try, or a range LOW..HIGH to sample; required, repeatable.",
        ),
    ] = [],  # noqa: B006  typer copies it
    assignments: Assignments = [],  # noqa: B006  typer copies it
    trials: Annotated[
        int | None,
        typer.Option("--trials", metavar="N", min=1, max=MAX_COUNT, help="Run at most N trials."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Time limit: trials that would exceed it are not started; 30m, 1h, 90 (minutes).",
        ),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Stop trials early if they are worse than others at the same step.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="A database for the study, to share it between machines."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at output_dir.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train CONFIG with several settings; publish the best adapter.

    Trials are compared on the validation rows. The study is kept in OUTPUT_DIR.study; rerun the same command to resume
    it, or run it in several processes at once.
    """
    with boundary(debug, memory_fix="free memory, or load the base in fewer bits with --set model.quantization=4bit"):
        if find_spec("optuna") is None:
            raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "optuna", "keeps the study", "sweep"))

        import time

        import optuna

        from loratune import config
        from loratune.study import grid as grids
        from loratune.study.storage import check_output

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        started, seconds = time.monotonic(), grids.parse_time(budget) if budget is not None else None
        axes = grids.parse(grid, config_file, assignments)
        runs = axes.check(halving=halving, is_bounded=trials is not None or seconds is not None)
        run = axes.run({})
        log_all(config.portability(run.lora))
        directory = check_output(run, config_file, storage, overwrite=overwrite)

        with importing(computes=True):
            from loratune.cli import printing
            from loratune.commands import sweep as command
            from loratune.study.trials import Budget
            from loratune.training import preflight

        validated, limit = preflight.check(run, directory), Budget(seconds, started)
        result = command.sweep(command.Request(axes, runs, validated, storage, trials, limit, halving))
        with checked_output() if result.stop is None else unread_output():
            printing.print_study(result, program(), as_json)
        if result.stop is not None:
            raise stop_error(result.stop, "rerun the same command to resume") from None
