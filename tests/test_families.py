"""Whole models of many families beside themselves, with the kernels and without: the table, and what it lacks.

`golden_kernels.txt` is written by `scripts/check_layers.py`, which runs every family; here some of them run again.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from check_layers import Row, compare
from families import FAMILIES

TABLE = Path(__file__).parent / "golden_kernels.txt"
# Of losses, and of gradients as shares of their size.
CLOSE = {"float32": (5e-6, 1e-4), "bfloat16": (2e-3, 0.08)}
RUN_AGAIN = [
    "llama", "qwen3", "olmo", "olmo2", "flex_olmo", "cohere", "cohere2", "cohere2_moe", "granitemoehybrid", "bamba",
    "exaone4", "exaone_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "nemotron_h", "ministral3", "seed_oss",
    "deepseek_v4", "glm_moe_dsa", "smollm3", "minimax", "gemma3_text", "gpt_oss", "mamba", "gpt2", "modernbert-decoder",
]  # fmt: skip


def table() -> list[list[str]]:
    """The cells of each line."""
    return [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def within(dtype: str, losses: list[float], gradients: list[float]) -> bool:
    loss, gradient = CLOSE[dtype]
    return max(losses, default=0) <= loss and max(gradients, default=0) <= gradient


def test_the_table_holds_every_family_and_none_crashes() -> None:
    rows = table()
    assert [(row[0], row[1]) for row in rows] == [(name, dtype) for name in FAMILIES for dtype in CLOSE]
    assert [row for row in rows if any("fails:" in cell for cell in row)] == []
    for row in rows:
        if len(row) > 4:
            losses, gradients = ([float(value) for value in cell.split()] for cell in row[3:5])
            assert within(row[1], losses, gradients), row


@pytest.mark.parametrize("model_type", RUN_AGAIN)
def test_a_family_is_as_the_table_has_it(model_type: str) -> None:
    row = compare(model_type, torch.float32)
    assert row.note == "" and within(row.dtype, row.losses, row.gradients)
    (listed,) = [cells for cells in table() if cells[:2] == [model_type, "float32"]]
    assert row.parts == listed[2]


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], str]] = {
    "norms that subtract the mean, in bfloat16": ("cohere", torch.bfloat16, {}, "feed-forward layers"),
    "angles in float32, in bfloat16": (
        "olmo2", torch.bfloat16, {}, "attention, feed-forward layers, norms, loss",
    ),
    "queries scaled beyond a limit": ("ministral3", torch.float32, {}, "feed-forward layers, norms, loss"),
    "a window that no type of a layer says": (
        "minimax", torch.float32, {"sliding_window": 40}, "attention, norms, loss",
    ),
    "layers without positions, in bfloat16": (
        "smollm3", torch.bfloat16, {}, "attention, feed-forward layers, norms, loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case_that_once_went_wrong(name: str) -> None:
    """Embeddings of a mean far from 0, and rows beyond every limit of the configuration."""
    model_type, dtype, changes, parts = CASES[name]
    row: Row = compare(model_type, dtype, mean=0.5, **changes)
    assert row.note == "" and row.parts == parts and within(row.dtype, row.losses, row.gradients), str(row)
