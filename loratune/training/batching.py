"""How the rows of a run become the batches that its model can be given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratune import kernels
from loratune.config import DataSection, TrainingSection
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout, Packing, packing_refusal, padding_is_cheaper
from loratune.lora import linear
from loratune.system import launcher


@dataclass(frozen=True)
class Batched:
    """The batches of a run. acceleration: what of the model the kernels compute; notes: on what could not be packed,
    and on what the fast way lacks, a line each."""

    train: BatchLayout
    validation: BatchLayout | None
    acceleration: kernels.Acceleration
    notes: list[str]


def batch(
    model: Any,
    pad_id: int,
    train: TokenizedDataset,
    validation: TokenizedDataset | None,
    data: DataSection,
    training: TrainingSection,
) -> Batched:
    """Lay out rows as the configuration says, or padded, where the model would mix them.

    model: a `PeftModel` with its weights, which stays as it is.
    """
    acceleration = kernels.accelerate(model, linear.linear, sharded=bool(launcher.sharding()))
    with acceleration.applied(model):
        packing, notes = _packing(model, train, data, training, mixed=not kernels.attends_by_rows(model))

    def made(rows: TokenizedDataset) -> BatchLayout:
        size = training.per_device_train_batch_size
        return BatchLayout(rows.rows, rows.rows.lengths, packing, size, data.max_length, pad_id)

    notes += kernels.notes(model.get_input_embeddings().weight)
    return Batched(made(train), made(validation) if validation else None, acceleration, notes)


def _packing(
    model: Any, rows: TokenizedDataset, data: DataSection, training: TrainingSection, *, mixed: bool
) -> tuple[Packing, list[str]]:
    """How rows are batched, with a line of why where that is not as asked.

    mixed: attention is the model's own, and goes over all rows of a batch. Then a batch is tried in its full size, and
    rows are padded where that costs less; packs that were asked for stay, as another batch would mean other steps.
    """
    if data.packing == "none":
        return "none", []
    lengths, size = np.sort(rows.rows.lengths), training.per_device_train_batch_size
    if mixed and data.packing == "batch" and padding_is_cheaper(lengths, size, _width(model)):
        name = model.config.model_type
        return "none", [f"data.packing: {name} attends to all rows of a batch at once, which costs more than padding"]
    largest = lengths[-size:].sum() if data.packing == "batch" else min(lengths.sum(), size * data.max_length)
    if (reason := packing_refusal(model, int(lengths[-1]), int(largest) if mixed else 0)) is None:
        return data.packing, []
    return "none", [f"data.{reason}; rows are padded instead"]


def _width(model: Any) -> int:
    """How many numbers a hidden state has."""
    return int(model.get_input_embeddings().weight.shape[1])


def largest(batches: BatchLayout, rows: TokenizedDataset) -> tuple[list[tuple[int, int]], int]:
    """(length, learnt tokens) of the rows of the largest batch, and how many rows there are; flat ones count as one."""
    heaviest = batches.heaviest()
    if not batches.flat:
        supervised = rows.rows.supervised
        return [(batches.tokens(number), int(supervised[number])) for number in heaviest], batches.size
    labels = batches.collate([batches.items[number] for number in heaviest])["labels"]
    return [(labels.numel(), int((labels >= 0).sum()))], 1


def first(batches: BatchLayout, most: int = 64) -> list[Mapping[str, Any]]:
    """The first batches of the rows, in their order."""
    count, size = len(batches.items), batches.size
    starts = range(0, min(count, most * size), size)
    return [batches.collate([batches.items[n] for n in range(at, min(at + size, count))]) for at in starts]
