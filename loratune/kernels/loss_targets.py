"""The labels of a batch: the rows that they belong to, and the states from which they are predicted."""

from typing import NamedTuple

import torch
from torch import Tensor

from loratune.kernels.transfer import on_host


def row_numbers(labels: Tensor, lengths: Tensor) -> Tensor:
    """The row that each label belongs to.

    Args:
        labels: Labels of concatenated rows, (1, tokens of all rows), or of padded rows, (rows, length).
        lengths: (rows,), int64, the tokens of each row.

    Returns:
        Row numbers from 0, int64, with the shape of the labels.
    """
    rows = torch.arange(len(lengths), device=labels.device)
    if len(labels) == len(lengths):
        return rows[:, None].expand_as(labels)
    return rows.repeat_interleave(lengths.to(labels.device), output_size=labels.shape[1])[None]


def row_counts(labels: Tensor, lengths: Tensor) -> Tensor:
    """(rows,), int64, the number of supervised tokens of each row. Arguments as in `row_numbers`."""
    supervised = (labels[:, 1:] >= 0).long()
    numbers = row_numbers(labels, lengths)[:, 1:]
    return supervised.new_zeros(len(lengths)).index_add_(0, numbers.reshape(-1), supervised.reshape(-1))


class LossTargets(NamedTuple):
    """The states and targets of the labels of a batch, read on the CPU, as their number decides shapes.

    Attributes:
        numbers: (states,), where the states are among those of the batch, row after row.
        targets: (states,), the token to be predicted from each.
        counts: (states,), the labels of each, or their total weight; None: 1.
        rows: (labels,), the row of each label; None where rows do not matter.
        entries: (labels,), the index of the state of each label; None: they are in the same order.
    """

    numbers: Tensor
    targets: Tensor
    counts: Tensor | None
    rows: Tensor | None
    entries: Tensor | None

    @classmethod
    def of(cls, labels: Tensor, places: Tensor | None, lengths: Tensor | None, weights: Tensor | None) -> "LossTargets":
        """Arguments as the attributes of `LossHead`."""
        labels = on_host(labels)
        supervised = labels[:, 1:] >= 0
        targets = labels[:, 1:][supervised]
        counts = None if weights is None else on_host(weights)[:, 1:][supervised]
        rows = None if lengths is None else row_numbers(labels, on_host(lengths))[:, 1:][supervised]
        if places is None:
            places = torch.arange(labels.numel()).view(labels.shape)
            return cls(places[:, :-1][supervised], targets, counts, rows, None)
        pairs = torch.stack([on_host(places)[:, :-1][supervised], targets])
        (numbers, targets), entries, number = torch.unique(pairs, dim=1, return_inverse=True, return_counts=True)
        counts = number if counts is None else counts.new_zeros(len(number)).index_add_(0, entries, counts)
        return cls(numbers, targets, counts, rows, entries)
