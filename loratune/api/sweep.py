"""`loratune.sweep`, which needs the package optuna."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratune import config as configs
from loratune.commands import sweep as sweeps
from loratune.commands.sweep import Request, SweepResult
from loratune.config import RunConfig
from loratune.events import Listener, listening
from loratune.study import grid as grids
from loratune.study.storage import check_output
from loratune.study.trials import Budget
from loratune.training import preflight


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
        runs = parsed.check(halving=halving, is_bounded=trials is not None or seconds is not None)
        run = preflight.check(config, check_output(config, None, None, overwrite=overwrite))
        return sweeps.sweep(Request(parsed, runs, run, None, trials, Budget(seconds, began), halving))


def _listed(values: Sequence[Any] | str) -> str:
    """The values of an axis as the command line takes them; a text is a range."""
    if isinstance(values, str):
        return values
    return ",".join(value if isinstance(value, str) else json.dumps(value) for value in values)
