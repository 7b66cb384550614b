"""Checkpoints of the trainer that are known to be whole.

`transformers.Trainer` writes a checkpoint file by file under its final name, and finds the newest by name alone.
A manifest written after the last file says which ones are whole; a checkpoint without a true one is passed over.
"""

import hashlib
import json
from pathlib import Path

from loratune.errors import Problem, ResumeError
from loratune.workspace import sync, write_json

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint, then write its manifest of sizes and SHA-256."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    temporary = checkpoint / f".{MANIFEST}"
    write_json(temporary, files)
    sync(temporary)
    temporary.rename(checkpoint / MANIFEST)
    sync(checkpoint)


def newest_whole(checkpoints: Path) -> tuple[Path, list[Problem]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones were passed over.

    Raises ResumeError: no checkpoint is whole.
    """
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    skipped: list[Problem] = []
    for path in sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True):
        if fault := _fault(path):
            skipped.append(Problem(f"passed over: {fault}", str(path)))
        else:
            return path, skipped
    fix = "start afresh with --overwrite"
    raise ResumeError([*skipped, Problem("no whole checkpoint to resume from", str(checkpoints), fix=fix)])


def _fault(checkpoint: Path) -> str:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return "it was not written to its end"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{name} is damaged"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
