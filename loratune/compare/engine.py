"""The engine that computes the losses of rows: it chooses layers and batches, runs the model, and orders the results.

Training, its comparisons at the end, `evaluate` and `sweep` all score rows here. What is in a batch follows from the
model and the rows alone, not from the batches of training or the number of processes. So one adapter has one loss on
the same rows in the same dtype and on the same device, whichever command computes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune import kernels
from loratune.codes import Code
from loratune.compare.metrics import RowLosses
from loratune.config import DataSection
from loratune.data import TokenizedDataset
from loratune.data.batches import LONGEST, packing_refusal, padding_refusal
from loratune.data.packing import BatchLayout, Items, Packing, PrefixTree, common_prefix
from loratune.errors import ConfigError, Problem
from loratune.events import counting
from loratune.kernels import next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group

BATCH_TOKENS = 2048
"""Tokens of a scoring batch, padding included, at most; a longer row is a batch by itself. Without gradients that needs
less memory than training on a single row of a few hundred tokens."""
WORTH_SHARING = 0.05
"""The share of the tokens from which on shared prefixes are computed once."""
_SAMPLED_ROWS = 4096
"""Rows by which the saving of shared prefixes is estimated, at most."""

Scores = Mapping[str, Sequence[float]]
"""Name → numbers of rows, see `Objective.scores`."""
Copies = Mapping[int, int]
"""Number of an item → how often it occurs."""
BeforeBatch = Callable[[dict[str, torch.Tensor]], None]
"""Called with every batch that is read; it may raise an error, which ends the pass."""


def nothing(_: Any) -> None:
    """A `BeforeBatch` that does nothing."""


@dataclass(frozen=True)
class ScoringLayout:
    """How rows are batched when each row gets its own loss.

    In other batches the loss of a row may differ by rounding. Where prefixes are shared, a batch may have a few tokens
    more, as the tree leaves out prefixes of less than `LEAST_SHARED` tokens.

    Attributes:
        flat: Whether rows are put end to end; otherwise rows of about the same length are padded.
        saved: About the share of the tokens that need not be computed as rows share prefixes; None if all are.
        pad_id: The token for padding.
        tokens: Of a batch, padding included, at most; a longer row is a batch by itself.
    """

    flat: bool
    saved: float | None
    pad_id: int
    tokens: int

    def layout(self, items: Items, lengths: NDArray[np.integer[Any]], rows_per_example: int = 0) -> BatchLayout:
        """Rows, an item by itself. lengths: (rows,). rows_per_example: as of `BatchLayout`."""
        packing: Packing = "batch" if self.flat else "none"
        layout = BatchLayout(items, lengths, packing, 1, int(lengths.max()), self.pad_id, rows_per_example)
        return layout.sharing(self.saved) if self.saved is not None else layout

    def plan(self, layout: BatchLayout, copies: Copies) -> "ScoringPass":
        """A pass over some items of a layout. copies: see `ScoringPass`."""
        return ScoringPass(layout, self.batches(layout, [*copies]), copies)

    def batches(self, layout: BatchLayout, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of some items of a layout, batch by batch: items of about one length, or, where prefixes are
        shared, items that share a prefix."""
        found: list[list[int]] = []
        total = 0
        for number, alone, added in self._in_order(layout, numbers):
            total = total + added if self.flat else alone * (len(found[-1]) + 1 if found else 1)
            if not found or total > self.tokens:
                found.append([])
                total = alone
            found[-1].append(number)
        return found

    def _in_order(self, layout: BatchLayout, numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Items, each with its tokens in a batch of its own, and those that it adds after the item before it."""
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


@dataclass(frozen=True)
class ScoringPass:
    """One pass of a model over some rows.

    Attributes:
        layout: The rows.
        batches: The numbers of the items of each batch.
        copies: The items, in the order in which their losses are wanted.
    """

    layout: BatchLayout
    batches: Sequence[Sequence[int]]
    copies: Copies

    def heaviest(self) -> "ScoringPass":
        """The batch with the most tokens, as a pass of its own."""
        batch = max(self.batches, key=lambda batch: sum(map(self.layout.tokens, batch)))
        return ScoringPass(self.layout, [batch], dict.fromkeys(batch, 1))

    def ordered(self, scores: Scores) -> dict[str, list[float]]:
        """Scores in the order of the batches, as many of each item, put into the order of `copies`."""
        places = {number: place for place, number in enumerate(chain.from_iterable(self.batches))}
        order = [places[number] for number in self.copies]
        by_item = {name: np.reshape(values, (len(order), -1)) for name, values in scores.items()}
        return {name: values[order].reshape(-1).tolist() for name, values in by_item.items()}


class Objective:
    """The loss of rows, which training minimizes. This one is the cross-entropy of `sft`.

    Attributes:
        unit: What the loss is a mean over, in the singular: `token`, `pair`, `answer`.
    """

    unit = "token"

    def items(self, dataset: TokenizedDataset) -> tuple[Items, int]:
        """The rows of a dataset as `BatchLayout` takes them; and how many of them make an item, 0 where a row does."""
        return dataset.rows, 0

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """Prepare an optimizer step of these micro-steps. Returns how many tokens, pairs or answers it has over all
        processes. count: supervised tokens of the step, as Trainer counts them."""
        return count

    def set_loss_targets(self, model: Any, batch: dict[str, Any], *, by_row: bool = False) -> None:
        """Remove from a batch what is not an input of the model, and keep it for the loss. Called before the forward
        pass. by_row: no sum over rows."""
        lengths = batch.pop("lengths", None)
        kernels.set_loss_targets(model, batch["labels"], batch.pop("places", None), lengths if by_row else None)

    def total(self, model: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of the batch given to `set_loss_targets`, and its number of tokens, pairs or answers."""
        return next_token_loss(model, logits, labels)

    def score(
        self, model: Any, rows: ScoringPass, before_batch: BeforeBatch = nothing, group: Group = SINGLE_PROCESS
    ) -> RowLosses:
        """The loss of each row, pair or answer. All processes get all of them. Arguments as of `read`."""
        found = self.row_losses(rows.ordered(self.read(model, rows, before_batch, group)))
        return replace(found, copies=np.array([*rows.copies.values()], np.float64))

    @torch.no_grad()
    def read(
        self, model: Any, rows: ScoringPass, before_batch: BeforeBatch = nothing, group: Group = SINGLE_PROCESS
    ) -> dict[str, list[float]]:
        """What `scores` gives of all batches, in their order, without gradients and dropout.

        Args:
            model: Accelerated, and left in the mode, training or evaluation, in which it is.
            rows: The rows.
            before_batch: See `BeforeBatch`.
            group: The processes, each of which takes a share of the batches.
        """
        layout, batches = rows.layout, rows.batches
        own: list[tuple[int, dict[str, list[float]]]] = []
        was_training = model.training
        model.eval()
        with counting("computing losses, in batches", len(batches)) as advance:
            for first in range(0, len(batches), group.count):
                position = first + group.rank
                # Beyond the last batch a process repeats one, as all processes must take part in every forward pass.
                batch = layout.collate([layout.items[number] for number in batches[position % len(batches)]])
                before_batch(batch)
                found = self.scores(model, batch)
                own += [(position, found)] if position < len(batches) else []
                advance(group.count)
        model.train(was_training)
        parts = [part for _, part in sorted(chain.from_iterable(group.all_gather(own)), key=itemgetter(0))]
        return {name: [*chain.from_iterable(part[name] for part in parts)] for name in parts[0]} if parts else {}

    def scores(self, model: Any, batch: Mapping[str, Any]) -> dict[str, list[float]]:
        """Numbers of each row of a batch, by name. Objectives on preferences have further ones."""
        labels, lengths, sums = run_batch(self, model, batch)
        return {"nats": sums.tolist(), "tokens": kernels.row_counts(labels, lengths).tolist()}

    def row_losses(self, scores: Scores) -> RowLosses:
        """The losses that follow from what `read` gives."""
        return RowLosses.of(scores["nats"], scores["tokens"])

    def copies(self, dataset: TokenizedDataset) -> dict[int, int]:
        """The items by which a whole dataset is scored, and how often each occurs: copies are computed once."""
        return {number: len(copies) for number, copies in dataset.copies().items()}

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """The context in which a model is scored, without gradients. model: as given to `read`."""
        return nullcontext()

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """Check that the model is what the objective expects before its first step. first: makes the first batch, on
        the CPU. Raises NumericError: it is not."""

    def logged(self, *, of_step: bool = False) -> dict[str, float]:
        """Further metrics, by their names, of the last pass over rows; or of the last micro-step."""
        return {}


SFT = Objective()
"""The objective `sft`: every supervised token, given those before it."""


@torch.no_grad()
def run_batch(
    objective: Objective, model: Any, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The labels of a batch, the tokens of its rows, and the loss of each row, on the model's device."""
    given = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    lengths = given["lengths"]
    objective.set_loss_targets(model, given, by_row=True)
    labels = given.pop("labels")
    with objective.reading(model):
        return labels, lengths, kernels.row_sums(model, model(**given, use_cache=False).logits, labels, lengths)


class Engine:
    """How the losses of a model with an adapter, and of its base, are computed.

    Attributes:
        acceleration: Which layers the kernels compute.
        flat: Whether rows are put end to end.
        padded: Whether rows that are not are padded; otherwise each is a batch by itself.
        pad_id: The token for padding.
    """

    def __init__(
        self, model: Any, section: DataSection, pad_id: int, acceleration: kernels.Acceleration,
        *, flat: bool | None = None, trees: bool | None = None, group: Group = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        """Find out how the model can be given rows.

        Args:
            model: A `PeftModel` with its weights, whose adapter is active. Inside a context in which it computes as its
                base, the losses are those of the base.
            section: Whether rows may be packed and prefixes shared.
            pad_id: See the attributes.
            acceleration: What `kernels.accelerate` found.
            flat: Whether the model, if its attention is accelerated, computes packed rows as it computes them alone;
                None if that is not known.
            trees: The same of rows that share prefixes.
            group: The processes, each of which takes a share of the rows.
        """
        self._model, self._section, self.pad_id = model, section, pad_id
        self.acceleration, self._group = acceleration, group
        self._trees = False if section.share_prefixes is False else trees
        with self.acceleration.applied(model):
            self.flat = section.packing != "none" and kernels.attends_by_rows(model)
            if self.flat:
                self.flat = packing_refusal(model, LONGEST) is None if flat is None else flat
            self.padded = self.flat or padding_refusal(model, pad_id) is None

    def losses(
        self, dataset: TokenizedDataset, copies: Copies, objective: Objective = SFT, before_batch: BeforeBatch = nothing
    ) -> RowLosses:
        """The losses of some rows of a dataset, or of its pairs or answers. before_batch: see `BeforeBatch`. Others as
        of `plan`."""
        planned = self.plan(dataset, copies, objective)
        with self.acceleration.applied(self._model):
            return objective.score(self._model, planned, before_batch, self._group)

    def plan(self, dataset: TokenizedDataset, copies: Copies, objective: Objective = SFT) -> ScoringPass:
        """A pass over some items of a dataset. Prefixes are shared where that saves enough. copies: see `ScoringPass`.
        objective: what the loss is."""
        items, rows_per_example = objective.items(dataset)
        scoring = ScoringLayout(self.flat, None, self.pad_id, BATCH_TOKENS if self.padded else 0)
        layout = scoring.layout(items, dataset.rows.lengths, rows_per_example)
        saved = _saving(layout, [*copies]) if self.flat and self._trees is not False else 0.0
        if saved and (saved >= WORTH_SHARING or self._section.share_prefixes is True) and self._computes_trees():
            scoring, layout = replace(scoring, saved=saved), layout.sharing(saved)
        return scoring.plan(layout, copies)

    def _computes_trees(self) -> bool:
        if self._trees is None and "loss" in self.acceleration.fallbacks:
            self._trees = False
        elif self._trees is None:
            is_applied = isinstance(self._model.get_output_embeddings(), kernels.LossHead)
            with nullcontext() if is_applied else self.acceleration.applied(self._model):
                self._trees = kernels.tree_refusal(self._model) is None
        return self._trees

    @property
    def computed_by(self) -> dict[str, str]:
        """How losses are computed, as plain values; another way differs by rounding. Whether prefixes are shared is
        decided by the rows."""
        layers = "accelerated" if self.acceleration.steps else "stock"
        batches = "packed" if self.flat else "padded" if self.padded else "one by one"
        return {"dtype": str(self._model.dtype).removeprefix("torch."), "layers": layers, "batches": batches}


def _saving(layout: BatchLayout, numbers: Sequence[int]) -> float:
    """The fraction of tokens that shared prefixes save, estimated on a sample of items."""
    if len(numbers) > _SAMPLED_ROWS:
        numbers = [numbers[place] for place in np.random.default_rng(0).permutation(len(numbers))[:_SAMPLED_ROWS]]
    every = sum(layout.tokens(number) for number in numbers)
    trees = ScoringLayout(True, 0.0, 0, 0)
    return 1 - sum(added for _, _, added in trees._in_order(layout, numbers)) / every


def check_positions(rows: TokenizedDataset, section: DataSection, limit: int | None) -> None:
    """Check that rows fit into the context of the model. limit: see `model.load.context_length`.

    Raises:
        ConfigError: A row is longer.
    """
    longest = int(rows.rows.lengths.max())
    if limit is not None and longest > limit:
        what = f"is {section.max_length}, and the longest row has {longest} tokens, but the model has {limit} positions"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, key="data.max_length", fix=f"set it to {limit}"))
