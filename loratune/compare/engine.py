"""The engine that computes the losses of rows: it chooses layers and batches, runs the model, and orders the results.

Training, its final comparisons, `evaluate` and `sweep` all score rows here. Batches depend only on the model and the
rows, not on the batches of training or the number of processes. So every command computes the same loss for an adapter
on the same rows, in the same dtype and on the same device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune import kernels
from loratune.adapter.padding import writes_padded
from loratune.compare.metrics import RowLosses
from loratune.config import DataSection
from loratune.data import TokenizedDataset
from loratune.data.batch_check import LONGEST, BatchCheck
from loratune.data.formats import IGNORED, common_prefix
from loratune.data.packing import BatchLayout, Items, Packing, PrefixTree
from loratune.events import counting
from loratune.kernels import next_token_loss
from loratune.system.launcher import SINGLE_PROCESS, Group

BATCH_TOKENS = 2048
"""The maximum tokens of a scoring batch, including padding; a longer row is a batch by itself. Without gradients, this
needs less memory than training on a single row of a few hundred tokens."""
WORTH_SHARING = 0.05
"""The fraction of tokens saved from which on shared prefixes are computed once."""
_SAMPLED_ROWS = 4096
"""The most rows used to estimate the saving by shared prefixes."""

Scores = Mapping[str, Sequence[float]]
"""Name → values of all rows, see `Objective.scores`."""
Copies = Mapping[int, float]
"""Number of an item → how often it counts."""
BeforeBatch = Callable[[dict[str, torch.Tensor]], None]
"""Called with every batch before its forward pass; an error that it raises ends the pass."""


def nothing(_: Any) -> None:
    """A `BeforeBatch` that does nothing."""


@dataclass(frozen=True)
class ScoringLayout:
    """How rows are batched for scoring, where each row gets its own loss.

    In other batches the loss of a row may differ by rounding. With shared prefixes, a batch may have a few tokens more,
    as the tree does not share prefixes shorter than `LEAST_SHARED` tokens.

    Attributes:
        flat: Whether rows are packed; otherwise rows of similar length are padded.
        saved: The approximate fraction of tokens saved by shared prefixes; None if prefixes are not shared.
        pad_id: The id of the padding token.
        tokens: The maximum tokens of a batch, including padding; a longer row is a batch by itself.
        limits: Rows on both sides of one share no prefix, see `kernels.length_limits`.
    """

    flat: bool
    saved: float | None
    pad_id: int
    tokens: int
    limits: Sequence[int] = ()

    def layout(self, items: Items, lengths: NDArray[np.integer[Any]], rows_per_example: int = 0) -> BatchLayout:
        """A layout with one item per batch. lengths: (rows,). rows_per_example: see `BatchLayout`."""
        packing: Packing = "batch" if self.flat else "none"
        layout = BatchLayout(items, lengths, packing, 1, int(lengths.max()), self.pad_id, rows_per_example)
        return layout.sharing(self.saved, self.limits) if self.saved is not None else layout

    def plan(self, layout: BatchLayout, copies: Copies) -> "ScoringPass":
        """A pass over some items of a layout. copies: see `ScoringPass`."""
        return ScoringPass(layout, self.batches(layout, [*copies]), copies)

    def batches(self, layout: BatchLayout, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of some items of a layout by batch: items of similar length, or with shared prefixes, items that
        share a prefix."""
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
        """Items, each with its tokens in a separate batch, and the tokens that it adds after the previous item."""
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
        batches: The item numbers of each batch.
        copies: The items, in the order of the results.
        owners: (items,), for blocks of rows the number of the row, see `TokenCache.owners`; None if no row was split.
    """

    layout: BatchLayout
    batches: Sequence[Sequence[int]]
    copies: Copies
    owners: NDArray[np.int64] | None = None

    def heaviest(self) -> "ScoringPass":
        """A pass over only the batch with the most tokens."""
        batch = max(self.batches, key=lambda batch: sum(map(self.layout.tokens, batch)))
        return ScoringPass(self.layout, [batch], dict.fromkeys(batch, 1))

    def ordered(self, scores: Scores) -> dict[str, list[float]]:
        """Scores in the order of the batches, reordered by item to the order of `copies`."""
        places = {number: place for place, number in enumerate(chain.from_iterable(self.batches))}
        order = [places[number] for number in self.copies]
        by_item = {name: np.reshape(values, (len(order), -1)) for name, values in scores.items()}
        return {name: values[order].reshape(-1).tolist() for name, values in by_item.items()}


class Objective:
    """The loss of rows, which training minimizes. This one is the cross-entropy of `sft`.

    Attributes:
        unit: The unit over which the loss is averaged: `token`, `pair` or `answer`.
    """

    unit = "token"

    def items(self, dataset: TokenizedDataset) -> tuple[Items, int]:
        """The rows of a dataset for `BatchLayout`, and its `rows_per_example`: rows per item, 0 if each row is one."""
        return dataset.rows, 0

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """Prepare an optimizer step with these micro-batches. Returns its number of tokens, pairs or answers over all
        processes. count: supervised tokens of the step, as counted by Trainer."""
        return count

    def set_loss_targets(self, model: Any, batch: dict[str, Any], *, by_row: bool = False) -> None:
        """Remove the entries of a batch that are not model inputs, and keep them for the loss. Called before the
        forward pass. by_row: compute a loss per row, without summing over rows."""
        lengths = batch.pop("lengths", None)
        kernels.set_loss_targets(model, batch["labels"], batch.pop("places", None), lengths if by_row else None)

    def total(self, model: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of the batch given to `set_loss_targets`, and its number of tokens, pairs or answers."""
        return next_token_loss(model, logits, labels)

    def score(
        self, model: Any, rows: ScoringPass, before_batch: BeforeBatch = nothing, group: Group = SINGLE_PROCESS
    ) -> RowLosses:
        """The loss of each row, pair or answer; all processes get all of them. A row that was split has
        the loss of its blocks together, as they depend on each other. Args as for `read`."""
        found = self.row_losses(rows.ordered(self.read(model, rows, before_batch, group)))
        found = replace(found, copies=np.array([*rows.copies.values()], np.float64))
        return found if rows.owners is None else found.of_rows(rows.owners)

    @torch.no_grad()
    def read(
        self, model: Any, rows: ScoringPass, before_batch: BeforeBatch = nothing, group: Group = SINGLE_PROCESS
    ) -> dict[str, list[float]]:
        """The `scores` of all batches, in their order, computed without gradients and dropout.

        Args:
            model: The accelerated model; its mode, training or evaluation, is restored afterwards.
            rows: The rows.
            before_batch: See `BeforeBatch`.
            group: The processes, among which the batches are divided.
        """
        layout, batches = rows.layout, rows.batches
        own: list[tuple[int, dict[str, list[float]]]] = []
        was_training = model.training
        model.eval()
        with counting("scoring rows", len(batches)) as advance:
            for first in range(0, len(batches), group.count):
                position = first + group.rank
                # After the last batch a process repeats one, as all processes must take part in every forward pass.
                batch = layout.collate([layout.items[number] for number in batches[position % len(batches)]])
                before_batch(batch)
                found = self.scores(model, batch)
                own += [(position, found)] if position < len(batches) else []
                advance(group.count)
        model.train(was_training)
        parts = [part for _, part in sorted(chain.from_iterable(group.all_gather(own)), key=itemgetter(0))]
        return {name: [*chain.from_iterable(part[name] for part in parts)] for name in parts[0]} if parts else {}

    def scores(self, model: Any, batch: Mapping[str, Any]) -> dict[str, list[float]]:
        """Name → values of each row of a batch. Preference objectives have additional ones."""
        labels, lengths, sums = run_batch(self, model, batch)
        counts = kernels.row_counts(kernels.on_host(labels), kernels.on_host(lengths))
        return {"nats": sums.tolist(), "tokens": counts.tolist()}

    def row_losses(self, scores: Scores) -> RowLosses:
        """The losses, from the result of `read`."""
        return RowLosses.of(scores["nats"], scores["tokens"])

    def training_items(self, dataset: TokenizedDataset) -> Items:
        """The rows of a dataset to train on, in the form of `items`."""
        return self.items(dataset)[0]

    def copies(self, dataset: TokenizedDataset) -> dict[int, float]:
        """The items to score for a whole dataset, and how often each counts, see `TokenizedDataset.weighted`; copies
        are computed once."""
        return dataset.weighted({number: len(copies) for number, copies in dataset.copies().items()})

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """Check that the model meets the assumptions of the objective before the first step. first: makes the first
        batch, on the CPU. Raises NumericError: it does not."""

    def logged(self, *, of_step: bool = False) -> dict[str, float]:
        """Additional metrics by name, of the last pass over rows, or with `of_step` of the last micro-step."""
        return {}


