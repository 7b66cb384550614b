"""Flattening: rows → one long row without padding, in which positions tell where a row begins."""

from collections.abc import Sequence
from typing import Any

import torch

from loratune.data.rendering import IGNORED


def flatten(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put rows end to end.

    rows: `input_ids` and `labels`, lists of one length per row, at least one token each. Returns int64 tensors of shape
    (1, tokens of all rows): `input_ids`; `labels`, where the first of each row is -100, because the token before it is
    another row's; `position_ids`, which begin at 0 in each row.

    There is no `attention_mask`: without one, and without a cache, transformers reads the rows off the positions and
    lets a token see its own row only (`masking_utils.find_packed_sequence_indices`). So the caller must hand the batch
    to the model with `use_cache=False`, and no mask; with either, rows meet and nothing says so. Which models
    understand the positions, `why_not` tells.
    """
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row["labels"][1:])]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]]),
    }


def flatten_packs(packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Put the rows of all packs end to end, as `flatten` does."""
    return flatten([row for pack in packs for row in pack])
