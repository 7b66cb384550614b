"""What `loratune init` begins with, before torch is imported: which files are rows to train on and to validate and test
with, and where the adapter goes.
"""

import os
import re
from pathlib import Path
from typing import Any

from loratune import config
from loratune.config import Draft, RunConfig
from loratune.data.sources.files import data_ending
from loratune.events import note

SOURCE = "init"
"""What the config is called in messages until it is a file."""

_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test",
}  # fmt: skip
"""What files and directories of a split are called → the key that takes them."""

_HELD_OUT = 0.5
"""A fraction of the rows in the place of the one that will be chosen once they are counted."""

_SHOWN = 5
"""Names of files in a message."""


def first_values(rows: str, model: str) -> dict[str, Any]:
    """The values that a config begins with.

    Args:
        rows: The path of the rows, or a hub id.
        model: The directory of the model, or a hub id.
    """
    found, others = _find_splits(rows)
    if others:
        names = ", ".join(others[:_SHOWN]) + (f", and {len(others) - _SHOWN:,} more" if others[_SHOWN:] else "")
        note(f"rows: left out, as the other files are named after splits: {names}")
    splits = {key: paths if paths[1:] else paths[0] for key, paths in found.items()}
    return {"model": {"name_or_path": model}, "data": splits, "output_dir": _free_directory(rows)}


def checked(draft: Draft) -> RunConfig:
    """The config so far, without validation rows unless they are set.

    They may still be chosen, so keys that need them are only refused once that is known.

    Raises:
        ConfigError: A value is invalid whatever will be chosen.
    """
    rows = draft.values.get("data")
    if not isinstance(rows, dict) or "validation" in rows:
        return config.from_draft(draft)
    rows["validation"] = _HELD_OUT
    run = config.from_draft(draft)
    del rows["validation"]
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": None})})


def _find_splits(path: str) -> tuple[dict[str, list[str]], list[str]]:
    """Key of the data section → paths, where a directory has entries that are named after splits; and its other files.

    Anything else, also a directory with no entry for training, is all of it to train on.
    """
    directory = Path(path).expanduser()
    found: dict[str, list[str]] = {}
    others: list[str] = []
    if directory.is_dir() and os.access(directory, os.R_OK):
        for entry in sorted(directory.iterdir()):
            key = _split_key(entry.name.partition(".")[0])
            if key is not None and (entry.is_dir() or data_ending(entry)):
                found.setdefault(key, []).append(os.path.join(path, entry.name))
            elif data_ending(entry) and not entry.is_dir():
                others.append(os.path.join(path, entry.name))
    return (found, others) if "train" in found else ({"train": [path]}, [])


def _split_key(name: str) -> str | None:
    """The key of the data section that a name without its ending stands for: `train`, `dev`, `test-00000-of-00001`."""
    named = re.fullmatch(r"([a-z]+)(?:[-_]?\d[\w-]*)?", name.lower())
    return _SPLITS.get(named[1]) if named else None


def _free_directory(rows: str) -> str:
    """A name for the adapter, after the rows or the directory of a split, that nothing in the working directory has."""
    path = Path(rows).expanduser().absolute()
    stem = path.name if path.is_dir() else path.name.partition(".")[0]
    if _split_key(stem) and path.parent.name:
        stem = path.parent.name
    words = re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:50]
    name = f"{words or 'my'}-adapter"
    taken = {entry.removesuffix(".partial") for entry in os.listdir()}
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in names if candidate not in taken)
