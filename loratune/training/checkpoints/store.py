"""Checkpoints that are either whole or absent, and their record, `run.json`. This module does not import torch.

`transformers.Trainer` writes a checkpoint file by file under its final name, and finds the newest by its name alone.
Here the trainer writes into `unfinished/`; its files and the directory are flushed to the disk, a manifest with their
sizes and SHA-256 is written last, and one rename gives the checkpoint its name.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as validated_dataclass

from loratune.codes import Code
from loratune.errors import Problem, ResourceError, ResumeError
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.system.directories import remove_own
from loratune.system.files import (
    VERSION_KEY,
    explain_full_disk,
    is_directory,
    is_file,
    kind,
    newer,
    read_text,
    sha256,
    sync,
    versioned,
    write_json,
)
from loratune.training import auto
from loratune.training.checkpoints.run_dir import CHECKPOINT, MANIFEST, scan_checkpoints

_log = logging.getLogger(__name__)

RUN = "run.json"
BEST_WEIGHTS = "best.safetensors"
"""The weights of the best step so far, where that is not the step of the checkpoint."""
MOST_CHECKPOINTS = 2
"""How many whole checkpoints a run keeps."""
_NEEDED = (
    (WEIGHTS_FILE,), ("optimizer.pt", "global_step"), ("scheduler.pt",), ("rng_state",),
    ("trainer_state.json",), (RUN,),
)  # fmt: skip
"""A checkpoint needs a file of each of these kinds, whose name begins with one of the given texts.

