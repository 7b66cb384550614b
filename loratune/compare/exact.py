"""Whether greedy answers are exactly the expected ones, without writing them.

A greedy answer is the expected one if each of its tokens is the most probable one after the tokens before it. One
forward pass over prompt and answer shows that; `exact_match` of `evaluate` writes the answer instead.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from loratune import kernels
from loratune.compare import behavior
from loratune.compare.engine import Engine
from loratune.compare.metrics import Values
from loratune.data.rendering.spans import TokenizedRow
from loratune.events import counting


def comparable(rows: Sequence[TokenizedRow], longest: int) -> bool:
    """Whether all rows have a prompt and one answer of at most `longest` tokens, besides the one that ends it."""
    return all(len(row.prompt) > 1 and not row.side and len(row.completion) <= longest + 1 for row in rows)


@torch.no_grad()
def exact_matches(
    model: Any, engine: Engine, rows: Sequence[TokenizedRow], inside: AbstractContextManager[None]
) -> Values:  # fmt: skip
    """For each row 1 if the greedy answer is the expected one to its end, else 0.

    Args:
        model: A `PeftModel`, whose adapter is active.
        engine: Batches the rows, and accelerates the model.
        rows: Rows that are `comparable`.
        inside: The context in which the model computes; one that disables the adapter gives the answers of the base.
    """
    found, was_training = np.zeros(len(rows)), model.training
    model.eval()
    with (
        counting("comparing answers", len(rows)) as advance,
        inside,
        engine.acceleration.applied(model),
    ):
        for numbers, batch, at in behavior.batches(engine, [(row.prompt, row.completion) for row in rows]):
            expected = torch.tensor([id for number in numbers for id in rows[number].completion])
            equal = (kernels.logits_at(model, batch, at).argmax(-1).cpu() == expected).tolist()
            for number in numbers:
                own, equal = equal[: len(rows[number].completion)], equal[len(rows[number].completion) :]
                found[number] = float(all(own))
            advance(len(numbers))
    model.train(was_training)
    return found
