"""The loss of a model on rows that are only read, and what training lowers: the objective of a run.

An objective says what of a batch the loss is taken over, and what a mean is taken of: of supervised tokens with `sft`,
of pairs or of answers where answers are compared (`preferences`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loratune import kernels
from loratune.console import show_count
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout, Items, Packing
from loratune.data.prefix_tree import PrefixTree, common_prefix
from loratune.kernels import next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group

Layers = Literal["accelerated", "stock", "stock, fast LoRA"]
"""What computes a model: the kernels, as far as there are any for it, and LoRA in the dtype of the base; the layers of
transformers and PEFT, and LoRA in that of its own weights; or the same with LoRA in the dtype of the base."""

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


@dataclass(frozen=True)
class ScoringLayout:
    """How rows stand in batches where each is to get a loss of its own: as in those of training, and no larger.

    What is in a batch follows from the rows alone, in any number of processes. So the same rows get the same losses
    again; in another company, or in batches of another size, the loss of a row may differ by rounding. Where prefixes
    are shared, a batch may have a few tokens more, as the tree leaves out prefixes of less than `LEAST_SHARED` tokens.

    Attributes:
        flat: Whether they stand end to end, or are padded to about the same length.
        saved: See `BatchLayout.saved`.
        pad_id: The token for padding.
        tokens: Of a batch, padding included, at most; a longer row is a batch by itself.
    """

    flat: bool
    saved: float | None
    pad_id: int
    tokens: int

    @classmethod
    def of(cls, train: BatchLayout, pad_id: int, tokens: int) -> "ScoringLayout":
        """That of rows that stand beside training batches. Where these are single rows because they cannot be packed,
        each row is a batch by itself, as the model may compute something else for padded ones."""
        return cls(train.flat, train.saved, pad_id, tokens if train.flat or train.size > 1 else 0)

    def layout(self, dataset: TokenizedDataset, rows: Items | None = None, together: int = 0) -> BatchLayout:
        """The rows of a dataset, an item by itself. rows, together: see `Objective.items`."""
        lengths = dataset.rows.lengths
        packing: Packing = "batch" if self.flat else "none"
        layout = BatchLayout(rows or dataset.rows, lengths, packing, 1, int(lengths.max()), self.pad_id, together)
        return layout.sharing(self.saved) if self.saved is not None else layout

    def batches(self, layout: BatchLayout, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of some items of a layout, batch by batch: those of like length together, or those that begin
        alike where they share that."""
        found: list[list[int]] = []
        total = 0
        for number, alone, beside in self._in_order(layout, numbers):
            total = total + beside if self.flat else alone * (len(found[-1]) + 1 if found else 1)
            if not found or total > self.tokens:
                found.append([])
                total = alone
            found[-1].append(number)
        return found

    def _in_order(self, layout: BatchLayout, numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Items, each with its tokens in a batch of its own, and beside the one before it."""
        if self.saved is None:
            for number in sorted(numbers, key=layout.tokens):
                yield number, layout.tokens(number), layout.tokens(number)
            return
        rows = {number: [np.array(row["input_ids"], ">u4") for row in layout.rows([number])] for number in numbers}
        before: NDArray[Any] = np.empty(0, ">u4")
        for number in sorted(numbers, key=lambda number: rows[number][0].tobytes()):
            alone = len(PrefixTree.of(rows[number]).ids)  # type: ignore[arg-type]
            yield number, alone, alone - common_prefix(before, rows[number][0])
            before = rows[number][0]


def computed_by(model: Any, layers: Layers, *, flat: bool, shares: bool) -> dict[str, str]:
    """How a figure is computed, as plain values. The same figure computed in another way differs by rounding.

    Args:
        model: What computes it.
        layers: See `Layers`.
        flat: Whether rows of a batch stand end to end; else they are padded.
        shares: Whether what they begin with alike is computed once.
    """
    batches = ("packed" if flat else "padded") + (", shared prefixes" if shares else "")
    return {"dtype": str(model.dtype).removeprefix("torch."), "layers": layers, "batches": batches}


class Objective:
    """What a run lowers. What a method does here is that of `sft`, and of objectives that have no other.

    Attributes:
        unit: What the loss is a mean over, in the singular: `token`, `pair`, `answer`.
    """

    unit = "token"

    def items(self, dataset: TokenizedDataset) -> tuple[Items, int]:
        """The rows of a dataset as `BatchLayout` takes them; and how many make an item together, 0 where rows are not
        compared."""
        return dataset.rows, 0

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
        return count

    def expect(self, model: Any, batch: dict[str, Any], *, by_row: bool = False) -> None:
        """Take out of a batch what the model is not given, before its forward pass. by_row: whether the loss is wanted
        row by row, and not summed."""
        lengths = batch.pop("lengths", None)
        kernels.expect(model, batch["labels"], batch.pop("places", None), lengths if by_row else None)

    def total(self, model: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of the batch that `expect` was called with, and over how many tokens, pairs or answers.

        logits: what the model returned for it.
        """
        return next_token_loss(model, logits, labels)

    def losses(
        self,
        model: Any,
        layout: Batches,
        batches: Sequence[Sequence[int]],
        before_batch: BeforeBatch = nothing,
        group: Group = SINGLE_PROCESS,
    ) -> list[Loss]:
        """The loss of each row, pair or answer, in the order of the batches. All processes get all of them.

        Args:
            model: Left in the mode, training or evaluation, in which it is.
            layout: The rows.
            batches: The numbers of the items of each batch.
            before_batch: See `BeforeBatch`.
            group: The processes, each of which takes a share of the batches.
        """
        own = []
        for position, labels, lengths, sums in read_batches(self, model, layout, batches, before_batch, group):
            counts = kernels.row_counts(labels, lengths)
            if position is not None:
                own.append((position, sums.tolist(), counts.tolist()))
        parts = sorted(chain.from_iterable(group.all_gather(own)))
        return [Loss(*row) for _, sums, counts in parts for row in zip(sums, counts, strict=True)]

    def held_out_loss(
        self,
        model: Any,
        layout: Batches,
        numbers: Sequence[int] | None = None,
        before_batch: BeforeBatch = nothing,
        group: Group = SINGLE_PROCESS,
    ) -> Loss:
        """The loss over all that rows hold, however they are batched and divided.

        numbers: which of their items to take; None for all. Other arguments as of `losses`.
        """
        numbers = range(len(layout.items)) if numbers is None else numbers
        batches = [numbers[start : start + layout.size] for start in range(0, len(numbers), layout.size)]
        found = self.losses(model, layout, batches, before_batch, group)
        return Loss(sum(loss.total for loss in found), sum(loss.tokens for loss in found))

    def item_losses(
        self, model: Any, dataset: TokenizedDataset, numbers: Sequence[int], scoring: ScoringLayout, group: Group
    ) -> list[Loss]:
        """The loss of each of some items of a dataset, in their order. All processes get all of them."""
        layout = scoring.layout(dataset, *self.items(dataset))
        batches = scoring.batches(layout, numbers)
        losses = self.losses(model, layout, batches, group=group)
        found = dict(zip(chain.from_iterable(batches), losses, strict=True))
        return [found[number] for number in numbers]

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """What a model is read in, without gradients. model: as given to `losses`."""
        return nullcontext()

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """Check that the model is what the objective takes it for before its first step.

        first: makes the first batch, on the CPU.

        Raises:
            NumericError: It is not.
        """

    def logged(self) -> dict[str, float]:
        """Further figures of the last pass over held-out rows, by their names."""
        return {}

    def logged_of_step(self) -> dict[str, float]:
        """Further figures of the last micro-step."""
        return {}


class NextToken(Objective):
    """The objective `sft`: every supervised token, given those before it."""


def read_batches(
    objective: Objective,
    model: Any,
    layout: Batches,
    batches: Sequence[Sequence[int]],
    before_batch: BeforeBatch,
    group: Group,
) -> Iterator[tuple[int | None, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a model on the batches that this process takes, without gradients and dropout. Arguments as of
    `Objective.losses`.

    Yields:
        The position of the batch, None for one that another process takes too; and what `run_batch` returns.
    """
    was_training = model.training
    model.eval()
    with show_count("computing losses, in batches", len(batches)) as advance:
        for first in range(0, len(batches), group.count):
            position = first + group.rank
            # Beyond the last batch a process repeats one, as all processes must take part in every forward pass.
            batch = layout.collate([layout.items[number] for number in batches[position % len(batches)]])
            before_batch(batch)
            yield (position if position < len(batches) else None), *run_batch(objective, model, batch)
            advance(group.count)
    model.train(was_training)


@torch.no_grad()
def run_batch(
    objective: Objective, model: Any, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The labels of a batch, the tokens of its rows, and the loss of each row, on the model's device."""
    given = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    lengths = given["lengths"]
    objective.expect(model, given, by_row=True)
    labels = given.pop("labels")
    with objective.reading(model):
        return labels, lengths, kernels.row_sums(model, model(**given, use_cache=False).logits, labels, lengths)
