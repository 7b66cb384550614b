"""Checks of a run before torch is imported: rows, location of the model, checkpoint, adapter to start from."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loratune import config, data
from loratune.adapter.directory import MOST_SYSTEM, AdapterDirectory
from loratune.codes import Code
from loratune.config import RunConfig, Source
from loratune.data import RawDatasets, splits
from loratune.data.formats import KINDS
from loratune.data.formats.questions import read_questions
from loratune.data.sources import GIVEN, GivenRows
from loratune.data.sources.files import looks_like_hub_id
from loratune.data.splits import RowHashes
from loratune.errors import AdapterError, ConfigError, DataError, Problem, ResumeError
from loratune.lora import adapter_files
from loratune.model.quantization import check_bitsandbytes
from loratune.model.source import KEY as BASE
from loratune.model.source import is_directory
from loratune.system import launcher
from loratune.system.files import path_problem
from loratune.system.launcher import Group
from loratune.training import auto
from loratune.training.checkpoints.resume import ResumePoint, content_problem, find_resume_point
from loratune.training.checkpoints.run_dir import RunDirectory


@dataclass(frozen=True)
class StartAdapter:
    """The adapter of `lora.start_from`, and the rows of the run that made it.

    Attributes:
        info: The adapter directory.
        digest: See `AdapterFiles.digest`.
        rows: The rows as they were read; None where they are not known, and in a process that has not read them.
        unknown: Why they are not known, or empty.
        trained_on: The hashes of all rows that it was trained on; None as `rows`.
    """

    info: AdapterDirectory
    digest: str
    rows: RawDatasets | None = None
    unknown: str = ""
    trained_on: RowHashes | None = None


@dataclass(frozen=True)
class Run:
    """A checked run: its directory, its resume point, and the rows that were read for it.

    Attributes:
        config: The config, with absolute paths.
        directory: Where the run works.
        rows: The rows as they were read; None in a process that takes them as the main process tokenizes them.
        resume_point: Where the run is resumed, if it is.
        start: The adapter that the run starts from, if it does from one.
    """

    config: RunConfig
    directory: RunDirectory
    rows: RawDatasets | None
    resume_point: ResumePoint | None = None
    start: StartAdapter | None = None

    @property
    def system(self) -> str:
        """The system message that all training rows have, replayed ones too; empty if there is none, or too long."""
        rows = [self.rows]
        rows += [self.start.rows] if self.start is not None and self.config.data.replay is not None else []
        found = {one.train.system if one is not None else "" for one in rows}
        return next(iter(found)) if len(found) == 1 and max(map(len, found)) <= MOST_SYSTEM else ""


_POINT = TypeAdapter(ResumePoint | None)


def broadcast_run(run: Run | None, group: Group) -> Run:
    """The run that the main process has checked, in all processes; the others have no rows yet."""
    own: list[Any] = []
    if run is not None:
        own = [run.config.resolved(), _POINT.dump_python(run.resume_point, mode="json")]
    values = group.broadcast(own)
    if run is not None:
        return run
    config = RunConfig.model_validate(values[0])
    start = _open_start(config, reads_rows=False)
    directory = RunDirectory.at(config.output_dir, overwrite=False)  # only the main process writes
    return Run(config, directory, None, _POINT.validate_python(values[1]), start)


def check(
    config: RunConfig,
    directory: RunDirectory,
    resume: Sequence[str] | None = None,
    given: Mapping[str, GivenRows] | None = None,
) -> Run:
    """Look for the model, and read and check the rows, of a run whose output directory is free. Nothing is written.

    Args:
        config: The config.
        directory: Where the run will work.
        resume: Keys that may have other values than before the interruption; None to start a new run.
        given: The rows of a program for some splits, instead of those that the config names.

    Raises:
        ConfigError: See `quantization.check_bitsandbytes`; there is no such chat template; a setting does not work
            with sharded weights; the package of a tracker is not installed.
        ModelError: See `source.is_directory`.
        AdapterError: The adapter to start from cannot be used, see `AdapterDirectory.open`; or it does not say which
            rows are to be replayed.
        DataError: See `data.read_datasets`; the rows are not those of the objective; as `read_questions`, for the
            prompts of retention.
        ResumeError: See `resume.find_resume_point`; the adapter to start from has changed since the interruption.
    """
    base, template = config.model, config.data.chat_template
    if template is not None and not os.path.isfile(os.path.expanduser(template)):
        what, fix = "there is no such file", "name a Jinja file"
        raise ConfigError(Problem(Code.TEMPLATE_INVALID, what, template, "data.chat_template", fix))
    _check_sharding(config)
    _check_trackers(config.training.report_to)
    check_bitsandbytes(base.quantization)
    is_directory(base.name_or_path, base.revision, base.gguf_file, trusted=base.trust_remote_code)
    absolute = with_absolute_paths(config)
    if given:
        places = {name: Source(path=GIVEN) for name in given}
        absolute = absolute.model_copy(update={"data": absolute.data.model_copy(update=places)})
    point = None
    if resume is not None:
        point = find_resume_point(directory.checkpoints, absolute, resume)
        absolute, _ = auto.with_decided(absolute, point.record.decided)
    if absolute.retention.prompts is not None and absolute.has_retention:
        read_questions(absolute.retention.prompts, absolute.data)
    start = _open_start(absolute, point, reads_rows=True)
    rows = data.read_datasets(absolute.data, config.training.seed, given=given)
    for split in rows.splits.values():
        split.check_kind(KINDS[config.training.objective], config.training.objective)
    return Run(absolute, directory, rows, point, start)


def _open_start(config: RunConfig, point: ResumePoint | None = None, *, reads_rows: bool) -> StartAdapter | None:
    """Open the adapter of `lora.start_from`, and perhaps read the rows of its run. Raises as `check`."""
    if config.lora.start_from is None:
        return None
    directory = Path(config.lora.start_from)
    try:
        files = adapter_files.inspect(directory)
        digest = files.digest
        if point is not None and point.record.fingerprints.get("start", digest) != digest:
            raise ResumeError(content_problem("start"))
        fix = f"restore the file; or remove {adapter_files.RECORD_FILE}, and the adapter is used without verification"
        with files.reading():
            info = AdapterDirectory.open(directory, fix=fix)
            hashes = splits.read_row_hashes(directory) if reads_rows else ""
    except AdapterError as error:
        raise AdapterError(
            [replace(problem, key=problem.key or "lora.start_from") for problem in error.problems]
        ) from None
    if not reads_rows:
        return StartAdapter(info, digest)
    rows, unknown = _earlier_rows(info, is_replayed=config.data.replay is not None)
    return StartAdapter(info, digest, rows, unknown, hashes if isinstance(hashes, RowHashes) else None)


def _earlier_rows(info: AdapterDirectory, *, is_replayed: bool) -> tuple[RawDatasets | None, str]:
    """The rows of the run that made an adapter; or why they are not known.

    Raises AdapterError, DataError: they are to be replayed, and are not known.
    """
    earlier, fix = info.run, "leave data.replay out"
    error: type[AdapterError | DataError] = AdapterError
    fingerprints = info.files.record.get("fingerprints")
    if earlier is None or not isinstance(fingerprints, dict) or "data" not in fingerprints:
        unknown = "the adapter does not record the rows that it was trained on"
        fix += ", and name the rows in data.train"
    elif is_replayed and earlier.training.objective != "sft":
        unknown = f"the adapter was trained on compared answers ({earlier.training.objective}), which are not replayed"
    else:
        try:
            return data.read_datasets(earlier.data, earlier.training.seed, test=False), ""
        except DataError as unreadable:
            error, first, fix = DataError, unreadable.problems[0], f"put the rows back as they were, or {fix}"
            place = first.where if is_replayed else Path(first.where).name
            unknown = f"the rows of the earlier run cannot be read: {place}: {first.what}"
    if is_replayed:
        raise error(Problem(Code.DATA_REPLAY, unknown, str(info.files.path), "data.replay", fix))
    return None, unknown


def _check_sharding(config: RunConfig) -> None:
    """Raises ConfigError: a setting fails in upstream's code where weights are sharded."""
    if not (sharding := launcher.sharding()):
        return
    excluded = {"fsdp": ("8bit",), "deepspeed": ("8bit", "4bit")}[sharding]
    refused = {
        "model.quantization": config.model.quantization in excluded,
        # PEFT does not gather A and B of these
        "lora.target_parameters": sharding == "deepspeed" and bool(config.lora.target_parameters),
        "lora.use_lorafa": config.lora.use_lorafa,
        "training.optim": config.training.optim not in ("adamw_torch", "adamw_torch_fused"),
        "training.max_minutes": config.training.max_minutes is not None,
    }
    what, fix = f"does not work with weights that {sharding} shards", "change it, or start without sharding"
    if keys := [key for key, is_refused in refused.items() if is_refused]:
        raise ConfigError([Problem(Code.DISTRIBUTED_SETTING, what, key=key, fix=fix) for key in keys])


