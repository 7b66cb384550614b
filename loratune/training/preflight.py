"""What can be known before torch is imported: is the output free, are the rows sound, is the adapter readable."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loratune import config, data
from loratune.config import DataSection, ModelSection, RunConfig, Source
from loratune.data import ProgressFactory, RawDatasets
from loratune.data.sources import looks_like_hub_id
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.lora import adapter_files
from loratune.lora.adapter_files import AdapterFiles
from loratune.model import quantization
from loratune.model.source import is_directory, local_or_hub
from loratune.system import launcher
from loratune.system.files import path_problem
from loratune.system.launcher import Group
from loratune.training import resume as resuming
from loratune.training.resume import Resumed
from loratune.training.run_dir import RunDirectory


@dataclass(frozen=True)
class ValidatedRun:
    """A run that may begin.

    config: with absolute paths; rows: None in a process that takes them as the main one leaves them; allowed: keys with
    other values than before; resumed: where it goes on, if it does.
    """

    config: RunConfig
    space: RunDirectory
    rows: RawDatasets | None
    allowed: Sequence[str] = ()
    resumed: Resumed | None = None

    def as_json(self) -> dict[str, Any]:
        """All but the rows, as plain values, for the processes that take them as the main one leaves them."""
        plain = {name: _PLAIN[name].dump_python(getattr(self, name), mode="json") for name in _PLAIN}
        return {"config": self.config.resolved(), **plain}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ValidatedRun":
        """What `as_json` gave, without rows."""
        plain = {name: _PLAIN[name].validate_python(values[name]) for name in _PLAIN}
        return cls(RunConfig.model_validate(values["config"]), rows=None, **plain)


_PLAIN: dict[str, TypeAdapter[Any]] = {
    "space": TypeAdapter(RunDirectory), "allowed": TypeAdapter(tuple[str, ...]), "resumed": TypeAdapter(Resumed | None),
}  # fmt: skip
"""How the fields of `ValidatedRun` that are no sections become plain values and come back, by their types."""


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter directory and what it says of its training.

    base: how the base was held; data: how rows were read; chat: they went through the chat template; run: the recorded
    config, None if loratune did not write it; forced: the user wants it used whatever it was trained on.
    """

    saved: AdapterFiles
    base: ModelSection
    data: DataSection
    chat: bool
    run: RunConfig | None
    forced: bool = False


def check(
    run: RunConfig, space: RunDirectory, watch: ProgressFactory, resume: Sequence[str] | None = None
) -> ValidatedRun:
    """Look for the model, and read and check the rows, of a run whose output directory is free; nothing is written.

    resume: go on from a checkpoint, with other values of these keys; None: start.

    Raises ConfigError: see `quantized.check_bitsandbytes`; no such chat template; what sharded weights exclude. Raises
    ModelError: see `places.is_directory`, `quantized.check_directory`. Raises DataError: see `data.read_datasets`.
    Raises ResumeError: see `resuming.find`.
    """
    base, template = run.model, run.data.chat_template
    if template is not None and not os.path.isfile(os.path.expanduser(template)):
        raise ConfigError(Problem("no such file", template, "data.chat_template", "name a Jinja file"))
    _check_sharding(run)
    quantization.check_bitsandbytes(base.quantization)
    if is_directory(base.name_or_path, base.revision, base.gguf_file, trusted=base.trust_remote_code):
        quantization.check_directory(Path(local_or_hub(base.name_or_path)), base.name_or_path, base.quantization)
    pinned = _pinned(run)
    resumed = resuming.find(space.checkpoints, pinned.resolved(), resume) if resume is not None else None
    return ValidatedRun(
        pinned, space, data.read_datasets(run.data, run.training.seed, watch), tuple(resume or ()), resumed
    )


def _check_sharding(run: RunConfig) -> None:
    """Raises ConfigError: what does not work where weights are spread over processes: upstream's own failures."""
    how = launcher.sharding()
    bad = {"fsdp": ("8bit",), "deepspeed": ("8bit", "4bit")}.get(how, ())
    held, optim = run.model.quantization, run.training.optim
    asked = {
        "model.quantization": held if held in bad else None,
        "lora.use_lorafa": "true" if run.lora.use_lorafa else None,
        "training.optim": optim if optim not in ("adamw_torch", "adamw_torch_fused") else None,
    }
    if how:
        what, fix = f"does not work with weights that are spread by {how}", "change it, or start without"
        if problems := [Problem(f"{value} {what}", key=key, fix=fix) for key, value in asked.items() if value]:
            raise ConfigError(problems)


