"""What a sweep is to do, and whether it can be done."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.codes import Code
from loratune.commands.sweep import grid as grids
from loratune.commands.sweep.budget import Budget
from loratune.commands.sweep.grid import Grid
from loratune.commands.sweep.storage import study_directory
from loratune.config import RunConfig
from loratune.errors import ConfigError, ModelError, Problem
from loratune.lora import attach
from loratune.model import load
from loratune.training import auto, preflight
from loratune.training.preflight import ValidatedRun


@dataclass(frozen=True)
class Request:
    """What a sweep is to do.

    Attributes:
        grid: What is tried.
        runs: `grid.label` → config of each combination.
        run: The config itself, checked, with its rows, and the directory of the winner.
        storage: The URL of the database of the study; None for a file beside it.
        most: Trials of the study, at most; None for any number.
        budget: How long it may take.
        halving: Whether trials may be stopped early.
    """

    grid: Grid
    runs: dict[str, RunConfig]
    run: ValidatedRun
    storage: str | None
    most: int | None
    budget: Budget
    halving: bool

    @property
    def directory(self) -> Path:
        """That of the study."""
        return study_directory(self.run.directory.output)


def check_objectives(request: Request) -> None:
    """Raises ConfigError: a trial would lower an objective that is one of other rows."""
    kind = preflight.KINDS[request.run.config.training.objective]
    others = {run.training.objective for run in request.runs.values()}
    if wrong := sorted(one for one in others if preflight.KINDS[one] != kind):
        what = f"cannot be {' or '.join(wrong)}, as the rows are {kind or 'no answers that are compared'}"
        raise ConfigError(Problem(Code.SWEEP_KEY, what, grids.OPTION, "training.objective"))


def check_adapters(request: Request) -> None:
    """Put each kind of adapter on a base without weights. Raises ModelError, ConfigError: one does not fit."""
    seen = set[str]()
    for name, run in request.runs.items():
        if (section := json.dumps(run.lora.model_dump(mode="json"))) in seen:
            continue
        seen.add(section)
        try:
            attach.adapt(load.build_meta(load.load_config(run.model), run.model), auto.without_rows(run.lora), seed=0)
        except (ModelError, ConfigError) as error:
            problems = [replace(one, where=one.where or f"{grids.OPTION} {name}") for one in error.problems]
            raise type(error)(problems) from None
