"""The numerics of training: the loss, over learnt positions only."""

import torch
from torch import Tensor
from torch.nn import functional


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every learnt token given the tokens before it.

    logits: (rows, length, vocabulary), any float dtype; labels: (rows, length) int64, -100 where nothing is learnt.
    Position t is scored against label t + 1. Returns the sum in nats as a float32 scalar, and the number of tokens.
    Only learnt positions are raised to float32, so the cost follows the learnt tokens and not the padded batch.
    """
    targets = labels[:, 1:]
    learnt = targets >= 0
    chosen = logits[:, :-1][learnt].float()
    return functional.cross_entropy(chosen, targets[learnt], reduction="sum"), learnt.sum()


def global_norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """The norm over all elements of all tensors, as a scalar; NaN or inf if any element is. order: inf for the largest
    element, which no sum makes inf."""
    norm: Tensor = torch.nn.utils.get_total_norm(tensors, norm_type=order)
    return norm