SFT = Objective()
"""The objective `sft`: the cross-entropy of all supervised tokens."""


class WeightedObjective(Objective):
    """The weighted cross-entropy of `sft`: Σ w·loss / Σ w over the tokens of an optimizer step.

    A supervised token has the weight of its row, other tokens this times the weight of prompts. Only training rows have
    weights in a batch; a row that is scored has the loss of its supervised tokens, and counts by its weight.
    """

    def __init__(self, prompt_weight: float):
        """prompt_weight: the weight of the tokens that are not supervised."""
        self._prompt_weight = prompt_weight
        self._weights: torch.Tensor | None = None

    def training_items(self, dataset: TokenizedDataset) -> Items:
        """The rows with the weights of their tokens, relative to the mean of rows: in float32 small ones would be 0."""
        weights = dataset.rows.weights
        weights = None if weights is None else weights / weights.mean()
        return WeightedRows(dataset.rows, weights, self._prompt_weight, dataset.rows.owners)

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """Returns the sum of the weights of the step."""
        own = sum(float(batch["weights"][:, 1:][batch["labels"][:, 1:] >= 0].sum()) for batch in batches)
        return float(group.total([own])[0])

    def set_loss_targets(self, model: Any, batch: dict[str, Any], *, by_row: bool = False) -> None:
        """See `Objective`."""
        self._weights = weights = batch.pop("weights", None)
        super().set_loss_targets(model, batch, by_row=by_row)
        if weights is not None:
            kernels.set_loss_weights(model, weights)

    def total(self, model: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`; the number is the sum of the weights."""
        return next_token_loss(model, logits, labels, self._weights)


@dataclass(frozen=True)
class WeightedRows:
    """Rows of `input_ids` and `labels`, with a weight for each label: `weights`.

    Attributes:
        rows: The rows.
        weights: (rows,), the factor of each row; None: 1.
        prompt_weight: The weight of tokens that are not supervised, whose labels are then their ids, unless repeated.
        owners: See `TokenCache.owners`.
    """

    rows: Items
    weights: NDArray[np.float64] | None
    prompt_weight: float
    owners: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> dict[str, list[Any]]:
        row = self.rows[number]
        labels, factor = row["labels"], 1.0 if self.weights is None else float(self.weights[number])
        weights = [factor if label >= 0 else factor * self.prompt_weight for label in labels]
        if self.prompt_weight:
            follows = self.owners is not None and number > 0 and self.owners[number] == self.owners[number - 1]
            new = next((place for place, label in enumerate(labels) if label >= 0), 1) if follows else 1
            labels = [*[IGNORED] * new, *row["input_ids"][new:]]
        return {**row, "labels": labels, "weights": weights}


@torch.no_grad()
def run_batch(
    objective: Objective, model: Any, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The labels of a batch, the lengths of its rows, and the loss of each row, on the model's device."""
    given = kernels.to_device(batch, model.device)
    lengths = given["lengths"]
    objective.set_loss_targets(model, given, by_row=True)
    labels = given.pop("labels")
    return labels, lengths, kernels.row_sums(model, model(**given, use_cache=False).logits, labels, lengths)


class Engine:
    """Computes the losses of a model with an adapter, and of its base.

    Attributes:
        model: A `PeftModel`, see `__init__`.
        acceleration: The layers that kernels compute.
        group: The processes, among which the rows are divided.
        flat: Whether rows are packed.
        padded: Whether rows can be padded, if they are not packed; if False, each row is a batch by itself.
        writes_padded: Whether prompts that the model continues can be padded in a batch.
        pad_id: The id of the padding token.
    """

    def __init__(
        self, model: Any, section: DataSection, pad_id: int, acceleration: kernels.Acceleration,
        *, flat: bool | None = None, trees: bool | None = None, group: Group = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        """Test whether the model supports packing and padding.

        Args:
            model: A `PeftModel` with its weights, whose adapter is active. In a context that disables the adapter, the
                base computes the losses.
            section: The settings of packing and shared prefixes.
            pad_id: See the attributes.
            acceleration: The result of `kernels.accelerate`.
            flat: Whether the model with accelerated attention gives the same results for packed rows as for single
                rows; None if unknown.
            trees: The same for rows that share prefixes.
            group: The processes, among which the rows are divided.
        """
        self.model, self._section, self.pad_id = model, section, pad_id
        self.acceleration, self.group = acceleration, group
        self._trees = False if section.share_prefixes is False else trees
        with self.acceleration.applied(model):
            self.flat = section.packing != "none" and kernels.attends_by_rows(model)
            check = BatchCheck(model, acceleration)
            if self.flat:
                self.flat = check.packing(LONGEST) is None if flat is None else flat
            self.padded = self.flat or check.padding(pad_id) is None
        test = partial(writes_padded, model, pad_id, acceleration.sample)  # in all, before weights are sharded
        self.writes_padded: bool = self.padded and acceleration.checks.once(f"writing {pad_id}", bool, test)

    def losses(
        self, dataset: TokenizedDataset, copies: Copies, objective: Objective = SFT, before_batch: BeforeBatch = nothing
    ) -> RowLosses:
        """The losses of some rows, pairs or answers of a dataset. before_batch: see `BeforeBatch`. Other args as for
        `plan`."""
        planned = self.plan(dataset, copies, objective)
        with self.acceleration.applied(self.model):
            return objective.score(self.model, planned, before_batch, self.group)

    def plan(self, dataset: TokenizedDataset, copies: Copies, objective: Objective = SFT) -> ScoringPass:
        """A pass over some items of a dataset. Prefixes are shared if that saves enough. copies: see `ScoringPass`.
        objective: defines the loss."""
        items, rows_per_example = objective.items(dataset)
        planned, owners = self._plan(items, dataset.rows.lengths, copies, rows_per_example), dataset.rows.owners
        return replace(planned, owners=None if owners is None else owners[[*copies]])

    def nats(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """The summed loss of each row of `input_ids` and `labels`: (rows,), in nats."""
        planned = self._plan(
            rows, np.array([len(row["input_ids"]) for row in rows]), dict.fromkeys(range(len(rows)), 1.0)
        )
        with self.acceleration.applied(self.model):
            return SFT.score(self.model, planned, group=self.group).nats

    def _plan(
        self, items: Items, lengths: NDArray[np.integer[Any]], copies: Copies, rows_per_example: int = 0
    ) -> ScoringPass:
        scoring = ScoringLayout(self.flat, None, self.pad_id, BATCH_TOKENS if self.padded else 0)
        layout = scoring.layout(items, lengths, rows_per_example)
        saved = _saving(layout, [*copies]) if self.flat and self._trees is not False else 0.0
        if saved and (saved >= WORTH_SHARING or self._section.share_prefixes is True) and self.shares_prefixes:
            scoring = replace(scoring, saved=saved, limits=kernels.length_limits(self.model.config))
            layout = layout.sharing(saved, scoring.limits)
        return scoring.plan(layout, copies)

    @property
    def shares_prefixes(self) -> bool:
        """Whether prefixes that rows share can be computed once."""
        if not self.flat:
            return False
        if self._trees is None and "loss" in self.acceleration.fallbacks:
            self._trees = False
        elif self._trees is None:
            is_applied = isinstance(self.model.get_output_embeddings(), kernels.LossHead)
            with nullcontext() if is_applied else self.acceleration.applied(self.model):
                self._trees = self.acceleration.tree_refusal(self.model) is None
        return self._trees

    @property
    def computed_by(self) -> dict[str, str]:
        """How losses are computed, as plain values; other ways differ by rounding. Not included: shared prefixes, which
        depend on the rows."""
        layers = "accelerated" if self.acceleration.steps else "stock"
        batches = "packed" if self.flat else "padded" if self.padded else "one by one"
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "layers": layers, "batches": batches}


def _saving(layout: BatchLayout, numbers: Sequence[int]) -> float:
    """The fraction of tokens that shared prefixes save, estimated on a sample of items."""
    if len(numbers) > _SAMPLED_ROWS:
        numbers = [numbers[place] for place in np.random.default_rng(0).permutation(len(numbers))[:_SAMPLED_ROWS]]
    every = sum(layout.tokens(number) for number in numbers)
    trees = ScoringLayout(True, 0.0, 0, 0)
    return 1 - sum(added for _, _, added in trees._in_order(layout, numbers)) / every
