"""The first part of `loratune init`, before torch is imported: finds the files of training, validation and test rows,
and chooses the output directory.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from loratune import config
from loratune.codes import Code
from loratune.config import Draft, RunConfig
from loratune.config.yaml_files import OVERRIDES
from loratune.data.sources import open_source, text_files
from loratune.data.sources.files import data_ending, is_document
from loratune.errors import ConfigError, Problem
from loratune.events import note
from loratune.model.source import is_directory
from loratune.system.output_file import Output
from loratune.text import listed
from loratune.training.checkpoints import run_dir

SOURCE = "init"
"""The name of the config in messages before it is written to a file."""

_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test",
}  # fmt: skip
"""Name of a file or directory → the data key for its split."""

_HELD_OUT = 0.5
"""A placeholder for the fraction of held-out rows, which is chosen once the rows are counted."""


def start(rows: str, model: str, assignments: Sequence[str], output: Output | None = None) -> tuple[Draft, RunConfig]:
    """The initial config for `training.init.init`, without validation rows unless they are set.

    Args:
        rows: The path of the rows, or a hub id.
        model: The directory of the model, or a hub id.
        assignments: Assignments to keys, as for `config.load`.
        output: The file that the config will be written to.

    Raises:
        ConfigError: A value is invalid; rows or model are given twice; the config file would be read as rows;
            output_dir cannot be written.
        DataError, ModelError: The rows or the model do not exist.
    """
    given = {"data.train": "`rows=...`", "model.name_or_path": "`model=...`"}
    for key in (assignment.partition("=")[0].strip() for assignment in assignments):
        if key in given:
            what = f"is also given by {given[key]}"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, OVERRIDES, key, "name it once"))
    if output is not None and data_ending(output.path):
        output.reading(Path(rows).expanduser())  # it would be read as rows itself
    found, others = _find_splits(rows)
    if others:
        note(f"rows: left out, as the other files are named after splits: {listed(others)}")
    splits = {key: paths if paths[1:] else paths[0] for key, paths in found.items()}
    values = {"model": {"name_or_path": model}, "data": splits, "output_dir": _free_directory(rows)}
    draft = config.draft(values, SOURCE, assignments)
    run = _checked(draft)
    files = [file for source in run.data.train_sources for file in text_files(source)]
    if len(files) > 1:
        draft.choose("data.sample_by", "document", "a text file is one row; line reads each of its lines as one")
        run = _checked(draft)
    run_dir.check(run.output_dir, overwrite=True, inputs=config.input_paths(output.path if output else None, run))
    for source in run.data.train_sources:
        open_source(source, run.data.sample_by)
    base = run.model
    is_directory(base.name_or_path, base.revision, base.gguf_file, trusted=base.trust_remote_code)
    return draft, run


def _checked(draft: Draft) -> RunConfig:
    """The config so far. As validation rows may still be chosen, keys that need them are checked later."""
    rows = draft.values.get("data")
    if not isinstance(rows, dict) or "validation" in rows:
        return config.from_draft(draft)
    rows["validation"] = _HELD_OUT
    run = config.from_draft(draft)
    del rows["validation"]
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": None})})


def _find_splits(path: str) -> tuple[dict[str, list[str]], list[str]]:
    """Data key → paths, for a directory with entries named after splits; and its other files.

    Any other path, including a directory without a training entry, is used entirely for training.
    """
    directory = Path(path).expanduser()
    found: dict[str, list[str]] = {}
    others: list[str] = []
    if directory.is_dir() and os.access(directory, os.R_OK):
        for entry in sorted(directory.iterdir()):
            key = _split_key(entry.name.partition(".")[0])
            if key is not None and (entry.is_dir() or (data_ending(entry) and not is_document(entry))):
                found.setdefault(key, []).append(os.path.join(path, entry.name))
            elif data_ending(entry) and not entry.is_dir():
                others.append(os.path.join(path, entry.name))
    return (found, others) if "train" in found else ({"train": [path]}, [])


def _split_key(name: str) -> str | None:
    """The data key for a name without its extension, such as `train`, `dev` or `test-00000-of-00001`."""
    named = re.fullmatch(r"([a-z]+)(?:[-_]?\d[\w-]*)?", name.lower())
    return _SPLITS.get(named[1]) if named else None


def _free_directory(rows: str) -> str:
    """An unused directory name for the adapter, derived from the rows or the parent directory of a split."""
    path = Path(rows).expanduser().absolute()
    stem = path.name if path.is_dir() else path.name.partition(".")[0]
    if _split_key(stem) and path.parent.name:
        stem = path.parent.name
    words = re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:50]
    name = f"{words or 'my'}-adapter"
    taken = {entry.removesuffix(".partial") for entry in os.listdir()}
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in names if candidate not in taken)
