"""Tokenizes and measures all rows, or a sample, without a config that says how long they are, for `loratune init`."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import data
from loratune.config import DataSection
from loratune.data import DatasetSplit, RawDatasets, fields
from loratune.data.fields import LABEL_TOKENS, Classes, ColumnChoice
from loratune.data.formats import PAIRS, UNPAIRED
from loratune.data.holding_out import random_mask
from loratune.data.packing import BatchLayout
from loratune.data.rendering import Renderer

MOST_ROWS = 20_000
"""The most rows that are tokenized; of more rows, a random sample of this size."""
OBJECTIVES = {None: "sft", PAIRS: "dpo", UNPAIRED: "kto"}
"""Kind of rows → the objective chosen for them."""
_BATCH = 8
"""The batch size for estimating shared prefixes: the batch is chosen later, and much larger ones save hardly more."""
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class MeasuredRows:
    """The rows, tokenized and measured.

    Attributes:
        splits: All rows by split; validation and test rows only if they have separate files.
        choice: The columns that are read, and why.
        all_lengths: (rows,), token counts of the tokenized rows of all splits.
        tokenized: The tokenized training rows, each answer of a pair, and each block of a split text, as one row; with
            `lengths`, `supervised`.
        saved: The approximate fraction of a batch's tokens that shared prefixes save.
        classes: The completions as class labels, if they are short and few.
        rows_per_example: 2 for preference pairs, else 1.
    """

    splits: RawDatasets
    choice: ColumnChoice
    all_lengths: NDArray[np.int64]
    tokenized: Any
    saved: float
    classes: Classes = Classes()  # noqa: RUF009  it is frozen
    rows_per_example: int = 1

    @property
    def train(self) -> DatasetSplit:
        """The training rows."""
        return self.splits.train

    @property
    def is_text(self) -> bool:
        """Whether all rows are of the format `text`."""
        return all(split.formats == ["text"] for split in self.splits.splits.values())

    @property
    def held_out(self) -> int:
        """The number of rows in validation files; 0 without such files."""
        return len(self.splits.validation) if self.splits.validation else 0

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the training rows was tokenized."""
        return len(self.train) > MOST_ROWS

    @property
    def items_per_row(self) -> float:
        """The average number of items that a training row becomes: its blocks, or rows for its earlier answers; below 1
        if rows are dropped."""
        return len(self.tokenized) / self.rows_per_example / len(_sample(self.train))

    def cut(self, max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Two arrays (rows,): the tokens and supervised tokens of each row or pair, cut to `max_length`."""
        each, rows = self.rows_per_example, self.tokenized
        lengths, supervised = (one.reshape(-1, each).sum(1) for one in (rows.lengths, rows.supervised))
        lengths = lengths.clip(max=max_length * each)
        return lengths, supervised.clip(max=lengths)


def measure(section: DataSection, renderer: Renderer, vocabulary: int) -> tuple[MeasuredRows, list[str]]:
    """Read and check all rows, and tokenize them, or a sample if there are many, without truncation.

    Returns the rows, and lines on how they were read. Raises DataError, ModelError: as `fields.read`, `data.prepare`.
    """
    raw, choice = fields.read(section, chat=bool(renderer.tokenizer.chat_template))
    whole = section.model_copy(update={"columns": choice.columns, "max_length": _NO_LIMIT})
    tokenized = [data.prepare(_sample(split), renderer, whole, vocabulary).rows for split in raw.splits.values()]
    rows, kind = tokenized[0], raw.train.kind
    for split in raw.splits.values():
        split.check_kind(kind, OBJECTIVES[kind])
    rows_per_example = 2 if kind == PAIRS else 1
    is_short = kind is None and float(np.median(rows.supervised)) <= LABEL_TOKENS
    classes = Classes.of(raw.train.examples()) if is_short else Classes()
    saved = BatchLayout(rows, rows.lengths, "batch", _BATCH, _NO_LIMIT, 0, rows_per_example).saving()
    lengths = np.concatenate([split.lengths for split in tokenized])
    remarks = [*choice.remarks, *raw.train.remarks(), *rows.report.reasons(), *classes.remarks()]
    return MeasuredRows(raw, choice, lengths, rows, saved, classes, rows_per_example), remarks


def fit_length(
    rows: MeasuredRows, section: DataSection, renderer: Renderer, vocabulary: int
) -> tuple[MeasuredRows, list[str]]:
    """The rows, texts in blocks of `max_length`, and lines on rows that it truncates or drops. Raises DataError: more
    would be dropped than `max_dropped` allows."""
    if not (rows.all_lengths > section.max_length).any():
        return rows, []
    splits = rows.splits.splits.items()
    fitted = {name: data.prepare(_sample(split), renderer, section, vocabulary) for name, split in splits}
    lines = [f"{name}: {loss}" for name, split in fitted.items() for loss in split.report.losses()]
    has_blocks = fitted["train"].rows.owners is not None
    return replace(rows, tokenized=fitted["train"].rows) if has_blocks else rows, lines


def _sample(split: DatasetSplit) -> DatasetSplit:
    if len(split) <= MOST_ROWS or not split.mask.all():
        return split
    return replace(split, mask=random_mask(len(split), MOST_ROWS, np.random.default_rng(0)))
