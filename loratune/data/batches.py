"""Turns rows of token ids into tensors."""

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from loratune.data.formats import IGNORED

_log = logging.getLogger(__name__)

Put: TypeAlias = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]
"""Collates rows into a dict of tensors: `flatten`, `share_prefixes`, or `pad` with its padding token."""


def flatten(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Concatenate rows into one sequence.

    There is no `attention_mask`: without a mask and a cache, transformers detects row boundaries from `position_ids`,
    and a token attends to its own row only (`masking_utils.find_packed_sequence_indices`). The caller must therefore
    call the model with `use_cache=False` and without a mask; with either, tokens silently attend to other rows.
    `packing_refusal` checks whether a model supports this.

    Args:
        rows: `input_ids` and `labels`, lists of equal length for each row, at least one token each.

    Returns:
        int64 tensors of shape (1, tokens of all rows): `input_ids`; `labels`, of which the first of each row is -100,
        because the token before it belongs to another row; `position_ids`, which begin at 0 in each row.
    """
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row["labels"][1:])]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]]),
    }


def put_rows(put: Put, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate rows into a batch.

    Args:
        put: What makes them tensors.
        rows: They may have `weights`, one per label. The last ones may have a `teacher`: the first place at which it
            predicts, the most probable tokens there and at the following places, and their log-probabilities. Where
            answers are compared, the others each have a `side`, see `TokenizedRow`, and perhaps the log-probability as
            `reference`, and a further row as `mismatched`, which is the prompt with the answer to another one.

    Returns:
        The batch, with tensors of (rows,): `lengths`, and `sides` and `references` where rows have them; `weights` of
        the shape of the labels where rows have them; as `mismatched` the same of the further rows; as `teacher` its
        places, tokens and log-probabilities, see `kernels.TeacherTargets`, and the number of tokens of its rows.
    """
    batch: dict[str, Any] = {**put(rows), "lengths": torch.tensor([len(row["input_ids"]) for row in rows])}
    own = [row for row in rows if "teacher" not in row]
    if "weights" in rows[0]:
        batch["weights"] = _weights(rows, batch["labels"].shape)
    if len(own) < len(rows):
        batch["teacher"] = _teacher_targets(rows, batch["labels"].shape)
    if "side" in rows[0]:
        batch["sides"] = torch.tensor([row["side"] for row in own])
    if "reference" in rows[0]:
        batch["references"] = torch.tensor([row["reference"] for row in own], dtype=torch.float64)
    if "mismatched" in rows[0]:
        batch["mismatched"] = put_rows(put, [row["mismatched"] for row in own])
    return batch


def _weights(rows: Sequence[dict[str, Any]], shape: Sequence[int]) -> Tensor:
    """The weight of each label of a batch in the loss, float32, of the shape of the labels."""
    weights = [torch.tensor(row.get("weights", [0.0] * len(row["labels"])), dtype=torch.float32) for row in rows]
    if shape[0] == 1:
        return torch.cat(weights)[None]
    return torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)


def _teacher_targets(rows: Sequence[dict[str, Any]], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """What a teacher predicts in the last rows of a batch. shape: of the labels; rows are end to end, or padded."""
    lengths = [len(row["input_ids"]) for row in rows]
    starts = [*accumulate(lengths, initial=0)] if shape[0] == 1 else [number * shape[1] for number in range(len(rows))]
    texts = [(start, *row["teacher"]) for start, row in zip(starts, rows, strict=False) if "teacher" in row]
    places = [torch.arange(len(ids)) + start + first for start, first, ids, _ in texts]
    ids, values = (torch.cat([torch.from_numpy(text[part]) for text in texts]) for part in (2, 3))
    return torch.cat(places), ids, values, torch.tensor(sum(lengths[-len(texts) :]))


def pad(
    rows: Sequence[dict[str, Any]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them. Padding is masked by position, never by token id.

    Args:
        rows: `input_ids` and optionally `labels`, lists of equal length for each row.
        pad_id: The id of the padding token.
        side: Where the padding goes.

    Returns:
        int64 tensors of shape (rows, longest): `input_ids`, `attention_mask` (1 on tokens, 0 on padding), and `labels`
        (-100 on padding) if the rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        padding = [filler] * (longest - len(values))
        return [*values, *padding] if side == "right" else [*padding, *values]

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([padded(row["labels"], IGNORED) for row in rows])
    return batch
