"""What can be known before torch is imported: whether a run may write its output, and whether its rows are sound."""

from dataclasses import dataclass

from loratune import data, workspace
from loratune.config import RunConfig
from loratune.data import Examples
from loratune.workspace import Workspace


@dataclass(frozen=True)
class Ready:
    """A run that may begin."""

    config: RunConfig
    space: Workspace
    examples: Examples


def check(config: RunConfig, *, resume: bool, overwrite: bool) -> Ready:
    """Check a run's output directory, then read and check its rows; nothing is written.

    Raises ConfigError, ResumeError: see `workspace.inspect`. Raises DataError: see `data.read`.
    """
    space = workspace.inspect(config.output_dir, resume=resume, overwrite=overwrite)
    return Ready(config, space, data.read(config.data, config.training.seed))
