"""The texts on which an export is compared with the adapter it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loratune import data
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.data import DatasetSplit, ProgressFactory
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, Problem
from loratune.system import records

MOST_TEXTS = 32
"""Rows of a file that are compared on."""
FIXED = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What is the largest planet of the solar system?\nA:",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
    "The opposite of cold is",
    "Water boils at a temperature of",
    "Write a haiku about the moon.",
    "SELECT name FROM users WHERE",
    "The three primary colours are",
    "Why is the sky blue?",
)
"""Texts for adapters whose training rows are not known."""

Asked = tuple[Mapping[str, Any], tuple[int, ...]]
"""A row that holds a prompt, and the token ids of the rendered prompt."""


@dataclass(frozen=True)
class Texts:
    """What is compared on.

    Attributes:
        origin: Where the texts come from, for the user.
        ids: The token ids of each.
        complete: Whether answers are part of them; otherwise each is a prompt.
    """

    origin: str
    ids: tuple[tuple[int, ...], ...]
    complete: bool


def texts(
    source: AdapterDirectory,
    renderer: Renderer,
    vocabulary_size: int,
    split: DatasetSplit | None = None,
    watch: ProgressFactory = data.no_progress,
) -> Texts:
    """The rows of a file; without one the prompts that training recorded; without those, fixed texts.

    Args:
        source: The adapter.
        renderer: What renders its rows.
        vocabulary_size: How many tokens the model has.
        split: The rows of the file that the user named.
        watch: Shows progress.

    Raises:
        DataError: Rows of the file cannot be used.
    """
    if split is not None:
        rows = data.prepare(split, renderer, source.data, vocabulary_size, watch).rows
        ids = tuple(tuple(row.ids) for row in islice(rows.rows(), MOST_TEXTS))
        return Texts(f"{_counted(len(ids), 'row')} of {_files(split)}", ids, complete=True)
    if prompts := tuple(ids for _, ids in recorded(source, renderer, vocabulary_size)):
        return Texts(f"{_counted(len(prompts), 'prompt')} of the training rows", prompts, complete=False)
    fixed = tuple(renderer.prompt(text, "") for text in FIXED)
    return Texts(f"{len(fixed)} fixed texts", fixed, complete=False)


def _files(split: DatasetSplit) -> str:
    """The files of the user's rows, without their directories, as the record and the card of an export name them."""
    names = [Path(file.source.name).name for file in split.index.files]
    return names[0] if len(names) == 1 else _counted(len(names), "file")


def recorded(source: AdapterDirectory, renderer: Renderer, vocabulary_size: int) -> list[Asked]:
    """The first prompts that the record of a run holds, see `card.recorded_prompts`, each with its token ids.

    Raises:
        AdapterError: They are none.
    """
    try:
        rows = [*islice(source.files.record.get("prompts", ()), MOST_TEXTS)]
        return [(row, ids) for row in rows if (ids := _checked_ids(row, renderer, vocabulary_size))]
    except Exception as error:  # the record may be a stranger's, and then anything may be wrong with it
        what = f"the prompts recorded there cannot be used: {error}"
        where = str(source.files.path / records.ADAPTER)
        raise AdapterError(Problem(Code.ADAPTER_INVALID_RECORD, what, where, "prompts")) from None


def prompt_ids(row: Mapping[str, Any], renderer: Renderer) -> tuple[int, ...]:
    """The token ids of a prompt, in a row as `card.recorded_prompts` makes it."""
    if "input_ids" in row:
        return tuple(row["input_ids"])
    return renderer.prompt(row.get("messages", row.get("prompt")), "", row.get("tools") or ())


def _checked_ids(row: Any, renderer: Renderer, vocabulary_size: int) -> tuple[int, ...]:
    ids = prompt_ids(row, renderer)
    if "input_ids" in row and any(type(token) is not int or not 0 <= token < vocabulary_size for token in ids):
        raise ValueError("input_ids are not token ids of the base")
    return ids


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
