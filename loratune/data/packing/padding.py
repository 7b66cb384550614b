"""Padding: rows → a rectangle. Padding is masked by position, never by token id."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from loratune.data.rendering import IGNORED


def pad(
    rows: Sequence[dict[str, Any]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them.

    rows: `input_ids` and optionally `labels`, lists of one length per row. Returns int64 tensors of shape
    (rows, longest): `input_ids`, `attention_mask` (1 on tokens, 0 on padding), and `labels` (-100 on padding).
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: Sequence[int], filler: int) -> list[int]:
        gap = [filler] * (longest - len(values))
        return [*values, *gap] if side == "right" else [*gap, *values]

    batch = {
        "input_ids": torch.tensor([filled(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([filled(row["labels"], IGNORED) for row in rows])
    return batch