DeepSpeed keeps its optimizer in a directory named after the step, and there is a random state for each process.
"""
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_EXACT = ConfigDict(allow_inf_nan=False, extra="forbid")
_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]


@validated_dataclass(config=_EXACT)
class StepLosses:
    """The losses of the steps since the last report, which gives their mean.

    Trainer's own mean is only of those since the run was started or resumed. A checkpoint keeps these, so that a
    resumed run reports what an uninterrupted one does.

    Attributes:
        total: Their sum, in nats per supervised token.
        steps: How many steps there were.
    """

    total: StrictFloat = 0.0
    steps: _Count = 0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self.total, self.steps = self.total + loss, self.steps + 1

    def take_mean(self) -> float:
        """Their mean, after which there are none. Raises ZeroDivisionError: there are none."""
        mean = self.total / self.steps
        self.total, self.steps = 0.0, 0
        return mean


@validated_dataclass(frozen=True, config=_EXACT)
class BestRecord:
    """The record of the evaluations of a run.

    Attributes:
        step: The step with the lowest held-out loss, the first of them if several have it.
        loss: That loss, in nats per supervised token.
        evaluations: How many evaluations there were.
        since: How many of them came after that step.
    """

    step: Annotated[int, Field(strict=True, ge=1)]
    loss: StrictFloat
    evaluations: _Count = 1
    since: _Count = 0

    def __post_init__(self) -> None:
        """Raises ValueError: more evaluations came after the best one than there were."""
        if self.since >= self.evaluations:
            raise ValueError("since is not below evaluations")

    def after(self, step: int, loss: float) -> "BestRecord":
        """The record after one more evaluation."""
        if loss < self.loss:
            return BestRecord(step, loss, self.evaluations + 1)
        return BestRecord(self.step, self.loss, self.evaluations + 1, self.since + 1)


class _TrainingValues(BaseModel):
    """The values of the section `training` that resuming uses."""

    model_config = _STRICT

    learning_rate: Annotated[float, Field(gt=0)]
    per_device_train_batch_size: _Count
    gradient_accumulation_steps: _Count
    max_steps: Annotated[int, Field(lt=1 << 31)] = -1


def _checked_config(config: dict[str, Any]) -> dict[str, Any]:
    _TrainingValues.model_validate(config.get("training"))
    return config


def _checked_changes(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any({"step", "key", "was", "is"} - change.keys() for change in changes):
        raise ValueError("a change has no step, key, was or is")
    return changes


class CheckpointRecord(BaseModel):
    """What a checkpoint keeps of its run.

    Attributes:
        config: The config, with absolute paths and without `auto`.
        fingerprints: Of everything that the run reads, see `resume.CONTENTS`.
        rows: Counts of the training rows, `rows` and `tokens` among them.
        conditions: The software and hardware, see `conditions`; None if an earlier release wrote it.
        processes: How many processes the run has.
        sharding: How they shard the weights, see `launcher.sharding`.
        changes: What changed when the run was resumed: at which step, which key, from which value to which.
        decided: Full key → value of all that `auto` and a time budget have decided, see `auto.decided_values`.
        max_minutes: The time budget by which `training.max_steps` was decided.
        best: The record of the evaluations.
        unreported: The losses of the steps that were not reported yet.
        divergences: Their divergences from the base, with `retention`.
        seconds: The duration of training.
    """

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    config: Annotated[dict[str, Any], AfterValidator(_checked_config)]
    fingerprints: dict[str, StrictStr | None]
    rows: dict[str, Any]
    conditions: dict[str, str] | None = None
    processes: _Count = 1
    sharding: StrictStr = ""
    changes: Annotated[list[dict[str, Any]], AfterValidator(_checked_changes)]
    decided: dict[str, Any]
    max_minutes: StrictFloat | None = None
    best: BestRecord | None = None
    unreported: StepLosses | None = None
    divergences: StepLosses | None = None
    seconds: Annotated[float, Field(strict=True, ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_release(cls, values: Any) -> Any:
        """A record that does not have what was decided, which then is in its config."""
        if isinstance(values, dict) and "decided" not in values and isinstance(values.get("config"), dict):
            return {**values, "decided": auto.recorded_values(values["config"])}
        return values

    @model_validator(mode="after")
    def _check(self) -> "CheckpointRecord":
        if None in (self.fingerprints.get("base"), self.fingerprints.get("data")):
            raise ValueError("a fingerprint is missing")
        steps = self.decided.get("training.max_steps")
        if self.max_minutes is not None and not (isinstance(steps, int) and steps > 0):
            raise ValueError("a time budget without steps")
        return self

    def changed_conditions(self, now: Mapping[str, str], step: int) -> list[dict[str, Any]]:
        """Conditions that differ after this step, in the form of `changes`.

        The run continues all the same: its numbers are as good, but their last bits may differ.
        """
        old = self.conditions or {}
        return [
            {"step": step, "key": name, "was": old[name], "is": value}
            for name, value in now.items()
            if name in old and old[name] != value
        ]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        directory: Where they are.
        record: What the run is; it is kept in each checkpoint.
        size: About how many bytes a checkpoint takes.
        is_writer: Whether this process writes them, and no other one.
    """

    directory: Path
    record: CheckpointRecord
    size: int
    is_writer: bool = True

    @property
    def unfinished(self) -> Path:
        """Where the trainer writes. What is there is no checkpoint yet."""
        return self.directory / "unfinished"

    @contextmanager
    def writing(self, step: int, progress: Mapping[str, Any] | None = None, *, is_kept: bool = True) -> Iterator[Path]:
        """Turn what the trainer writes inside to the directory that is given into a checkpoint, or remove it.

        Args:
            step: The step.
            progress: Fields of `CheckpointRecord` at this step.
            is_kept: Whether it becomes a checkpoint; otherwise it is removed as soon as it is whole.

        Raises:
            ResourceError: The disk is full, or something else has the name of the checkpoint.
        """
        source, target = self.unfinished / f"{CHECKPOINT}{step}", self.directory / f"{CHECKPOINT}{step}"
        if not self.is_writer:
            yield source
            return
        resumable = any(is_file(path / MANIFEST) for path in _newest_first(self.directory))
        proceed = "continue with `resume=True`" if resumable else "start again"
        for path in (self.directory, self.unfinished, target):
            if kind(path) not in ("", "a directory"):
                what, fix = f"is {kind(path)} where a checkpoint is to be written", f"move it away, and {proceed}"
                raise ResourceError(Problem(Code.OUTPUT_UNUSABLE, what, str(path), fix=fix))
        _remove(self.unfinished)
        try:
            with explain_full_disk("a checkpoint", self.size, self.directory, f"make room, and {proceed}"):
                yield source
                record = self.record.model_copy(update=dict(progress or {}))
                write_json(source / RUN, versioned(record.model_dump(mode="json")))
                seal(source)
                if not is_kept:
                    return
                _remove(target)  # a damaged checkpoint of this step may have been skipped when the run was resumed
                source.rename(target)
                sync(self.directory)
        finally:
            _remove(self.unfinished)
        self._rotate(target)

    def discard(self, step: int) -> int | None:
        """Remove the checkpoint of a step whose weights turned out to be bad.

        Returns:
            The step of the newest whole checkpoint that is left, None without one.
        """
        if self.is_writer:
            _remove(self.directory / f"{CHECKPOINT}{step}")
        return next((step_of(path) for path in _newest_first(self.directory) if not _fault(path)), None)

    def _rotate(self, newest: Path) -> None:
        """Remove all but the newest whole checkpoints; `newest` is known to be whole."""
        others = [path for path in _newest_first(self.directory) if path != newest]
        whole = [path for path in others if not _fault(path)]
        for path in others:
            if path not in whole[: MOST_CHECKPOINTS - 1]:
                _remove(path)


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint, then write its manifest of sizes and SHA-256."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        sync(path)
        if path.is_file():
            name = str(path.relative_to(checkpoint))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(checkpoint / MANIFEST, versioned(files))
    sync(checkpoint / MANIFEST)
    sync(checkpoint)


