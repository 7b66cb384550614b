"""The loss of a model on rows that are only read, and what training lowers: the objective of a run.

An objective says what of a batch the loss is taken over, and what a mean is taken of: of supervised tokens with `sft`,
of pairs or of answers where answers are compared (`preferences`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from loratune import kernels
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.kernels import next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group

BeforeBatch = Callable[[dict[str, torch.Tensor]], None]
"""Called with every batch that is read; it may raise an error, which ends the pass."""


def nothing(_: dict[str, torch.Tensor]) -> None:
    """A `BeforeBatch` that does nothing."""


class Batches(Protocol):
    """A set of rows as it is iterated.

    Attributes:
        items: Rows, or lists of rows.
        size: Items of a batch.
        flat: Whether the rows of a batch stand end to end, without padding.
    """

    items: Any
    size: int
    flat: bool

    @property
    def collate(self) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
        """From items to a batch of tensors."""

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


class Objective(Protocol):
    """What a run lowers.

    Attributes:
        unit: What the loss is a mean over, in the singular: `token`, `pair`, `answer`.
    """

    unit: str

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """Prepare an optimizer step.

        Args:
            model: The model that is trained.
            batches: The micro-steps that this process takes, as they come from the loader.
            count: Their supervised tokens over all processes, as Trainer counts them.
            group: The processes of the run.

        Returns:
            How many tokens, pairs or answers the step has over all processes.
        """

    def expect(self, model: Any, batch: dict[str, Any]) -> None:
        """Take out of a batch what the model is not given, before its forward pass."""

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of the batch that `expect` was called with, and over how many tokens, pairs or answers."""

    def held_out_loss(
        self,
        model: PreTrainedModel,
        batches: Batches,
        numbers: Sequence[int] | None = None,
        before_batch: BeforeBatch = nothing,
        group: Group = SINGLE_PROCESS,
    ) -> Loss:
        """The loss over all that rows hold, however they are batched and divided.

        Args:
            model: Left in the mode, training or evaluation, in which it is.
            batches: The rows.
            numbers: Which of their items to take; None for all.
            before_batch: See `BeforeBatch`.
            group: The processes, each of which takes a share of the batches.
        """

    def item_losses(
        self, model: PreTrainedModel, dataset: TokenizedDataset, numbers: Sequence[int], pad_id: int, group: Group
    ) -> list[Loss]:
        """The loss of each of some items of a dataset, computed one by one. All processes get all of them."""

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """Check that the model is what the objective takes it for before its first step.

        first: makes the first batch, on the CPU.

        Raises:
            NumericError: It is not.
        """

    def logged(self) -> dict[str, float]:
        """Further figures of the last pass over held-out rows, by their names."""

    def logged_of_step(self) -> dict[str, float]:
        """Further figures of the last micro-step."""


class NextToken:
    """The objective `sft`: every supervised token, given those before it."""

    unit = "token"

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """See `Objective`."""
        return count

    def expect(self, model: Any, batch: dict[str, Any]) -> None:
        """See `Objective`."""
        kernels.expect(model, batch["labels"], batch.pop("places", None))

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        return next_token_loss(logits, labels)

    def held_out_loss(
        self,
        model: PreTrainedModel,
        batches: Batches,
        numbers: Sequence[int] | None = None,
        before_batch: BeforeBatch = nothing,
        group: Group = SINGLE_PROCESS,
    ) -> Loss:
        """See `Objective`; each supervised token counts once."""
        numbers = range(len(batches.items)) if numbers is None else numbers
        own = [loss for _, loss in self._losses(model, batches, numbers, before_batch, group)]
        total, tokens = group.total([sum(loss.total for loss in own), sum(loss.tokens for loss in own)])
        return Loss(total, int(tokens))

    def item_losses(
        self, model: PreTrainedModel, dataset: TokenizedDataset, numbers: Sequence[int], pad_id: int, group: Group
    ) -> list[Loss]:
        """See `Objective`."""
        rows = dataset.rows
        batches = BatchLayout(rows, rows.lengths, "none", 1, int(rows.lengths.max()), pad_id)
        losses = self._losses(model, batches, numbers, nothing, group)
        own = [(position, loss.total, loss.tokens) for position, loss in losses]
        return [Loss(total, tokens) for _, total, tokens in sorted(chain.from_iterable(group.all_gather(own)))]

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """See `Objective`."""

    def logged(self) -> dict[str, float]:
        """See `Objective`."""
        return {}

    def logged_of_step(self) -> dict[str, float]:
        """See `Objective`."""
        return {}

    def _losses(
        self, model: Any, batches: Batches, numbers: Sequence[int], before_batch: BeforeBatch, group: Group
    ) -> Iterator[tuple[int, Loss]]:
        """Position and loss of each batch that this process takes."""
        for position, labels, logits in read_batches(self, model, batches, numbers, before_batch, group):
            loss, count = next_token_loss(logits, labels)
            if position is not None:
                yield position, Loss(loss.item(), int(count))


def read_batches(
    objective: "NextToken | Objective",
    model: Any,
    batches: Batches,
    numbers: Sequence[int],
    before_batch: BeforeBatch,
    group: Group,
) -> Iterator[tuple[int | None, torch.Tensor, torch.Tensor]]:
    """Run a model on the batches that this process takes, without gradients and dropout.

    Args:
        objective: What takes out of a batch what the model is not given.
        model: Left in the mode in which it is.
        batches: The rows.
        numbers: Which of their items to take.
        before_batch: See `BeforeBatch`.
        group: The processes, each of which takes a share of the batches.

    Yields:
        The position of the batch, None for one that another process takes too; its labels; and what the model returns.
    """
    was_training = model.training
    model.eval()
    by_batch = [numbers[start : start + batches.size] for start in range(0, len(numbers), batches.size)]
    for first in range(0, len(by_batch), group.count):
        position = first + group.rank
        # Beyond the last batch a process repeats one, as all processes must take part in every forward pass.
        batch = batches.collate([batches.items[number] for number in by_batch[position % len(by_batch)]])
        before_batch(batch)
        yield (position if position < len(by_batch) else None), *run_batch(objective, model, batch)
    model.train(was_training)


@torch.no_grad()
def run_batch(
    objective: "NextToken | Objective", model: Any, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels of a batch, on the device of the model, and what the model returns for it."""
    given = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    objective.expect(model, given)
    labels = given.pop("labels")
    return labels, model(**given, use_cache=False).logits
