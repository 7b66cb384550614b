"""Checkpoints that are whole or absent.

`transformers.Trainer` writes a checkpoint file by file under its final name, and finds the newest by name alone. Here
it writes into `unfinished/`; files and directory are flushed to the disk, a manifest with their sizes and SHA-256 is
written last, and one rename gives the checkpoint its name.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratune.errors import Problem, ResourceError, ResumeError
from loratune.system import records
from loratune.system.files import explain_full_disk, is_directory, is_file, kind, read_text, sha256, sync, write_json
from loratune.training.belongings import CHECKPOINT, MANIFEST, of_checkpoint, of_checkpoints, remove

_log = logging.getLogger(__name__)

RUN = records.RUN
KEPT = 2
"""How many whole checkpoints are kept."""
_NEEDED = (
    ("adapter_model.safetensors",), ("optimizer.pt", "global_step"), ("scheduler.pt",), ("rng_state",),
    ("trainer_state.json",), (RUN,),
)  # fmt: skip
"""How the names of its files begin, one at least of each: DeepSpeed keeps its optimizer in a directory for the step,
and there is a random state for each process."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in a directory. run: what was run, kept in each of them as JSON; size: bytes that one
    takes, about; written: by this process, and not by another one."""

    directory: Path
    run: Mapping[str, Any]
    size: int
    written: bool = True

    @property
    def unfinished(self) -> Path:
        """Where the trainer writes; what lies there is no checkpoint yet."""
        return self.directory / "unfinished"

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Inside, the trainer writes `unfinished/checkpoint-<step>`; after it, that is a checkpoint, or there is none.

        Raises ResourceError: the disk is full; something else has one of the names.
        """
        if not self.written:
            yield
            return
        written, final = self.unfinished / f"{CHECKPOINT}{step}", self.directory / f"{CHECKPOINT}{step}"
        way_on = self._way_on()
        for path in (self.directory, self.unfinished, final):
            if kind(path) not in ("", "a directory"):
                what = f"is {kind(path)} where a checkpoint is written, and is left alone"
                raise ResourceError(Problem(what, str(path), fix=f"move it away, and {way_on}"))
        _remove(self.unfinished)
        try:
            with explain_full_disk("a checkpoint", self.size, self.directory, f"make room, and {way_on}"):
                yield
                write_json(written / RUN, records.versioned(RUN, self.run))
                seal(written)
                _remove(final)  # it was passed over when the run was resumed
                written.rename(final)
                sync(self.directory)
        finally:
            _remove(self.unfinished)
        self._rotate(final)

    def _way_on(self) -> str:
        """What to do after an error: whether there is something to go on from."""
        there = any(is_file(path / MANIFEST) for path in _found(self.directory))
        return "go on with --resume" if there else "start again"

    def forget(self, step: int) -> int | None:
        """Remove the checkpoint of a step whose weights turned out to be bad; the step of the whole one before it, if
        any."""
        if self.written:
            _remove(self.directory / f"{CHECKPOINT}{step}")
        return next((step_of(path) for path in _found(self.directory) if not _fault(path)), None)

    def _rotate(self, written: Path) -> None:
        """Keep the newest whole ones, the one that was just written among them."""
        others = [path for path in _found(self.directory) if path != written]
        whole = [path for path in others if not _fault(path)]
        for path in others:
            if path not in whole[: KEPT - 1]:
                _remove(path)


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint, then write its manifest of sizes and SHA-256."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        sync(path)
        if path.is_file():
            name = str(path.relative_to(checkpoint))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(checkpoint / MANIFEST, records.versioned(MANIFEST, files))
    sync(checkpoint / MANIFEST)
    sync(checkpoint)


def newest_whole(
    checkpoints: Path, fault_of_run: Callable[[Any], str] = lambda _: ""
) -> tuple[Path, Any, list[Problem]]:
    """The newest checkpoint whose files are what its manifest says, what it keeps of its run, and why newer ones were
    passed over.

    fault_of_run: what is wrong with what was kept of a run, if anything. Raises ResumeError: no checkpoint is whole;
    one is of a newer release, whose records cannot be read here.
    """
    skipped: list[Problem] = []
    for path in _found(checkpoints):
        _check_version(path / MANIFEST)
        fault, run = _fault(path), None
        if not fault:
            _check_version(path / RUN)
            try:
                run = json.loads(read_text(path / RUN))
                fault = fault_of_run(run)
            except (OSError, ValueError, RecursionError) as error:
                fault = f"cannot be read: {error}"
            fault = fault and f"{RUN} is damaged: {fault}"
        if not fault:
            return path, run, skipped
        skipped.append(Problem(f"passed over: {fault}", str(path)))
    fix = "start afresh with --overwrite"
    raise ResumeError([*skipped, Problem("no whole checkpoint to resume from", str(checkpoints), fix=fix)])


def _check_version(path: Path) -> None:
    """Raises ResumeError: a record is of a newer version. One that cannot be read is left to its reader."""
    try:
        reason = records.newer(path.name, json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError):
        return
    if reason:
        raise ResumeError(Problem(reason, str(path), fix="upgrade loratune, or start afresh with --overwrite"))


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were taken before it was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _found(directory: Path) -> list[Path]:
    """The directories that have the name of a checkpoint, the newest first; links to directories are none."""
    named = re.compile(rf"{re.escape(CHECKPOINT)}(0|[1-9][0-9]*)")
    there = [path for path in directory.glob(f"{CHECKPOINT}*") if named.fullmatch(path.name) and is_directory(path)]
    return sorted(there, key=step_of, reverse=True)


def _remove(directory: Path) -> None:
    """Remove a checkpoint, or the directory in which one is written, but for what is not of the trainer's making; a
    link or a file in its place is left alone."""
    if is_directory(directory):
        survey = of_checkpoint if directory.name.startswith(CHECKPOINT) else of_checkpoints
        try:
            remove(directory, survey(directory))
        except OSError:
            _log.debug("%s cannot be removed", directory, exc_info=True)


def _fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    if odd := next(_odd(checkpoint), ""):
        return odd
    try:
        files = json.loads(read_text(checkpoint / MANIFEST))
        if absent := [names for names in _NEEDED if not any(file.startswith(names) for file in files)]:
            return f"{MANIFEST} does not name {absent[0][0]}"
        names = files.keys() - {records.KEY}
        listed = [(checkpoint / name, files[name]["bytes"], files[name]["sha256"]) for name in sorted(names)]
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
            return f"{MANIFEST} names files elsewhere"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _log.debug("%s of %s is damaged", MANIFEST, checkpoint, exc_info=True)
        return f"{MANIFEST} is damaged"
    for path, size, digest in listed:
        try:
            if path.stat().st_size != size or sha256(path) != digest:
                return f"{path.name} is damaged"
        except FileNotFoundError:
            return f"{path.name} is missing"
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
    return ""


def _odd(checkpoint: Path) -> Iterator[str]:
    """What is in a checkpoint that is neither a file nor a directory: nothing of it is followed or opened."""
    for place, directories, files in os.walk(checkpoint):
        for path in (Path(place, name) for name in sorted([*directories, *files])):
            if (found := kind(path)) not in ("a file", "a directory"):
                yield f"{path.relative_to(checkpoint)} is {found}"
