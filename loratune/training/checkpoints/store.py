"""Checkpoints that are either whole or absent.

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
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open

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
from loratune.training.checkpoints.record import CheckpointRecord
from loratune.training.checkpoints.run_dir import CHECKPOINT, MANIFEST, newer_record_error, scan_checkpoints

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
            progress: Fields of `CheckpointRecord` as of this step.
            is_kept: Whether it becomes a checkpoint; otherwise it is removed as soon as it is whole.

        Raises:
            ResourceError: The disk is full, or something else has the name of the checkpoint.
        """
        source, target = self.unfinished / f"{CHECKPOINT}{step}", self.directory / f"{CHECKPOINT}{step}"
        if not self.is_writer:
            yield source
            return
        resumable = any(is_file(path / MANIFEST) for path in _newest_first(self.directory))
        proceed = "continue with --resume" if resumable else "start again"
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
    what, fix = "there is no whole checkpoint to resume from", "start afresh with --overwrite"
    raise ResumeError([*skipped, Problem(Code.RESUME_CHECKPOINT, what, str(checkpoints), fix=fix)])


def check_tensors(checkpoint: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the weights of a checkpoint are those that a run trains.

    Args:
        checkpoint: The checkpoint, whose files are what its manifest says.
        expected: Name → shape of each tensor that is trained.

    Raises:
        ResumeError: Some are missing, have another shape, or belong to other modules.
    """
    with safe_open(checkpoint / WEIGHTS_FILE, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    differing = [name for name, shape in expected.items() if found.get(name) != shape]
    differing += [name for name in found if name not in expected and ".lora_" in name]  # PEFT may add embeddings
    if differing:
        what = f"{len(differing)} tensors are not those that the run trains, among them {differing[0]}"
        fix = "its record is not the one that it was written with; start afresh with --overwrite"
        raise ResumeError(Problem(Code.RESUME_CHANGED, what, str(checkpoint), fix=fix))


def _check_version(path: Path) -> None:
    """Raises ResumeError: a record is of a newer version. One that cannot be read is left to its reader."""
    try:
        reason = newer(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError):
        return
    if reason:
        raise newer_record_error(path, reason)


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
