"""Checkpoints that are whole or absent.

`transformers.Trainer` writes a checkpoint file by file under its final name, and finds the newest by name alone. Here
it writes into `unfinished/`; files and directory are flushed to the disk, a manifest with their sizes and SHA-256 is
written last, and one rename gives the checkpoint its name.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.digests import sha256
from loratune.errors import Problem, ResumeError
from loratune.workspace import room_for, sync, write_json

MANIFEST = "manifest.json"
RUN = "run.json"
PREFIX = "checkpoint-"
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

        Raises ResourceError: the disk is full.
        """
        if not self.written:
            yield
            return
        written, final = self.unfinished / f"{PREFIX}{step}", self.directory / f"{PREFIX}{step}"
        shutil.rmtree(self.unfinished, ignore_errors=True)
        try:
            with room_for("a checkpoint", self.size, self.directory, "make room, and go on with --resume"):
                yield
                write_json(written / RUN, self.run)
                seal(written)
                if final.exists():  # it was passed over when the run was resumed
                    shutil.rmtree(final)
                written.rename(final)
                sync(self.directory)
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self._rotate(final)

    def forget(self, step: int) -> int | None:
        """Remove the checkpoint of a step whose weights turned out to be bad; the step of the one before it, if any."""
        if self.written and (bad := self.directory / f"{PREFIX}{step}").exists():
            shutil.rmtree(bad)
        return next(map(step_of, _found(self.directory)), None)

    def _rotate(self, written: Path) -> None:
        """Keep the newest whole ones, the one that was just written among them."""
        others = [path for path in _found(self.directory) if path != written]
        whole = [path for path in others if not _fault(path)]
        for path in others:
            if path not in whole[: KEPT - 1]:
                shutil.rmtree(path)


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint, then write its manifest of sizes and SHA-256."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        sync(path)
        if path.is_file():
            name = str(path.relative_to(checkpoint))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(checkpoint / MANIFEST, files)
    sync(checkpoint / MANIFEST)
    sync(checkpoint)


def newest_whole(checkpoints: Path) -> tuple[Path, list[Problem]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones were passed over.

    Raises ResumeError: no checkpoint is whole.
    """
    skipped: list[Problem] = []
    for path in _found(checkpoints):
        if fault := _fault(path):
            skipped.append(Problem(f"passed over: {fault}", str(path)))
        else:
            return path, skipped
    fix = "start afresh with --overwrite"
    raise ResumeError([*skipped, Problem("no whole checkpoint to resume from", str(checkpoints), fix=fix)])


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were taken before it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def _found(directory: Path) -> list[Path]:
    """The directories that have the name of a checkpoint, the newest first."""
    there = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(there, key=step_of, reverse=True)


def _fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        if absent := [names for names in _NEEDED if not any(file.startswith(names) for file in files)]:
            return f"{MANIFEST} does not name {absent[0][0]}"
        listed = [(checkpoint / name, expected["bytes"], expected["sha256"]) for name, expected in files.items()]
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
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
