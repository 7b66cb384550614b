"""The loss, over learnt positions only, and without logits that anybody keeps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from loratune.kernels.native import fused_ops

CHUNK = 512
"""Positions whose logits are held at once."""


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every learnt token given the tokens before it.

    logits: (rows, length, vocabulary), any float dtype, or (1, 1, 1), the sum itself, as a `LossHead` gives it; labels:
    (rows, length) int64, -100 where nothing is learnt. Position t is scored against label t + 1. Returns the sum in
    nats as a float32 scalar, and the number of tokens. Only learnt positions are raised to float32, so the cost follows
    the learnt tokens and not the padded batch.
    """
    targets = labels[:, 1:]
    learnt = targets >= 0
    if logits.shape == (1, 1, 1):
        return logits.view(()), learnt.sum()
    chosen = logits[:, :-1][learnt].float()
    return functional.cross_entropy(chosen, targets[learnt], reduction="sum"), learnt.sum()


class LossHead(nn.Module):
    """Stands in for a frozen output layer, and makes the loss of it where labels are expected.

    Logits are computed for learnt positions only, a few hundred at a time, and their gradient is formed at once, so
    that they need not be kept. Hsu et al. 2024 (Liger) do so for heads that are trained too.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head
        self.labels: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Of the layer, for what looks at it."""
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (rows, length, size). Returns logits; or, once, the summed loss of the labels set, as (1, 1, 1)."""
        labels, self.labels = self.labels, None
        if labels is None:
            logits: Tensor = self.head(hidden)
            return logits
        targets = labels[:, 1:].to(hidden.device)
        learnt = targets >= 0
        apply: Any = _HeadLoss.apply
        loss: Tensor = apply(hidden[:, :-1][learnt], self.head.weight, self.head.bias, targets[learnt])
        return loss.view(1, 1, 1)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        over = fused_ops(hidden)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = functional.linear(hidden[rows], weight, bias)
            total += over.cross_entropy(logits, targets[rows]).sum()
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * doutput, None, None, None


def global_norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """The norm over all elements of all tensors, as a scalar; NaN or inf if any element is. order: inf for the largest
    element, which no sum makes inf."""
    norm: Tensor = torch.nn.utils.get_total_norm(tensors, norm_type=order)
    return full(norm)


def full(value: Tensor) -> Tensor:
    """A tensor as it is, or put together from its parts; then all processes must take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value
