"""The public functions `loratune.train` and `loratune.plan`."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import loratune
from loratune import __version__
from loratune import config as configs
from loratune.api import Rows, StrPath, computing, default_state, libraries, training
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.arguments import check, checked
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening, note
from loratune.system import launcher
from loratune.system.launcher import Group
from loratune.system.signals import StopSignal
from loratune.text import shell_word

if TYPE_CHECKING:
    from loratune.training.checkpoints.run_dir import RunDirectory
    from loratune.training.plan import Plan
    from loratune.training.preflight import Run
    from loratune.training.results import TrainedAdapter

SplitName = Literal["train", "validation", "test"]
GivenSplits = Mapping[SplitName, Rows]


@dataclass(frozen=True)
class PublishedAdapter:
    """The adapter that `train` has published, and its metrics."""

    run: "Run"
    trained: "TrainedAdapter"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the directory, the metrics, the peak memory, and layers that were not accelerated."""
        trained = self.trained
        values = {"adapter": str(self.run.directory.output), "adapter_bytes": trained.adapter_bytes, **trained.metrics}
        return values | {"peak_memory": trained.peak_memory, "not_accelerated": dict(trained.not_accelerated)}


@checked
def train(
    config: RunConfig | None,
    *,
    resume: bool | Sequence[str] = False,
    overwrite: bool = False,
    allow_worse: bool = False,
    rows: GivenSplits | None = None,
    config_file: StrPath | None = None,
    group: Group | None = None,
    on_event: Listener | None = None,
) -> "loratune.Adapter":
    """Train an adapter and publish its directory, `config.output_dir`.

    Under a launcher such as torchrun, all processes call it, and the main process publishes. A process trains one
    adapter at a time; other work of its threads has a turn between two steps.

    Args:
        config: The config of the run, which the main process reads; in the others it may be None.
        resume: Continue an interrupted run from its last checkpoint; or a sequence of keys whose values may have
            changed since.
        overwrite: Replace the adapter at `output_dir`, or an unfinished run.
        allow_worse: Publish the adapter even if it is worse than its base, or learned nothing.
        rows: Split → rows in memory, instead of the sources in the config: each a list of dicts, a `datasets.Dataset`
            or a pandas DataFrame.
        config_file: The file of the config, which is then kept when an old adapter is replaced.
        group: The processes of the run; by default those of the launcher, see `join_processes`.
        on_event: Receives events; the last one has the metrics of the adapter.

    Returns:
        The adapter, opened and verified. In processes other than the main one it may not be published yet, and is
        opened on first use.

    Raises:
        ConfigError, ModelError, DataError: The config, the base or the rows cannot be used.
        NumericError: A value is not finite, the adapter is worse than its base, or learned nothing.
        ResumeError: The checkpoint is missing, or belongs to another run.
        LockedError: Another run uses the output directory, or this process trains already.
        ResourceError: Memory or disk ran out.
        LostError: Another process of the run has ended.
        KeyboardInterrupt: The run was interrupted; its last step is saved as a checkpoint.
    """
    group = group or join_processes()
    run_config = _of_main(config, group)
    with listening(on_event if group.main else None):
        with training():
            run, trained = train_now(
                run_config, group, resume=resume, overwrite=overwrite, allow_worse=allow_worse, rows=rows,
                config_file=config_file,
            )  # fmt: skip
        if trained is None:  # the main process may still be publishing
            return loratune.Adapter(run.directory.output, verify=False)
        try:
            adapter = loratune.Adapter(run.directory.output)
            emit(FinishedEvent(PublishedAdapter(run, trained)))
        except StopSignal as stop:
            stop.published = run.directory.output
            raise
        return adapter


