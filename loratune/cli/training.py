"""`loratune train` and `loratune params`: what begins with a config."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune import escaping
from loratune.cli.application import MAX_COUNT, Assignments, Debug, Json, app, check_paths, importing, log_all, program
from loratune.cli.boundary import boundary, checked_output, stop_error
from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.system import launcher, signals
from loratune.system.launcher import Group

if TYPE_CHECKING:
    from loratune.training import preflight


@app.command()
def train(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    assignments: Assignments = [],  # noqa: B006  typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    changes: Annotated[
        list[str],
        typer.Option("--allow-change", metavar="KEY", help="With --resume: accept a new value of KEY; repeatable."),
    ] = [],  # noqa: B006  typer copies it
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter at output_dir, or an unfinished run.")
    ] = False,
    allow_worse: Annotated[
        bool, typer.Option("--allow-worse", help="Publish the adapter even if it is worse than its base.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be trained.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=MAX_COUNT, metavar="N", help="With --dry-run: show N rendered rows.")
    ] = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter as CONFIG says, and write it to its output_dir."""
    began = time.monotonic()
    memory_fix = "free memory, or load the base in fewer bits with --set model.quantization=4bit"
    with boundary(debug, _join, memory_fix=memory_fix) as group:
        _check_options(resume=resume, overwrite=overwrite, changes=changes, dry_run=dry_run, as_json=as_json)
        run = None
        if group.main:
            resumed = changes if resume else None
            run = _check_run(config_file, assignments, resumed, overwrite=overwrite, dry_run=dry_run)

        with importing(computes=True):
            from loratune.training import preflight

        run = preflight.broadcast_run(run, group)

        with importing():
            from loratune.cli import printing
            from loratune.commands import train as training
            from loratune.training import time_budget
            from loratune.training.plan import make_plan

        try:
            if dry_run:
                plan = time_budget.estimate_length(make_plan(run, group), began)
                group.close()
                if group.main:
                    printing.print_plan(plan, rows)
                return
            trained = training.train(run, group, allow_worse=allow_worse, began=began)
        except KeyboardInterrupt as stop:
            fix = "the tokenized rows are kept, so that the same command continues from there"
            if not dry_run and run.directory.is_resumable():
                processes = f"on {group.count} processes, as before, " if group.count > 1 else ""
                fix = f"{processes}continue with: {_resume_command(config_file, assignments, changes)}"
            raise stop_error(stop, fix) from None
        if trained is not None:
            with checked_output():
                printing.print_result(run, trained, program(), as_json)


@app.command()
def params(
    config_file: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="A model, with the default LoRA settings.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="An adapter directory.")] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count trainable parameters, and estimate the memory of a run. No weights of the base are loaded or downloaded."""
    with boundary(debug):
        if sum(value is not None for value in (config_file, model, adapter)) != 1:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give exactly one of CONFIG, --model and --adapter"))
        check_paths(adapter=adapter)
        if adapter and assignments:
            what = "does not work with --adapter, which has its settings"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--set", fix="leave it out"))

        from loratune import config

        if adapter:
            from loratune.commands.adapter_stats import print_stats
            from loratune.lora import adapter_files, stats

            print_stats(str(adapter), stats.adapter_stats(adapter_files.inspect(adapter)), as_json)
            return
        run = config.load(config_file, assignments) if config_file else config.for_model(str(model), assignments)
        log_all(config.portability(run.lora))

        with importing():
            from loratune.cli import printing
            from loratune.commands.params import params

        printing.print_params(params(run), as_json)


def _check_options(*, resume: bool, overwrite: bool, changes: list[str], dry_run: bool, as_json: bool) -> None:
    """Raises ConfigError: options of `train` that do not go together."""
    if resume and overwrite:
        what = "--resume and --overwrite contradict each other"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, fix="give one of them"))
    if changes and not resume:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with --resume", key="--allow-change"))
    if as_json and dry_run:
        what = "--dry-run shows rows, and has no JSON"
        raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--json", fix="leave one of them out"))


def _join() -> Group:
    """Join the processes of this run; torch is imported for it only where there are several."""
    if launcher.world_size() == 1:
        return launcher.SingleProcess()

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # loratune reports lost connections itself

    with importing():
        from loratune.training import processes

    with signals.default_actions():
        return processes.join()


def _check_run(
    config_file: Path, assignments: list[str], resume: list[str] | None, *, overwrite: bool, dry_run: bool
) -> "preflight.Run":
    """Check what can be known of a run before torch is imported, see `preflight.check`.

    resume: the keys whose values may have changed; None to start a run.
    """
    from loratune import config
    from loratune.training.checkpoints import run_dir

    run = config.load(config_file, assignments)
    if run.model.device_map is not None and (size := launcher.world_size()) > 1:
        what = f"auto spreads one model over all GPUs, and each of {size} processes would do so"
        fix = f"leave it out, or start one process: loratune train {escaping.shell(str(config_file))}"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, str(config_file), "model.device_map", fix))
    log_all(config.portability(run.lora))
    inputs = config.input_paths(config_file, run)
    directory = run_dir.check(
        run.output_dir, resume=resume is not None, overwrite=overwrite, inputs=inputs, dry_run=dry_run
    )

    with importing():
        from loratune.training import preflight

    return preflight.check(run, directory, resume)


def _resume_command(config_file: Path, assignments: Iterable[str], changes: Iterable[str]) -> str:
    """The command that continues a run."""
    overrides = [word for assignment in assignments for word in ("--set", assignment)]
    allowed = [word for key in changes for word in ("--allow-change", key)]
    words = [program(), "train", str(config_file), *overrides, "--resume", *allowed]
    return " ".join(map(escaping.shell, words))
