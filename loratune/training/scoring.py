"""The loss over rows that nothing is learnt from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from loratune.kernels import expect, next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group


class Batches(Protocol):
    """A set of rows as it is iterated. items: rows, or lists of them; size: items of a batch; collate: items → a batch
    of tensors; flat: the rows of a batch stand end to end, without padding."""

    items: Any
    size: int
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    flat: bool

    def heaviest(self) -> Sequence[int]:
        """The numbers of the items that make the batch with the most tokens."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy summed over `tokens` learnt tokens, in nats."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per learnt token."""
        return self.total / self.tokens


def held_out_loss(
    model: PreTrainedModel,
    rows: Batches,
    numbers: Sequence[int] | None = None,
    before_batch: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    group: Group = SINGLE_PROCESS,
) -> Loss:
    """The loss over all learnt tokens of some items, each token counting once however they are batched and shared out.

    numbers: of the items; None: all; group: what takes a share of them each. Raises what `before_batch` raises, which
    is shown every batch.
    """
    chosen = range(len(rows.items)) if numbers is None else numbers
    own = [loss for _, loss in _batch_losses(model, rows, chosen, before_batch, group)]
    total, tokens = group.total([sum(loss.total for loss in own), sum(loss.tokens for loss in own)])
    return Loss(total, int(tokens))


def batch_losses(
    model: PreTrainedModel, rows: Batches, numbers: Sequence[int], group: Group = SINGLE_PROCESS
) -> list[Loss]:
    """The loss of each batch of some items, in their order. group: all of them take a share, and get all losses."""
    own = [(place, loss.total, loss.tokens) for place, loss in _batch_losses(model, rows, numbers, _seen, group)]
    return [Loss(total, tokens) for _, total, tokens in sorted(chain.from_iterable(group.all_gather(own)))]


def _seen(batch: dict[str, torch.Tensor]) -> None:
    pass


@torch.no_grad()
def _batch_losses(
    model: PreTrainedModel,
    rows: Batches,
    chosen: Sequence[int],
    before_batch: Callable[[dict[str, torch.Tensor]], None],
    group: Group,
) -> list[tuple[int, Loss]]:
    """Place and loss of each batch that falls to this process."""
    was_training = model.training
    model.eval()
    found = []
    batches = [chosen[start : start + rows.size] for start in range(0, len(chosen), rows.size)]
    for first in range(0, len(batches), group.count):
        place = first + group.rank
        batch = rows.collate([rows.items[number] for number in batches[place % len(batches)]])
        before_batch(batch)
        labels = batch.pop("labels").to(model.device)
        expect(model, labels)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
        loss, count = next_token_loss(logits, labels)
        if place < len(batches):  # where none is left, one is read again, so that all take part in every pass
            found.append((place, Loss(loss.item(), int(count))))
    model.train(was_training)
    return found
