"""What `loratune init` chooses from the lengths of the rows, their number, and the memory that is free."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune import memory
from loratune.commands.init_rows import MeasuredRows
from loratune.config import Draft, RunConfig
from loratune.data.packing import BatchLayout, Items
from loratune.memory import Estimate
from loratune.training.batching import tree_sizes, would_share

_COVERED, _TAIL = 0.99, 2
"""The share of the rows that is kept whole in any case, and how many times as long as it the longest row may be so that
all are."""
_MULTIPLE = 64
"""`max_length` is a multiple of this."""
_WANTED_SHARE, _LEAST_SHARE_ROWS, _MOST_SHARE, _MOST_HELD_OUT = 0.1, 100, 0.2, 500
"""A tenth of the rows is held out; up to a fifth, until there are 100 rows; and never more than 500."""
_LEAST_ROWS = 50
"""Of fewer rows none are held out."""
_STEPS, _LEAST_STEP, _MOST_STEP = 200, 8, 32
"""About how many optimizer steps a pass over the rows should have, and the fewest and the most rows of one."""

WHY_STEP = f"about {_STEPS} steps in each pass, of {_LEAST_STEP} to {_MOST_STEP} rows"


def rows_per_step(rows: int) -> int:
    """Rows of an optimizer step for so many training rows: a power of two."""
    wanted = min(max(rows // _STEPS, _LEAST_STEP), _MOST_STEP)
    return 1 << (wanted.bit_length() - 1)


def max_length(lengths: NDArray[np.int64], context: int | None, *, paired: bool = False) -> tuple[int, str]:
    """`data.max_length`, and why.

    Args:
        lengths: (rows,), in tokens; of pairs (answers,), each with its prompt.
        context: How many tokens the model was built for, if that is known.
        paired: Whether they are of pairs.
    """
    longest, covered = int(lengths.max()), int(np.quantile(lengths, _COVERED, method="inverted_cdf"))
    wanted = longest if longest <= _TAIL * covered else covered
    rounded = max(_MULTIPLE, -(-wanted // _MULTIPLE) * _MULTIPLE)
    length = min(rounded, context or rounded)
    cut = int(np.count_nonzero(lengths > length))
    what, tokens = "row", f"{longest:,} tokens"
    if paired:
        what, tokens = "answer", f"{tokens} with its prompt"
    why = f"the longest {what} has {tokens}"
    if cut:
        limit = f"the model has {length:,} positions; " if length < wanted else ""
        why = f"{limit}{cut:,} of {len(lengths):,} {what}s are longer, up to {tokens}, and are cut"
    return length, why


def validation(rows: int) -> float | None:
    """The fraction of so many rows that is held out; None for none."""
    if rows < _LEAST_ROWS:
        return None
    share = max(_WANTED_SHARE, min(_MOST_SHARE, _LEAST_SHARE_ROWS / rows))
    return float(f"{min(share, _MOST_HELD_OUT / rows):.2g}")


@dataclass(frozen=True)
class Fit:
    """How training fits into the memory.

    Attributes:
        batch: Rows of a micro-step.
        quantization: As `model.quantization`.
        checkpointed: As `training.activation_checkpointing`.
        estimate: The memory that training needs.
        free: The memory that there is.
    """

    batch: int
    quantization: memory.WeightFormat
    checkpointed: bool
    estimate: Estimate
    free: int

    @property
    def is_roomy(self) -> bool:
        """Whether training needs at most half of what is free; the other half is for what nobody foresees."""
        return self.estimate.total <= self.free // 2


@dataclass(frozen=True)
class Room:
    """Where the model will be.

    Attributes:
        device: The device.
        free: Bytes of its memory that are free.
        quantizable: Whether the base may be quantized there.
    """

    device: torch.device
    free: int
    quantizable: bool


def fit(model: Any, run: RunConfig, draft: Draft, rows: MeasuredRows, step: int, room: Room) -> Fit:
    """The largest batch that leaves half of the memory free, recomputing activations or quantizing only where no batch
    does so without; the most frugal of all where none does.

    Args:
        model: A `PeftModel` on the meta device.
        run: The config so far.
        draft: What is set in it already, and is not changed.
        rows: The rows, as they were measured.
        step: Rows of an optimizer step.
        room: Where the model will be.
    """
    batches = _powers(step)
    if draft.has("training.per_device_train_batch_size"):
        batches = [run.training.per_device_train_batch_size]

    def fitted(batch: int, quantization: memory.WeightFormat, checkpointed: bool) -> Fit:
        changes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": max(1, step // batch),
            "activation_checkpointing": checkpointed,
        }
        changed = run.model_copy(update={"training": run.training.model_copy(update=changes)})
        estimate = _estimate(model, changed, rows, quantization, room.device)
        return Fit(batch, quantization, checkpointed, estimate, room.free)

    for frugality in _frugality(run, draft, quantizable=room.quantizable):
        smallest = fitted(batches[-1], *frugality)
        if smallest.is_roomy:
            larger = (fitted(batch, *frugality) for batch in batches[:-1])
            return next((found for found in larger if found.is_roomy), smallest)
    return smallest


def _powers(most: int) -> list[int]:
    """`most`, a power of two, and the smaller ones, in falling order."""
    return [most >> shift for shift in range(most.bit_length())]


def _frugality(run: RunConfig, draft: Draft, *, quantizable: bool) -> Iterator[tuple[memory.WeightFormat, bool]]:
    """Quantization and checkpointing, the dearest in memory first."""
    formats: list[memory.WeightFormat] = ["none", "4bit"] if quantizable else ["none"]
    if draft.has("model.quantization"):
        formats = [run.model.quantization]
    checkpointing = [False, True]
    if draft.has("training.activation_checkpointing"):
        checkpointing = [run.training.activation_checkpointing]
    yield from ((quantization, checkpointed) for quantization in formats for checkpointed in checkpointing)


def _estimate(
    model: Any, run: RunConfig, rows: MeasuredRows, quantization: memory.WeightFormat, device: torch.device
) -> Estimate:
    """The estimate of `train --dry-run`, for batches of the rows that were measured."""
    batch, length, packing = run.training.per_device_train_batch_size, run.data.max_length, run.data.packing
    cut, together = _CutRows(rows.tokenized, length), rows.together if rows.together > 1 else 0
    layout = BatchLayout(cut, np.minimum(rows.row_lengths, length), packing, batch, length, pad_id=0, together=together)
    if device.type == "cpu" and would_share(run, rows.saved):
        layout = layout.sharing(rows.saved)
        largest, _ = tree_sizes(layout.rows(layout.heaviest()))
    elif packing == "full":
        largest = [(length, length - 1)] * batch * rows.together
    else:
        heaviest = layout.rows(layout.heaviest())
        largest = [(len(row["labels"]), sum(label >= 0 for label in row["labels"][1:])) for row in heaviest]
    return memory.estimate(
        model,
        largest,
        len(largest),
        run.training,
        packed=layout.flat,
        weight_format=quantization,
        device=device,
        batch_tokens=layout.total_tokens(run.training.max_steps).tolist(),
    )


@dataclass(frozen=True)
class _CutRows:
    """Rows that lose their beginning where they are too long, about as `data.truncation` does it."""

    rows: Items
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        row = self.rows[number]
        return {name: row[name][-self.length :] for name in ("input_ids", "labels")}
