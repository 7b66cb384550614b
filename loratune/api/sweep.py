"""The public function `loratune.sweep`. It needs the package optuna."""

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loratune import config as configs
from loratune.api import Overrides, StrPath, assignments, default_state, libraries, training
from loratune.api.train import note_portability, validated
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.arguments import checked, plain
from loratune.errors import ConfigError, Problem, missing_package
from loratune.events import Listener, listening
from loratune.system import launcher

if TYPE_CHECKING:
    from loratune.study.sweep import SweepResult


@checked
def sweep(
    config: RunConfig | StrPath,
    grid: Mapping[str, Sequence[Any] | str] | Sequence[str] = (),
    *,
    rows: str | None = None,
    overrides: Overrides = (),
    budget: str | None = None,
    trials: int | None = None,
    storage: str | None = None,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> "SweepResult":
    """Train a config with several settings, compare the trials on the validation rows, and publish the best adapter.

    Args:
        config: The config, or its file; it needs validation rows.
        grid: Dotted key → the values to try; or a range as a string, `1e-4..1e-2`, from which values are sampled.
        rows: Instead of a grid, parts of the training rows, such as `1/4,1/2,1`, to see whether more rows would help. A
            smaller part lies in a larger one, the held-out rows and the settings are the same, and the adapter of all
            rows is published.
        overrides: Overrides of keys of the config.
        budget: A time limit, such as `30m`.
        trials: The maximum number of trials.
        storage: The URL of a database for the study (Optuna's), to share it between machines.
        overwrite: Replace the adapter at `output_dir`.
        on_event: Receives events.

    Returns:
        The trials, the best first. A signal that ended the sweep is in `stop`; the same call continues it.

    Raises:
        ConfigError: The grid, or a config of it, is not valid; the budget is shorter than one trial.
        NumericError: No trial produced an adapter.
        LoratuneError: As `train`.
    """
    began = time.monotonic()
    if find_spec("optuna") is None:
        raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "optuna", "keeps the study", "sweep"))
    from loratune.study import grid as grids
    from loratune.training.checkpoints import run_dir

    with listening(on_event), training(), _quiet_optuna(), TemporaryDirectory() as folder:
        parts = [] if rows is None else grids.parse_parts(rows)
        if conflicts := [name for name, is_given in {"grid": grid, "trials": trials}.items() if parts and is_given]:
            what = "contradicts `rows=...`, with which all rows decide the settings of each part"
            raise ConfigError([Problem(Code.USAGE_CONFLICT, what, key=key, fix="leave it out") for key in conflicts])
        given = None if isinstance(config, RunConfig) else Path(config)
        if isinstance(config, RunConfig):
            (Path(folder) / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
        seconds = grids.parse_time(budget) if budget is not None else None
        file, assigned = given or Path(folder) / "config.yaml", assignments(overrides)
        axes = grids.Grid((), file, tuple(assigned)) if parts else grids.parse(_options(grid), file, assigned)
        runs = axes.check(is_bounded=trials is not None or seconds is not None)
        run = axes.run({})
        note_portability(run)
        place = run_dir.check(run.output_dir, overwrite=overwrite, inputs=configs.input_paths(given, run))
        checked = validated(run, place, launcher.SINGLE_PROCESS)
        if parts and checked.rows is not None:
            train = checked.rows.train
            axes = axes.with_parts(parts, len(train), are_texts=train.formats == ["text"])
            runs = axes.check(is_bounded=True)
        with default_state():
            with libraries():
                from loratune.study.sweep import Sweep
                from loratune.study.trials import Budget

            return Sweep(axes, runs, checked, storage, trials, Budget(seconds, began)).work()


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence optuna's log, and its warnings about experimental functions."""
    from optuna import exceptions, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def _options(grid: Mapping[str, Sequence[Any] | str] | Sequence[str]) -> Sequence[str]:
    """The grid in the form of the command line; of a mapping, a string is a range."""
    if not isinstance(grid, Mapping):
        return grid
    return [f"{key}={values if isinstance(values, str) else _listed(values)}" for key, values in grid.items()]


def _listed(values: Sequence[Any]) -> str:
    return ",".join(value if isinstance(value, str) else json.dumps(plain(value)) for value in values)
