"""How far the predictions of two models agree."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How the predictions of one model compare with those of another on the same texts.

    Attributes:
        positions: How many predictions were compared.
        largest: The largest difference between two logits.
        divergence: The mean Kullback-Leibler divergence of the other's predictions from the first's, in nats a token.
        top1: The share of positions at which both hold the same token for the likeliest.
    """

    positions: int
    largest: float
    divergence: float
    top1: float

    def as_json(self) -> dict[str, Any]:
        """All figures by name; those that are not finite as text, which JSON has no numbers for."""
        return {name: value if math.isfinite(value) else str(value) for name, value in asdict(self).items()}


@torch.inference_mode()
def agreement(pairs: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Compare logits.

    Args:
        pairs: For each text the logits of both models, of shape (tokens, vocabulary).
    """
    positions, largest, divergence, same = 0, 0.0, 0.0, 0
    for first, other in pairs:
        one, two = first.double(), other.double()
        largest = max(largest, float((one - two).abs().max()))
        log_one, log_two = one.log_softmax(-1), two.log_softmax(-1)
        divergence += float((log_one.exp() * (log_one - log_two)).sum())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
        positions += one.shape[0]
    return Agreement(positions, largest, divergence / positions, same / positions)
