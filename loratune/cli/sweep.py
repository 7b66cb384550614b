"""`loratune sweep`: the same run with other settings, and the best of them as an adapter."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import MAX_COUNT, Assignments, Debug, Json, app, importing, log_all, program
from loratune.cli.boundary import boundary, checked_output, stop_error, unread_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem, missing_package

if TYPE_CHECKING:
    from loratune.config import RunConfig
    from loratune.training.checkpoints.run_dir import RunDirectory


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

        from loratune import config
        from loratune.commands.sweep import grid as grids

        started, seconds = time.monotonic(), grids.parse_time(budget) if budget is not None else None
        axes = grids.parse(grid, config_file, assignments)
        if axes.has_ranges and trials is None and seconds is None:
            what, fix = "a range has no end of values to try", "give --trials or --budget"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, "--grid", fix=fix))
        runs, run = axes.check(halving=halving), axes.run({})
        log_all(config.portability(run.lora))
        directory = _directory(run, config_file, storage, overwrite=overwrite)

        with importing(computes=True):
            from loratune.cli import printing
            from loratune.commands.sweep import running
            from loratune.training import preflight

        validated = preflight.check(run, directory)
        limit = running.Budget(seconds, started)
        result = running.sweep(running.Request(axes, runs, validated, storage, trials, limit, halving))
        with checked_output() if result.stop is None else unread_output():
            printing.print_study(result, program(), as_json)
        if result.stop is not None:
            raise stop_error(result.stop, "rerun the same command to resume") from None


def _directory(run: "RunConfig", config_file: Path, storage: str | None, *, overwrite: bool) -> "RunDirectory":
    """The directory of the adapter, where nothing prevents writing it and its study. Raises LoratuneError."""
    import optuna

    from loratune import config
    from loratune.commands.sweep.storage import check_place, study_directory
    from loratune.training.checkpoints import run_dir

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        directory = run_dir.check(run.output_dir, overwrite=overwrite, inputs=config.input_paths(config_file, run))
    except ConfigError as error:
        study = f"{run.output_dir}.study"
        if not Path(study).is_dir():
            raise
        fix = f"--overwrite continues {study}, and replaces the adapter by the best one then"
        problems = [replace(one, fix=fix) if one.code == Code.OUTPUT_EXISTS else one for one in error.problems]
        raise ConfigError(problems) from None
    check_place(study_directory(directory.output), directory.output.name, storage)
    return directory
