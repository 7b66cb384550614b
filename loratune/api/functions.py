"""The functions of the public API."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from loratune import __version__
from loratune import config as configs
from loratune.api import Overrides, Rows, StrPath, assignments, computing, default_state, libraries, training
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.config.arguments import check, checked, plain
from loratune.errors import ConfigError, Problem
from loratune.events import FinishedEvent, Listener, emit, listening, note
from loratune.system import launcher, output_file
from loratune.system.launcher import Group
from loratune.system.signals import StopSignal
from loratune.text import shell_word

if TYPE_CHECKING:
    from loratune.api.adapter import Adapter
    from loratune.commands.env import Environment
    from loratune.commands.explain import Explanation
    from loratune.commands.params import Params
    from loratune.export.hub import Upload
    from loratune.lora.stats import AdapterStats
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
def load_config(source: StrPath | Mapping[str, Any], overrides: Overrides = ()) -> RunConfig:
    """Read a config from a YAML file, or from plain values.

    Args:
        source: The file; or its values as a nested mapping: `{"model": {"name_or_path": ...}}`.
        overrides: Dotted key → value, such as `{"training.max_steps": 50}`.

    Raises:
        ConfigError: The config is not valid; lists every problem. (`RunConfig(...)` raises pydantic's
            `ValidationError`.)
    """
    if isinstance(source, Mapping):
        return configs.from_values(plain(source), "the config", assignments(overrides))
    return configs.load(Path(source), assignments(overrides))


@checked
def explain(key: str | None = None, path: StrPath | None = None, overrides: Overrides = ()) -> "Explanation":
    """Explain keys of a config: meaning, cost, and with a config file the effective values.

    Args:
        key: A key, its beginning, or another tool's name for it; by default all keys.
        path: The config file.
        overrides: As for `load_config`.

    Raises:
        ConfigError: The key is unknown, or the config is not valid; overrides are given without one.
    """
    if path is None and overrides:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with a config", key="overrides"))
    from loratune.commands.explain import explain as explain_keys

    found = explain_keys(key, None if path is None else Path(path), assignments(overrides))
    if found.config and found.decides_servers:
        with computing():
            from loratune.commands import params

            found = replace(found, servers=params.servers(found.config[0]))
    return found


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
) -> "Adapter":
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
        from loratune.api.adapter import Adapter

        if trained is None:  # the main process may still be publishing
            return Adapter.later(run.directory.output)
        try:
            adapter = Adapter(run.directory.output)
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
            from loratune.commands import train

        try:
            return run, train.train(run, group, allow_worse=allow_worse, began=began)
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


@checked
def init(
    rows: StrPath,
    *,
    model: StrPath,
    output: StrPath | None = None,
    overrides: Overrides = (),
    on_event: Listener | None = None,
) -> RunConfig:
    """Choose a config for rows and a model. No weights are loaded or downloaded.

    Args:
        rows: The path of the rows, or a hub id.
        model: The directory of the model, or a hub id.
        output: A new file to write the config to, with the reason for each choice.
        overrides: Dotted key → value, for keys with a fixed value.
        on_event: Receives events; the last one has the config as text, and estimates for its run.

    Raises:
        ConfigError, ModelError, DataError: A value, the model or the rows cannot be used.
    """
    with listening(on_event):
        file = output_file.output(Path(output), "--output", overwrite=None) if output is not None else None
        with libraries():
            from loratune.commands import init_start

        draft, run = init_start.start(fspath(rows), fspath(model), assignments(overrides), file)
        with computing():
            with libraries():
                from loratune.commands import init

            started = init.init(run, draft)
        if file is not None:
            with file.opened() as writable:
                writable.write(started.text)
        emit(FinishedEvent(started))
        return started.run


@checked
def count_parameters(config: RunConfig, *, on_event: Listener | None = None) -> "Params":
    """Count trainable parameters and estimate the memory for training, from the model's configuration alone.

    Raises:
        ModelError, ConfigError, AdapterError: The model's configuration, the targets, or the adapter to start from
            cannot be used.
    """
    with listening(on_event):
        note_portability(config)
        with computing():
            with libraries():
                from loratune.commands import params

            return params.params(config)


@checked
def environment(*, self_test: bool = False, on_event: Listener | None = None) -> "Environment":
    """Find out what this machine has for training, and what to do where something is slow or missing.

    Args:
        self_test: Also train, load and generate with tiny random models on this machine's device, and compare the
            results with those of stock transformers and PEFT; takes up to a minute.
        on_event: Receives events.
    """
    with listening(on_event):
        with libraries():
            from loratune.commands import env

        if not self_test:
            return env.describe()
        with training(), default_state():
            with libraries():
                from loratune.api import self_test as tests

            checks = tests.run()
        return replace(env.describe(), checks=checks)  # the page names what failed now


@checked
def push(
    path: StrPath,
    repository: str,
    *,
    public: bool = False,
    base: str | None = None,
    with_system: bool = False,
    on_event: Listener | None = None,
) -> "Upload":
    """Upload an adapter directory to the hub, see `Adapter.push`."""
    with listening(on_event):
        with libraries():
            from loratune.commands import push
            from loratune.export import hub
            from loratune.lora import adapter_files

        hub.check_name(repository)
        files = adapter_files.inspect(Path(path))
        return push.push(files, repository, public=public, base=base, with_system=with_system)


@checked
def adapter_stats(path: StrPath) -> "AdapterStats":
    """Statistics from the files of an adapter, without its base: rank, scaling, norm and effective rank of each update.

    Raises AdapterError: It is not an adapter directory, or its tensors are not finite or have mismatched shapes.
    """
    with computing():
        from loratune.lora import adapter_files, stats

        return stats.adapter_stats(adapter_files.inspect(Path(path)))


@checked
def report_study(directory: StrPath, output: StrPath, *, overwrite: bool = False) -> Path:
    """Write an HTML page on the study of a sweep. Returns the file.

    Raises ConfigError: The directory does not hold a study, or the file cannot be written.
    """
    file = output_file.output(
        Path(output), "--output", overwrite=overwrite, inputs=[Path(directory)], begins=output_file.HTML
    )
    with libraries():
        from loratune.commands import report

    file = file.reading(*report.study_inputs(Path(directory)))
    text = report.study_report(Path(directory))
    with file.opened() as writable:
        writable.write(text)
    return file.path


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