def shared(ready: ValidatedRun | None, group: Group) -> ValidatedRun:
    """What the main process has checked, in all of them; the others have no rows yet."""
    known = group.broadcast(ready.as_json() if ready else None)
    assert known is not None
    return ready or ValidatedRun.from_json(known)


def _pinned(run: RunConfig) -> RunConfig:
    """The config as it would repeat this run from anywhere: with absolute paths."""

    def absolute(path: str) -> str:
        there = Path(path).expanduser()
        return path if looks_like_hub_id(path) and not there.exists() else str(there.absolute())

    def pinned(value: Any) -> Any:
        if isinstance(value, list):
            return [pinned(one) for one in value]
        return value.model_copy(update={"path": absolute(value.path)}) if isinstance(value, Source) else value

    rows = run.data
    changes: dict[str, Any] = {"train": pinned(rows.train), "validation": pinned(rows.validation)}
    if rows.chat_template:
        changes["chat_template"] = absolute(rows.chat_template)
    named = run.model.model_copy(update={"name_or_path": local_or_hub(run.model.name_or_path)})
    output = str(Path(run.output_dir).expanduser().absolute())
    made = run.model_copy(update={"data": rows.model_copy(update=changes), "model": named, "output_dir": output})
    _check_recordable(made)
    return made


def _check_recordable(run: RunConfig) -> None:
    """Raises ConfigError: a path that begins with the working directory is no text, and could not be recorded."""
    rows = run.data
    paths = [("output_dir", run.output_dir), ("model.name_or_path", run.model.name_or_path)]
    paths += [("data.chat_template", rows.chat_template)] if rows.chat_template else []
    paths += [("data.train", source.path) for source in rows.train_sources]
    paths += [("data.validation", source.path) for source in rows.validation_sources]
    fix = "start from a directory whose name is UTF-8"
    if problems := [Problem(f"the path {why}", path, key, fix) for key, path in paths if (why := path_problem(path))]:
        raise ConfigError(problems)


def open_adapter(
    directory: Path,
    log: Callable[[str], None] = lambda _: None,
    *,
    forced: bool = False,
    assignments: Sequence[str] = (),
) -> AdapterInfo:
    """Open an adapter directory. What its run.yaml says of code to trust is not believed.

    assignments: of keys of its data section, as of `config.load`; forced: go on where files have changed since they
    were saved, and log it. Raises AdapterError: see `saved.inspect`; files that have changed; a run.yaml that is none.
    Raises ConfigError: see `config.load`.
    """
    found = adapter_files.inspect(directory)
    edits = found.edits()
    if not found.record.get("files"):
        log(f"{directory}: keeps no record of its files and its base, so neither was verified")
    if edits and not forced:
        raise AdapterError([replace(edit, fix="use it all the same with --force") for edit in edits])
    for edit in edits:
        log(str(edit))
    try:
        base = ModelSection(name_or_path=found.base, revision=found.config.get("revision"))
    except ValidationError:
        where = str(directory / adapter_files.CONFIG_FILE)
        raise AdapterError(Problem("not the name of a base", where, "base_model_name_or_path")) from None
    if not (directory / "run.yaml").is_file():
        if assignments:
            raise ConfigError(Problem("the adapter has no run.yaml whose keys could be set", str(directory), "--set"))
        recorded = base.model_copy(update={"gguf_file": _recorded_gguf(found)})
        return AdapterInfo(found, recorded, DataSection(train=Source(path="unknown")), False, None, forced)
    try:
        run = config.load(directory / "run.yaml")
    except ConfigError as error:
        raise AdapterError(error.problems) from None
    if beyond := [one for one in assignments if not one.startswith("data.")]:
        raise ConfigError(Problem(f"`{beyond[0]}` is decided by training", key="--set", fix="only data.* can be set"))
    run = config.load(directory / "run.yaml", assignments) if assignments else run
    held = run.model.model_dump(include={"gguf_file", "dtype", "quantization", "attn_implementation"})
    return AdapterInfo(found, base.model_copy(update=held), run.data, found.record.get("chat") is True, run, forced)


def _recorded_gguf(found: AdapterFiles) -> str | None:
    """Which GGUF file the provenance of an adapter names within its base; None without a record, or a GGUF file."""
    if not found.record:
        return None
    where = str(found.path / adapter_files.RECORD_FILE)
    if not isinstance(base := found.record.get("base"), dict):
        raise AdapterError(Problem("does not say what the base is", where, "base"))
    file = base.get("gguf_file")
    if file is not None and (not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts):
        raise AdapterError(Problem(f"not the name of a file: {file!r}", where, "base.gguf_file"))
    return file
