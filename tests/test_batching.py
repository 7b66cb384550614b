"""Rows stand end to end where that is possible and costs less, and are padded elsewhere, which is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran, write_rows
from test_kernels import SHAPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loratune.data.packing_check import padding_is_cheaper


@pytest.mark.parametrize(
    "lengths, size, width, padded",
    [
        ([1024] * 64, 8, 640, True),  # Gemma 3: 3.5 s padded, 20.2 s end to end
        ([1024] * 64, 1, 640, False),  # one row is the same either way
        ([20, 400] * 64, 8, 2048, False),  # half of the padded batch would be padding
        ([20, 30, 25, 24] * 64, 8, 4096, False),
        ([4000, 16] * 64, 16, 640, True),  # even so: 32,000 tokens would be held against each other
        ([1000, 1000, 1000], 8, 640, True),  # fewer rows than a batch
    ],
)
def test_the_cheaper_way_is_known(lengths: list[int], size: int, width: int, padded: bool) -> None:
    found = [padding_is_cheaper(np.array(order), size, width) for order in (lengths, sorted(lengths))]
    assert found == [padded, padded]


@pytest.mark.parametrize("kind, padded", [("bloom", True), ("gemma2", False), ("gemma3_text", False)])
def test_a_run_packs_only_where_that_costs_less(
    kind: str, padded: bool, run_config: Callable[..., Path], cli: Callable[..., Ran], tmp_path: Path, tokenizer: Any
) -> None:
    """BLOOM adds biases to its scores, so its own attention is left, and goes over whole batches."""
    config = CONFIG_MAPPING[kind](**SHAPE | {"sliding_window": 16, "n_layer": 2, "n_head": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "long.jsonl", [{"text": f"{number} " * 25} for number in range(10, 26)])
    config_path = run_config(
        model={"name_or_path": str(tmp_path / "base")}, data={"train": str(rows)}, training={"max_steps": 2}
    )
    ran = cli("train", config_path)
    assert ran.code == 0, ran.err
    note = "data.packing: bloom attends to all rows of a batch at once, which costs more than padding"
    assert (note in ran.err) == padded and ("data.packing" in ran.err) == padded
