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
from loratune.compare.losses import RowLosses, Values
from loratune.config import DataSection
from loratune.data import TokenizedDataset
from loratune.data.packing import BatchLayout, Items, Packing
from loratune.data.packing_check import LONGEST, packing_refusal, padding_refusal
from loratune.data.prefix_tree import PrefixTree, common_prefix
from loratune.errors import ConfigError, Problem
from loratune.events import counting
from loratune.kernels import next_token_loss
from loratune.lora import attach
from loratune.system.launcher import SINGLE_PROCESS, Group

BATCH_TOKENS = 2048
"""Tokens of a scoring batch, padding included, at most; a longer row is a batch by itself. Without gradients that needs
less memory than training on a single row of a few hundred tokens."""
WORTH_SHARING = 0.05
"""The share of the tokens from which on shared prefixes are computed once."""
_SAMPLED_ROWS = 4096
"""Rows by which the saving of shared prefixes is estimated, at most."""

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

    def plan(self, layout: BatchLayout, copies: Mapping[int, int]) -> "ScoringPass":
        """A pass over some items of a layout. copies: as of `Engine.plan`."""
        times = np.array([*copies.values()], np.float64)
        return ScoringPass(layout, self.batches(layout, [*copies]), [*copies], times)

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
        numbers: The items in the order in which their losses are wanted.
        copies: (items,), how often each occurs, in the order of `numbers`.
    """

    layout: BatchLayout
    batches: Sequence[Sequence[int]]
    numbers: Sequence[int]
    copies: Values

    def heaviest(self) -> "ScoringPass":
        """The batch with the most tokens, as a pass of its own."""
        batch = max(self.batches, key=lambda batch: sum(map(self.layout.tokens, batch)))
        return ScoringPass(self.layout, [batch], batch, np.ones(len(batch)))

    def ordered(self, losses: RowLosses) -> RowLosses:
        """Losses in the order of the batches, put into that of `numbers`, with the copies."""
        places = {number: place for place, number in enumerate(chain.from_iterable(self.batches))}
        return replace(losses.take([places[number] for number in self.numbers]), copies=self.copies)


class Engine:
    """How the losses of a model with an adapter, and of its base, are computed.

    Attributes:
        acceleration: Which layers the kernels compute.
        flat: Whether rows are put end to end.
        padded: Whether rows that are not are padded; otherwise each is a batch by itself.
        pad_id: The token for padding.
    """

    def __init__(
        self, model: Any, section: DataSection, pad_id: int, acceleration: kernels.Acceleration | None = None,
        *, flat: bool | None = None, trees: bool | None = None,
    ) -> None:  # fmt: skip
        """Find out how the model can be given rows.

        Args:
            model: A `PeftModel` with its weights, whose adapter is active.
            section: Whether rows may be packed and prefixes shared.
            pad_id: See the attributes.
            acceleration: What `kernels.accelerate` found, if that is known.
            flat: Whether the model, if its attention is accelerated, computes packed rows as it computes them alone;
                None if that is not known.
            trees: The same of rows that share prefixes.
        """
        self._model, self._section, self.pad_id = model, section, pad_id
        self.acceleration = acceleration or kernels.accelerate(model, attach.adapted_linear)
        self._trees = False if section.share_prefixes is False else trees
        with self.acceleration.applied(model):
            self.flat = section.packing != "none" and kernels.attends_by_rows(model)
            if self.flat:
                self.flat = packing_refusal(model, LONGEST) is None if flat is None else flat
            self.padded = self.flat or padding_refusal(model, pad_id) is None

    def _scoring(self, layout: BatchLayout, numbers: Sequence[int]) -> ScoringLayout:
        """How some items of a layout are batched. Prefixes are shared where that saves enough."""
        tokens = BATCH_TOKENS if self.padded else 0
        saved = _saving(layout, numbers) if self.flat and self._trees is not False else 0.0
        if saved and (saved >= WORTH_SHARING or self._section.share_prefixes is True) and self._computes_trees():
            return ScoringLayout(True, saved, self.pad_id, tokens)
        return ScoringLayout(self.flat, None, self.pad_id, tokens)

    def _computes_trees(self) -> bool:
        if self._trees is None and "loss" in self.acceleration.fallbacks:
            self._trees = False
        elif self._trees is None:
            is_applied = isinstance(self._model.get_output_embeddings(), kernels.LossHead)
            with nullcontext() if is_applied else self.acceleration.applied(self._model):
                self._trees = kernels.tree_refusal(self._model) is None
        return self._trees

    def plan(
        self, items: Items, lengths: NDArray[np.integer[Any]], copies: Mapping[int, int], rows_per_example: int = 0
    ) -> ScoringPass:
        """A pass over some items. copies: number of an item → how often it occurs. Others as of `BatchLayout`."""
        layout = ScoringLayout(self.flat, None, self.pad_id, 0).layout(items, lengths, rows_per_example)
        scoring = self._scoring(layout, [*copies])
        return scoring.plan(layout if scoring.saved is None else layout.sharing(scoring.saved), copies)

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


# What losses are


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

    def losses(
        self,
        model: Any,
        layout: BatchLayout,
        batches: Sequence[Sequence[int]],
        before_batch: BeforeBatch = nothing,
        group: Group = SINGLE_PROCESS,
    ) -> RowLosses:
        """The loss of each row, pair or answer, in the order of the batches. All processes get all of them.

        Args:
            model: Accelerated, and left in the mode, training or evaluation, in which it is.
            layout: The rows.
            batches: The numbers of the items of each batch.
            before_batch: See `BeforeBatch`.
            group: The processes, each of which takes a share of the batches.
        """
        return self.row_losses(self.read(model, layout, batches, before_batch, group))

    @torch.no_grad()
    def read(
        self, model: Any, layout: BatchLayout, batches: Sequence[Sequence[int]], before_batch: BeforeBatch, group: Group
    ) -> dict[str, list[float]]:
        """What `scores` gives of all batches, without gradients and dropout. Arguments as of `losses`."""
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

    def row_losses(self, scores: Mapping[str, list[float]]) -> RowLosses:
        """The losses that follow from what `read` gives."""
        return RowLosses.of(scores["nats"], scores["tokens"])

    def score(
        self, model: Any, rows: ScoringPass, before_batch: BeforeBatch = nothing, group: Group = SINGLE_PROCESS
    ) -> RowLosses:
        """The losses of one pass. Arguments as of `losses`."""
        return rows.ordered(self.losses(model, rows.layout, rows.batches, before_batch, group))

    def plan(self, engine: Engine, dataset: TokenizedDataset, copies: Mapping[int, int]) -> ScoringPass:
        """A pass over some items of a dataset. copies: see `Engine.plan`."""
        items, rows_per_example = self.items(dataset)
        return engine.plan(items, dataset.rows.lengths, copies, rows_per_example)

    def held_out(self, engine: Engine, dataset: TokenizedDataset) -> ScoringPass:
        """The pass over all rows of a dataset. Copies of a row are computed once."""
        return self.plan(engine, dataset, {number: len(copies) for number, copies in dataset.copies().items()})

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """The context in which a model is scored, without gradients. model: as given to `losses`."""
        return nullcontext()

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """Check that the model is what the objective expects before its first step. first: makes the first batch, on
        the CPU. Raises NumericError: it is not."""

    def logged(self) -> dict[str, float]:
        """Further metrics of the last pass over held-out rows, by their names."""
        return {}

    def logged_of_step(self) -> dict[str, float]:
        """Further metrics of the last micro-step."""
        return {}


class NextToken(Objective):
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


@dataclass(frozen=True)
class Scorer:
    """A model, and how its losses are computed.

    Attributes:
        model: A `PeftModel`, with its adapter; inside a context in which it computes as its base, the base.
        engine: Which layers compute it, and how rows are batched.
        objective: What the loss is.
        group: The processes, each of which takes a share of the rows.
    """

    model: Any
    engine: Engine
    objective: Objective = Objective()  # noqa: RUF009  it has no state
    group: Group = SINGLE_PROCESS

    def losses(self, dataset: TokenizedDataset, copies: Mapping[int, int]) -> RowLosses:
        """The losses of some rows of a dataset, or of its pairs or answers. copies: see `Engine.plan`."""
        return self._score(self.objective.plan(self.engine, dataset, copies))

    def losses_of(
        self, rows: Sequence[dict[str, Any]], lengths: NDArray[np.integer[Any]], copies: Mapping[int, int]
    ) -> RowLosses:
        """The losses of rows of `input_ids` and `labels`. lengths: (rows,), their tokens. copies: see `Engine.plan`."""
        return self._score(self.engine.plan(rows, lengths, copies))

    def _score(self, planned: ScoringPass) -> RowLosses:
        with self.engine.acceleration.applied(self.model):
            return self.objective.score(self.model, planned, group=self.group)