def train_now(
    config: RunConfig,
    group: Group = launcher.SINGLE_PROCESS,
    *,
    resume: bool | Sequence[str] = False,
    overwrite: bool = False,
    allow_worse: bool = False,
    rows: GivenSplits | None = None,
    config_file: StrPath | None = None,
) -> "tuple[Run, TrainedAdapter | None]":
    """Train as `train`, in the turn of a caller. Returns the run, and its adapter in the main process."""
    began = time.monotonic()
    place = _run_directory(config, config_file, resume=resume, overwrite=overwrite) if group.main else None
    if "torch" not in sys.modules:
        base, output = config.model.name_or_path, config.output_dir
        note(f"loratune {__version__}: base {base}, adapter {output}; loading the libraries")
    run = validated(config, place, group, resume=resume, rows=rows)
    with default_state():
        with libraries():
            from loratune.training.run import train as train_run

        try:
            return run, train_run(run, group, allow_worse=allow_worse, began=began)
        except StopSignal as stop:
            stop.is_resumable = run.directory.is_resumable()
            raise


@checked
def plan(
    config: RunConfig | None,
    *,
    resume: bool | Sequence[str] = False,
    overwrite: bool = False,
    rows: GivenSplits | None = None,
    config_file: StrPath | None = None,
    group: Group | None = None,
    on_event: Listener | None = None,
) -> "Plan":
    """The plan of `train` with the same arguments, up to its first step: rows, targets, batches, memory.

    Nothing is written. Raises as `train`.
    """
    began = time.monotonic()
    group = group or join_processes()
    run_config = _of_main(config, group)
    with listening(on_event if group.main else None):
        place = None
        if group.main:
            place = _run_directory(run_config, config_file, resume=resume, overwrite=overwrite, dry_run=True)
        run = validated(run_config, place, group, resume=resume, rows=rows)
        with computing():
            with libraries():
                from loratune.training import time_budget
                from loratune.training.plan import make_plan

            made = time_budget.estimate_length(make_plan(run, group), began)
            group.close()
            return made


def join_processes() -> Group:
    """Join the processes that a launcher such as torchrun has started. Raises LostError: one cannot be reached."""
    if launcher.world_size() == 1:
        return launcher.Group()
    with libraries():
        from loratune.training import processes

    return processes.join()


def _of_main(config: RunConfig | None, group: Group) -> RunConfig:
    """The config of a run, which the other processes receive from the main one. Raises ConfigError: that has none."""
    if group.main:
        check("config", config, RunConfig)
    return cast(RunConfig, config)


def _run_directory(
    config: RunConfig,
    config_file: StrPath | None,
    *,
    resume: bool | Sequence[str] = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> "RunDirectory":
    """The directory of a run, checked before its start. Raises ConfigError, ResumeError, LockedError, ResourceError."""
    from loratune.training.checkpoints import run_dir

    file = None if config_file is None else Path(config_file)
    if config.model.device_map is not None and (size := launcher.world_size()) > 1:
        what = f"auto spreads one model over all GPUs, and each of {size} processes would do so"
        fix = "leave it out, or start one process" + (f": loratune train {shell_word(str(file))}" if file else "")
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, str(file or ""), "model.device_map", fix))
    note_portability(config)
    for key, why in config.without_effect().items():
        note(f"{key} has no effect, {why}")
    return run_dir.check(
        config.output_dir, resume=resume is not False, overwrite=overwrite,
        inputs=configs.input_paths(file, config), dry_run=dry_run,
    )  # fmt: skip


def validated(
    config: RunConfig,
    place: "RunDirectory | None",
    group: Group,
    *,
    resume: bool | Sequence[str] = False,
    rows: GivenSplits | None = None,
) -> "Run":
    """Check the run in the main process, before torch is imported, and broadcast it to the others."""
    with libraries():
        from loratune.data.sources import given_rows
        from loratune.training import preflight

    run = None
    if place is not None:
        given = {str(name): given_rows(values, name) for name, values in (rows or {}).items()}
        allowed = None if resume is False else () if resume is True else tuple(resume)
        run = preflight.check(config, place, allowed, given)
    return preflight.broadcast_run(run, group)


def note_portability(config: RunConfig) -> None:
    """Note which programs cannot read adapters trained with a config."""
    for line in configs.portability(config.lora):
        note(line)
