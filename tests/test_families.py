"""Whole models of many families, with and without the kernels: the recorded table, and cases that it lacks.

`golden_kernels.txt` is written by `scripts/check_layers.py`, which runs every family; some of them are run again here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from check_layers import Row, compare
from families import FAMILIES

TABLE = Path(__file__).parent / "golden_kernels.txt"
RUN_AGAIN = [
    "llama", "cohere2", "exaone4", "gemma3_text", "gpt_oss",
]  # fmt: skip
RUN_AT_LENGTH = [
    "olmo", "hunyuan_v1_moe", "nemotron_h", "deepseek_v4", "gpt2",
    "qwen3", "olmo2", "flex_olmo", "cohere", "cohere2_moe", "bamba", "exaone_moe", "hunyuan_v1_dense", "ministral3",
    "seed_oss", "glm_moe_dsa", "smollm3", "minimax", "modernbert-decoder", "granitemoehybrid", "mamba",
]  # fmt: skip
"""Relatives of those, and families in `CASES`, with a case that once gave wrong results."""


def table() -> list[Row]:
    return [Row.read(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def test_the_table_contains_every_family_without_crashes() -> None:
    rows = table()
    assert [(row.model_type, row.dtype) for row in rows] == [
        (name, dtype) for name in FAMILIES for dtype in ("float32", "bfloat16")
    ]
    assert [str(row) for row in rows if " fails: " in row.note or not row.same] == []
    assert len([row for row in rows if row.losses]) >= 340


@pytest.mark.parametrize(
    "model_type", [*RUN_AGAIN, *(pytest.param(one, marks=pytest.mark.slow) for one in RUN_AT_LENGTH)]
)
def test_a_family_matches_the_table(model_type: str) -> None:
    row = compare(model_type, torch.float32)
    (listed,) = [one for one in table() if (one.model_type, one.dtype) == (model_type, "float32")]
    assert (row.parts, row.note) == (listed.parts, listed.note) and row.same, str(row)


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], str]] = {
    "norms that subtract the mean, in bfloat16": ("cohere", torch.bfloat16, {}, "attention, feed-forward layers, loss"),
    "angles in float32, in bfloat16": ("olmo2", torch.bfloat16, {}, "attention, feed-forward layers, norms, loss"),
    "queries scaled beyond a limit": ("ministral3", torch.float32, {}, "attention, feed-forward layers, norms, loss"),
    "a window that no type of a layer says": (
        "minimax", torch.float32, {"sliding_window": 40}, "feed-forward layers, norms, loss",
    ),
    "layers without positions, in bfloat16": (
        "smollm3", torch.bfloat16, {}, "attention, feed-forward layers, norms, loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases_that_once_gave_wrong_results(name: str) -> None:
    """Embeddings with a mean far from 0, and rows beyond every limit of the configuration."""
    model_type, dtype, changes, parts = CASES[name]
    row = compare(model_type, dtype, mean=0.5, **changes)
    assert row.note == "" and row.parts == parts and row.same, str(row)


def test_a_numerical_difference_is_detected() -> None:
    """For example that of a replaced norm which ignores its epsilon."""
    assert not Row("llama", "float32", "", [0.0], [1e-3]).same and not Row("llama", "bfloat16", "", [0.0], [0.2]).same
    assert Row("llama", "bfloat16", "", [0.0], [0.2], [0.0, 0.11]).same
    line = "llama | float32 | norms | 1e-06 0e+00 | 2e-06 1e-06 |  | "
    assert str(Row.read(line)) == line
