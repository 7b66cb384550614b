"""The loss of a model on rows that it is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from loratune.kernels import expect, next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group


class Batches(Protocol):
    """A set of rows as it is iterated.

    Attributes:
        items: Rows, or lists of rows.
        size: Items of a batch.
        collate: From items to a batch of tensors.
        flat: Whether the rows of a batch stand end to end, without padding.
    """

    items: Any
    size: int
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    flat: bool

    def heaviest(self) -> Sequence[int]:
        """The numbers of the items that make the batch with the most tokens."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy in nats, summed over `tokens` supervised tokens."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return self.total / self.tokens


def held_out_loss(
    model: PreTrainedModel,
    rows: Batches,
    numbers: Sequence[int] | None = None,
    before_batch: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    group: Group = SINGLE_PROCESS,
) -> Loss:
    """The loss over all supervised tokens, each of which counts once however rows are batched and shared out.

    Args:
        model: Left in the mode, training or evaluation, in which it is.
        rows: The rows.
        numbers: Which of its items to take; None for all.
        before_batch: Called with every batch; it may raise an error, which ends the pass.
        group: The processes, each of which takes a share of the batches.
    """
    selected = range(len(rows.items)) if numbers is None else numbers
    own = [loss for _, loss in _own_losses(model, rows, selected, before_batch, group)]
    total, tokens = group.total([sum(loss.total for loss in own), sum(loss.tokens for loss in own)])
    return Loss(total, int(tokens))


def batch_losses(
    model: PreTrainedModel, rows: Batches, numbers: Sequence[int], group: Group = SINGLE_PROCESS
) -> list[Loss]:
    """The loss of each batch of some items, in their order.

    group: the processes, each of which takes a share of the batches and gets all losses.
    """
    losses = _own_losses(model, rows, numbers, lambda _: None, group)
    own = [(position, loss.total, loss.tokens) for position, loss in losses]
    return [Loss(total, tokens) for _, total, tokens in sorted(chain.from_iterable(group.all_gather(own)))]


@torch.no_grad()
def _own_losses(
    model: PreTrainedModel,
    rows: Batches,
    numbers: Sequence[int],
    before_batch: Callable[[dict[str, torch.Tensor]], None],
    group: Group,
) -> list[tuple[int, Loss]]:
    """Position and loss of each batch that this process takes."""
    was_training = model.training
    model.eval()
    losses = []
    batches = [numbers[start : start + rows.size] for start in range(0, len(numbers), rows.size)]
    for first in range(0, len(batches), group.count):
        position = first + group.rank
        # Beyond the last batch a process takes one again, as all must take part in every forward pass.
        batch = rows.collate([rows.items[number] for number in batches[position % len(batches)]])
        before_batch(batch)
        labels = batch.pop("labels").to(model.device)
        expect(model, labels)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
        loss, count = next_token_loss(logits, labels)
        if position < len(batches):
            losses.append((position, Loss(loss.item(), int(count))))
    model.train(was_training)
    return losses
