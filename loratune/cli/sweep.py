"""`loratune sweep`: the same run with other settings, and the best of them as an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import MAX_COUNT, Assignments, Debug, Json, app, importing, log_all, program
from loratune.codes import Code
from loratune.commands.boundary import boundary, checked_output, stop_error, unread_output
from loratune.errors import ConfigError, Problem, missing_package

if TYPE_CHECKING:
    from loratune.commands.sweep.grid import Grid
    from loratune.config import RunConfig
    from loratune.training.run_dir import RunDirectory


@app.command()
def sweep(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=VALUE,...",
            help="Needed, repeatable: values to try, or a range LOW..HIGH to draw from.",
        ),
    ] = [],  # noqa: B006  typer copies it
    assignments: Assignments = [],  # noqa: B006  typer copies it
    trials: Annotated[
        int | None,
        typer.Option("--trials", metavar="N", min=1, max=MAX_COUNT, help="Try N combinations at most."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TIME", help="Start no trial that would not fit: 30m, 1h, 90 (minutes)."),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Stop trials early that do worse at their evaluations.")
    ] = False,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="A database for the study, shared by machines.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at output_dir.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train CONFIG with several settings; publish the best adapter.

    All are compared on the validation rows. The study is kept in OUTPUT_DIR.study, and the same command goes on with
    it, also in several processes at once.
    """
    with boundary(debug, memory_fix="free memory, or load the base in fewer bits with --set model.quantization=4bit"):
        if find_spec("optuna") is None:
            raise ConfigError(missing_package(Code.SWEEP_NO_OPTUNA, "optuna", "keeps the study", "sweep"))

        from loratune import config
        from loratune.commands.sweep import budget as budgets
        from loratune.commands.sweep import grid as grids

        seconds = budgets.parse(budget) if budget is not None else None
        axes = grids.parse(grid, config_file, assignments)
        if axes.has_ranges and trials is None and seconds is None:
            what, fix = "a range has no end of values to try", "give --trials or --budget"
            raise ConfigError(Problem(Code.SWEEP_NO_END, what, "--grid", fix=fix))
        timer = budgets.Budget(seconds)
        runs = grids.check(axes)
        run = axes.run({})
        _check_comparable(axes, run, str(config_file), halving=halving)
        log_all(config.portability(run.lora))
        directory = _directory(run, config_file, storage, overwrite=overwrite)

        with importing(computes=True):
            from loratune.commands import printing
            from loratune.commands.sweep import running
            from loratune.commands.sweep.request import Request
            from loratune.commands.train import Reporter
            from loratune.console import TrainingProgress, log, show_progress
            from loratune.training import preflight

        validated = preflight.check(run, directory, show_progress)
        reporter = Reporter(log, printing.log_plan, show_progress, TrainingProgress())
        swept = running.sweep(Request(axes, runs, validated, storage, trials, timer, halving), reporter)
        with checked_output() if swept.stop is None else unread_output():
            printing.print_study(swept, program(), as_json)
        if swept.stop is not None:
            raise stop_error(swept.stop, "the same command goes on") from None


def _directory(run: "RunConfig", config_file: Path, storage: str | None, *, overwrite: bool) -> "RunDirectory":
    """That of the adapter, where nothing is in the way of it and of its study. Raises LoratuneError."""
    from loratune import config
    from loratune.commands.sweep import storage as storages
    from loratune.training import output_dir

    inputs = config.input_paths(config_file, run)
    with _naming_the_study(run.output_dir):
        directory = output_dir.check(run.output_dir, overwrite=overwrite, inputs=inputs)
    storages.check_place(storages.study_directory(directory.output), directory.output.name, storage)
    return directory


@contextmanager
def _naming_the_study(output_dir: str) -> Iterator[None]:
    """Adds to the error of an output directory that exists what goes on with the study which has published to it."""
    study = f"{output_dir}.study"
    fix = f"--overwrite goes on with {study}, and replaces it by what is best then"
    try:
        yield
    except ConfigError as error:
        if not Path(study).is_dir():
            raise
        problems = [replace(one, fix=fix) if one.code == Code.RUN_OUTPUT_EXISTS else one for one in error.problems]
        raise ConfigError(problems) from None


def _check_comparable(axes: "Grid", run: "RunConfig", config_file: str, *, halving: bool) -> None:
    """Raises ConfigError: no rows are there to compare trials by, or their losses mean something else in each."""
    from loratune.commands.sweep import grid as grids

    if run.data.validation is None:
        what, fix = "trials are compared on validation rows, and there are none", "set data.validation=0.1, or a file"
        raise ConfigError(Problem(Code.SWEEP_NO_VALIDATION, what, config_file, "data.validation", fix))
    grids.check_seed(axes, run)
    grids.check_halving(axes, halving=halving)