def newest_whole(checkpoints: Path) -> tuple[Path, CheckpointRecord, list[Problem]]:
    """Find the newest checkpoint whose files are what its manifest says.

    Args:
        checkpoints: The directory of all checkpoints.

    Returns:
        The checkpoint, the record of its run, and a problem for each newer one that was skipped.

    Raises:
        ResumeError: No checkpoint is whole, or a record was written by a newer release.
    """
    skipped: list[Problem] = []
    for path in _newest_first(checkpoints):
        _check_version(path / MANIFEST)
        if not (fault := _fault(path)):
            _check_version(path / RUN)
            try:
                return path, CheckpointRecord.model_validate(json.loads(read_text(path / RUN))), skipped
            except ValidationError:
                fault = "it is not the record of a run"
            except (OSError, ValueError, RecursionError) as error:
                fault = f"it cannot be read: {error}"
            fault = f"{RUN} is damaged: {fault}"
        skipped.append(Problem(Code.RESUME_CHECKPOINT, f"checkpoint skipped: {fault}", str(path)))
    what, fix = "there is no whole checkpoint to resume from", "start afresh with `overwrite=True`"
    raise ResumeError([*skipped, Problem(Code.RESUME_CHECKPOINT, what, str(checkpoints), fix=fix)])


def _check_version(path: Path) -> None:
    """Raises ResumeError: a record is of a newer version. One that cannot be read is left to its reader."""
    try:
        reason = newer(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError):
        return
    if reason:
        fix = "upgrade loratune, or start afresh with `overwrite=True`"
        raise ResumeError(Problem(Code.ADAPTER_NEWER_RECORD, reason, str(path), fix=fix))


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps were taken before the checkpoint was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _newest_first(directory: Path) -> list[Path]:
    """The directories that are named like a checkpoint, the newest first. Links to directories do not count."""
    pattern = re.compile(rf"{re.escape(CHECKPOINT)}(0|[1-9][0-9]*)")
    paths = [path for path in directory.glob(f"{CHECKPOINT}*") if pattern.fullmatch(path.name) and is_directory(path)]
    return sorted(paths, key=step_of, reverse=True)


def _remove(directory: Path) -> None:
    """Remove a checkpoint, or the directory in which one is written, except for files that no trainer made.

    A link or a file in its place is left alone.
    """
    if is_directory(directory):
        try:
            remove_own(directory, scan_checkpoints(directory))
        except OSError:
            _log.debug("%s cannot be removed", directory, exc_info=True)


def _fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    if special := next(_special_files(checkpoint), ""):
        return special
    try:
        files = json.loads(read_text(checkpoint / MANIFEST))
        if missing := [prefixes for prefixes in _NEEDED if not any(name.startswith(prefixes) for name in files)]:
            return f"{MANIFEST} does not name {missing[0][0]}"
        names = files.keys() - {VERSION_KEY}
        expected = [(checkpoint / name, files[name]["bytes"], files[name]["sha256"]) for name in sorted(names)]
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
            return f"{MANIFEST} names files outside of the checkpoint"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _log.debug("%s of %s is damaged", MANIFEST, checkpoint, exc_info=True)
        return f"{MANIFEST} is damaged"
    for path, size, digest in expected:
        try:
            if path.stat().st_size != size or sha256(path) != digest:
                return f"{path.name} is damaged"
        except FileNotFoundError:
            return f"{path.name} is missing"
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
    return ""


def _special_files(checkpoint: Path) -> Iterator[str]:
    """What is in a checkpoint that is neither a file nor a directory. It is neither followed nor opened."""
    for place, directories, files in os.walk(checkpoint):
        for path in (Path(place, name) for name in sorted([*directories, *files])):
            if (file_kind := kind(path)) not in ("a file", "a directory"):
                yield f"{path.relative_to(checkpoint)} is {file_kind}"
