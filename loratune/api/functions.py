"""The functions of the public API."""

import json
import time
from collections.abc import Mapping, Sequence
from os import fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from loratune import config as configs
from loratune.api.adapter import Adapter, Rows, StrPath
from loratune.codes import Code
from loratune.commands import init as drafts
from loratune.commands import params
from loratune.commands import train as training
from loratune.commands.init_start import SOURCE, checked, first_values
from loratune.commands.params import Params
from loratune.commands.sweep import grid as grids
from loratune.commands.sweep import running, storage
from loratune.commands.sweep.running import SweepResult
from loratune.config import RunConfig
from loratune.data.sources import GivenRows, given_rows
from loratune.errors import ConfigError, Problem
from loratune.events import Listener, listening
from loratune.system import launcher, output_file
from loratune.training import preflight, processes
from loratune.training.checkpoints import run_dir


def load_config(path: StrPath, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a config file.

    Args:
        path: The YAML file.
        overrides: Dotted key → value, such as `{"training.max_steps": 50}`.

    Raises:
        ConfigError: With every problem of the file.
    """
    return configs.load(Path(path), _assignments(overrides))


def train(
    config: RunConfig,
    *,
    resume: bool | Sequence[str] = False,
    overwrite: bool = False,
    allow_worse: bool = False,
    rows: Mapping[Literal["train", "validation", "test"], Rows] | None = None,
    on_event: Listener | None = None,
) -> Adapter:
    """Train an adapter and publish its directory, `config.output_dir`.

    Under a launcher such as torchrun all processes call it, and the main process publishes.

    Args:
        config: What is trained, on what, and how.
        resume: Continue an interrupted run from its last checkpoint; a sequence of keys are those whose values may have
            changed.
        overwrite: Replace the adapter at `output_dir`, or an unfinished run.
        allow_worse: Publish the adapter even if it does worse than its base.
        rows: Rows of this program for some of the splits, instead of those that the config names: each a list of
            dicts, a `datasets.Dataset` or a pandas frame.
        on_event: Receives events.

    Returns:
        The adapter, opened and verified.

    Raises:
        ConfigError, ModelError, DataError: The config, the base or the rows cannot be used.
        NumericError: A number is not finite, nothing was learned, or the adapter is worse than its base.
        ResumeError: There is no checkpoint, or it does not belong to this run.
        LockedError: Another run uses the output directory.
        ResourceError: Memory or disk ran out.
        LostError: Another process of the run has ended.
        KeyboardInterrupt: The run was interrupted; its last step is kept as a checkpoint.
    """
    began = time.monotonic()
    given: dict[str, GivenRows] = {name: given_rows(values, name) for name, values in (rows or {}).items()}
    group = processes.join() if launcher.world_size() > 1 else launcher.SingleProcess()
    allowed = None if resume is False else () if resume is True else tuple(resume)
    with listening(on_event if group.main else None):
        run = None
        if group.main:
            inputs = configs.input_paths(None, config)
            place = run_dir.check(config.output_dir, resume=allowed is not None, overwrite=overwrite, inputs=inputs)
            run = preflight.check(config, place, allowed, given)
        run = preflight.broadcast_run(run, group)
        training.train(run, group, allow_worse=allow_worse, began=began)
        return Adapter(run.directory.output)


def init(
    rows: str,
    *,
    model: str,
    output: StrPath | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_event: Listener | None = None,
) -> RunConfig:
    """Choose a config for rows and a model. No weights are loaded or downloaded.

    Args:
        rows: The path of the rows, or a hub id.
        model: The directory of the model, or a hub id.
        output: Write the config there as well, with the reason for each choice; the file must not exist.
        overrides: Dotted key → value, for what is not to be chosen.
        on_event: Receives events.

    Raises:
        ConfigError, ModelError, DataError: A value, the model or the rows cannot be used.
    """
    with listening(on_event):
        file = output_file.output(Path(output), "output", overwrite=None) if output is not None else None
        draft = configs.draft(first_values(rows, model), SOURCE, _assignments(overrides))
        started = drafts.init(checked(draft), draft)
        if file is not None:
            with file.opened() as writable:
                writable.write(started.text)
        return started.run


def sweep(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any] | str],
    *,
    budget: str | None = None,
    trials: int | None = None,
    halving: bool = False,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> SweepResult:
    """Train a config with other settings, compare the trials on the validation rows, and publish the best.

    Args:
        config: The config; it needs validation rows.
        grid: Dotted key → the values to try; or a range as text, `1e-4..1e-2`, from which values are drawn.
        budget: How long it may take, such as `30m`.
        trials: How many trials at most.
        halving: Stop trials early that are among the worse ones.
        overwrite: Replace the adapter at `output_dir`.
        on_event: Receives events.

    Raises:
        ConfigError: The grid, or a config of it, is not valid; the budget is shorter than one trial.
        NumericError: No trial has an adapter.
        LoratuneError: As `train`.
    """
    began = time.monotonic()
    axes = [f"{key}={_listed(values)}" for key, values in grid.items()]
    with listening(on_event), TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(configs.dump(config), encoding="utf-8")
        parsed = grids.parse(axes, file, [])
        seconds = grids.parse_time(budget) if budget is not None else None
        if parsed.has_ranges and trials is None and seconds is None:
            what, fix = "a range has no end of values to try", "give trials or budget"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, "grid", fix=fix))
        runs = parsed.check(halving=halving)
        place = run_dir.check(config.output_dir, overwrite=overwrite, inputs=configs.input_paths(None, config))
        storage.check_place(storage.study_directory(place.output), place.output.name, None)
        request = running.Request(
            parsed, runs, preflight.check(config, place), None, trials, running.Budget(seconds, began), halving
        )
        return running.sweep(request)


def count_parameters(config: RunConfig, *, on_event: Listener | None = None) -> Params:
    """Count what would be trained, and estimate the memory for it, from the model's configuration alone.

    Raises:
        ModelError, ConfigError, AdapterError: The model's configuration, the targets, or the adapter to start from
            cannot be used.
    """
    with listening(on_event):
        return params.params(config)


def _listed(values: Sequence[Any] | str) -> str:
    """The values of an axis as the command line takes them; a text is a range."""
    if isinstance(values, str):
        return values
    return ",".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def _assignments(overrides: Mapping[str, Any] | None) -> list[str]:
    """Overrides as `--set` takes them."""
    return [f"{key}={json.dumps(value, default=fspath)}" for key, value in (overrides or {}).items()]
