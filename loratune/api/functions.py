"""The functions of the public API."""

import json
import time
from collections.abc import Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import Any, Literal

from loratune import config as configs
from loratune.api.adapter import Adapter, Rows, StrPath
from loratune.commands import init as drafts
from loratune.commands import params
from loratune.commands import train as training
from loratune.commands.init_start import SOURCE, checked, first_values
from loratune.commands.params import Params
from loratune.config import RunConfig
from loratune.data.sources import GivenRows, given_rows
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


def count_parameters(config: RunConfig, *, on_event: Listener | None = None) -> Params:
    """Count what would be trained, and estimate the memory for it, from the model's configuration alone.

    Raises:
        ModelError, ConfigError, AdapterError: The model's configuration, the targets, or the adapter to start from
            cannot be used.
    """
    with listening(on_event):
        return params.params(config)


def _assignments(overrides: Mapping[str, Any] | None) -> list[str]:
    """Overrides as `--set` takes them."""
    return [f"{key}={json.dumps(value, default=fspath)}" for key, value in (overrides or {}).items()]