_TRACKER_MODULES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Tracker → the modules that it can use, where they do not have its name."""


def _check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError: the package of a tracker is not installed."""

    def is_installed(module: str) -> bool:
        spec = find_spec(module)
        return spec is not None and spec.origin is not None  # W&B's directory of logs is a package without an origin

    missing = [name for name in names if not any(map(is_installed, _TRACKER_MODULES.get(name, (name,))))]
    if missing:
        what, fix = f"{' and '.join(missing)} is not installed", f"pip install {' '.join(missing)}, or leave it out"
        raise ConfigError(Problem(Code.SYSTEM_MISSING_PACKAGE, what, key="training.report_to", fix=fix))


def with_absolute_paths(run: RunConfig) -> RunConfig:
    """The config with absolute paths, to repeat this run from any directory.

    Raises:
        ConfigError: A path that begins with the working directory is not UTF-8, and could not be recorded.
    """

    def absolute(key: str, path: str) -> str:
        expanded = Path(path).expanduser()
        may_be_hub_id = key == BASE or (key != config.OUTPUT and looks_like_hub_id(path))
        if may_be_hub_id and not expanded.exists():
            return path
        return str(expanded.resolve() if ".." in expanded.parts else expanded.absolute())  # adapters refuse `..`

    result = config.with_paths(run, absolute)
    fix = "start from a directory whose name is UTF-8"
    if problems := [
        Problem(Code.CONFIG_BAD_VALUE, f"the path {reason}", path, key.removesuffix(".path"), fix)
        for key, path in config.paths(result)
        if (reason := path_problem(path))
    ]:
        raise ConfigError(problems)
    return result
