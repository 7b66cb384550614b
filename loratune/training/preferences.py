"""Training on preferences: the objective, and the log-probabilities of its reference.

A pair is two consecutive rows, an unpaired preference is one row; either is an item. The objective needs the summed
log-probability of each row, which the output layer gives (`kernels.row_sums`). The formulas are in `objectives`.

The reference is the model before its first step: the base with the adapter switched off, or with the adapter that is
trained further. So no second model is needed: its log-probabilities are computed once, before the first step, and kept
in the cache of the rows, under everything that decides them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune import kernels
from loratune.codes import Code
from loratune.compare.engine import BeforeBatch, Engine, Objective, ScoringLayout, ScoringPass, nothing, run_batch
from loratune.compare.losses import RowLosses
from loratune.compare.objectives import AnswerScores, ComparedRows, Formula, divergence
from loratune.compare.preferences import PreferenceMetrics
from loratune.data import TokenizedDataset
from loratune.data.packing import Items
from loratune.errors import NumericError, Problem
from loratune.model.upstream import as_in_training, has_8bit_layers
from loratune.system.launcher import SINGLE_PROCESS, Group

_ROUNDING = {False: 0.25, True: 1e-3}
"""Whether the model is in more than 16 bits → nats by which the log-probability of an answer may differ from the same
in other batches, for 1 plus the root of its tokens. SmolLM2-135M in bfloat16 gave one of about 20 tokens 0.35 nats more
in a tree of eight pairs than in one of the reference."""
_ROUNDING_BY_BATCH = 1.0
"""The same where bitsandbytes rounds activations to 8 bits, as on a GPU, by what else is in a batch. On a CPU the same
gave an answer of about 28 tokens 3.1 nats more, half as much as this allows; a GPU was not tried."""
MOST_COMPARED = 256
"""Training items whose preferences are measured if there are no validation rows."""
_ORDERED = 0.5
"""The share of pairs in order from which on that is pointed out."""


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of items from one pass, in the order of the items.

    Attributes:
        answers: Of the rows.
        sides: (rows,), see `TokenizedRow.side`.
        mismatched: Of the prompts with answers to others; none where the objective has none.
    """

    answers: AnswerScores
    sides: Tensor
    mismatched: AnswerScores

    @classmethod
    def of(cls, scores: Mapping[str, list[float]]) -> "ScoredBatch":
        """From plain numbers, see `Objective.read`."""
        numbers = {name: torch.tensor(scores.get(name, []), dtype=torch.float64) for name in _NAMES}
        answers = AnswerScores(numbers["answers"], numbers["tokens"], numbers["references"])
        other = numbers["mismatched"]
        mismatched = AnswerScores(other, torch.ones_like(other), numbers["mismatched_references"])
        return cls(answers, numbers["sides"].long(), mismatched)


_NAMES = ("answers", "tokens", "references", "sides", "mismatched", "mismatched_references")


class PreferenceObjective(Objective):
    """An objective on preferences.

    Attributes:
        formula: Which.
        unit: `pair` or `answer`.
        last: What the last pass over held-out rows gave; None before the first.
        step: What the last micro-step gave, without gradients.
    """

    def __init__(self, formula: Formula, splits: Mapping[str, ComparedRows]):
        """splits: The rows by the name of their split."""
        self.formula, self.splits = formula, splits
        self.unit = "answer" if formula.name == "kto" else "pair"
        self.last: ScoredBatch | None = None
        self.step: ScoredBatch | None = None
        self._given: dict[str, Any] = {}
        self._divergence = 0.0

    # As an `Objective`

    def items(self, dataset: TokenizedDataset) -> tuple[Items, int]:
        """See `Objective`."""
        return next(rows for rows in self.splits.values() if rows.dataset is dataset), dataset.rows_per_example

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """See `Objective`; estimates KTO's divergence over all of the step."""
        own = [batch for batch in batches if (batch["labels"] >= 0).any()]
        rows, rows_per_example = sum(len(batch["sides"]) for batch in own), 2 if self.unit == "pair" else 1
        difference, prompts = 0.0, 0
        if self.formula.name == "kto":
            was_training = model.training
            model.eval()
            for batch in batches:  # All processes take part in every forward pass.
                found = self._mismatched_answers(model, batch["mismatched"])
                if (batch["labels"] >= 0).any():
                    difference += float((found.log_probabilities - found.reference).sum())
                    prompts += len(found.tokens)
            model.train(was_training)
        rows, difference, prompts = group.total([rows, difference, prompts])  # type: ignore[assignment]
        self._divergence = max(0.0, difference / prompts) if prompts else 0.0
        return torch.tensor(rows / rows_per_example, device=model.device)

    def set_loss_targets(self, model: Any, batch: dict[str, Any], *, by_row: bool = True) -> None:
        """See `Objective`; the loss is always wanted row by row."""
        names = ("lengths", "sides", "references", "mismatched")
        self._given = {name: batch.pop(name, None) for name in names}
        kernels.set_loss_targets(model, batch["labels"], batch.pop("places", None), self._given["lengths"])

    def total(self, model: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        answers = self._answers(kernels.row_sums(model, logits, labels, self._given["lengths"]), labels)
        sides = self._given["sides"]
        losses = self._item_losses(ScoredBatch(answers, sides, _no_answers()), self._divergence)
        rows_per_example = len(sides) // len(losses)
        is_there = answers.tokens.view(-1, rows_per_example)[:, 0] > 0
        held = AnswerScores(answers.log_probabilities.detach(), answers.tokens, answers.reference)
        self.step = ScoredBatch(held, sides, _no_answers())
        return (losses * is_there).sum().float(), is_there.sum()

    def scores(self, model: Any, batch: Mapping[str, Any]) -> dict[str, list[float]]:
        """See `Objective`."""
        labels, _, sums = run_batch(self, model, batch)
        answers, sides, other = self._answers(sums, labels), self._given["sides"], self._given["mismatched"]
        mismatched = self._mismatched_answers(model, other) if other is not None else _no_answers()
        found = (
            answers.log_probabilities, answers.tokens, answers.reference, sides, mismatched.log_probabilities,
            mismatched.reference,
        )  # fmt: skip
        return {name: value.tolist() for name, value in zip(_NAMES, found, strict=True)}

    def row_losses(self, scores: Mapping[str, list[float]]) -> RowLosses:
        """See `Objective`."""
        self.last = ScoredBatch.of(scores)
        losses = self._item_losses(self.last, divergence(self.last.mismatched)).tolist()
        return RowLosses.of(losses, [1] * len(losses))

    def held_out(self, engine: Engine, dataset: TokenizedDataset) -> ScoringPass:
        """See `Objective`; all items are computed, also copies, whose mismatched answers differ."""
        return self.plan(engine, dataset, dict.fromkeys(range(dataset.items), 1))

    def metrics(self, split: str) -> PreferenceMetrics | None:
        """What the last pass over held-out rows gave, compared with the reference; None before the first."""
        return self._metrics(split, self.last, divergence(self.last.mismatched)) if self.last is not None else None

    def logged(self) -> dict[str, float]:
        """See `Objective`."""
        return {} if self.last is None else _logged(self._metrics("", self.last, divergence(self.last.mismatched)))

    def logged_of_step(self) -> dict[str, float]:
        """See `Objective`."""
        return {} if self.step is None else _logged(self._metrics("", self.step, self._divergence))

    def _metrics(self, split: str, read: ScoredBatch, estimate: float) -> PreferenceMetrics:
        return PreferenceMetrics.of(split, self.formula, read.answers, read.sides, estimate)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """See `Objective`: what training gives to answers is compared with what was read of the reference."""
        return as_in_training(model)

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """See `Objective`: rewards start at 0, which a wrong reference would show in."""
        if not self.formula.has_reference:
            return
        was_training = model.training
        model.eval()
        labels, _, sums = run_batch(self, model, first())
        model.train(was_training)
        answers, sides = self._answers(sums, labels), self._given["sides"]
        if self._given["references"] is None or not len(sides) or not bool((answers.tokens > 0).all()):
            return
        difference = (answers.log_probabilities - answers.reference).abs()
        rounding = _ROUNDING[model.dtype.itemsize > 2]
        if model.device.type != "cpu" and has_8bit_layers(model):
            rounding = _ROUNDING_BY_BATCH
        allowed = rounding * (1 + answers.tokens.double().sqrt())
        if bool((difference <= allowed).all()):
            return
        loss = float(self._item_losses(ScoredBatch(answers, sides, _no_answers()), 0.0).mean())
        expected = self.formula.first_loss()
        what = f"before the first step, the model gives an answer a log-probability {float(difference.max()):.3g} nats "
        what += f"from that of the reference, which is to be the same; the first {self.formula.name} loss is {loss:.6f}"
        what += f" instead of {expected:.6f}" if expected is not None else ""
        fix = "the reference or the model is not what it is taken for: run again with another HF_DATASETS_CACHE"
        raise NumericError(Problem(Code.LORA_START, what, key="training.objective", fix=fix))

    # What models give to rows

    def _mismatched_answers(self, model: Any, batch: Mapping[str, Any]) -> AnswerScores:
        labels, _, sums = run_batch(self, model, batch)
        return self._answers(sums, labels)

    def _answers(self, sums: Tensor, labels: Tensor) -> AnswerScores:
        """What a model gives to the rows of the batch that was expected last. sums: the loss of each."""
        lengths, reference = self._given["lengths"], self._given["references"]
        tokens = kernels.row_counts(labels, lengths)
        known = torch.zeros_like(sums) if reference is None else reference.to(sums.device)
        return AnswerScores(-sums, tokens, known)

    def _item_losses(self, read: ScoredBatch, estimate: float) -> Tensor:
        """(items,), the loss of each. estimate: of KTO's divergence."""
        return self.formula.item_losses(read.answers, read.sides, estimate)


def _logged(metrics: PreferenceMetrics) -> dict[str, float]:
    names = zip(metrics.names, (metrics.good, metrics.bad), strict=True)
    own = {f"{name}_log_probability": float(side.after.mean()) for name, side in names if len(side.after)}
    return {"reward_accuracy": metrics.accuracy.value, "reward_margin": metrics.margin.value, **own}


def _no_answers() -> AnswerScores:
    nothing_there = torch.zeros(0, dtype=torch.float64)
    return AnswerScores(nothing_there, nothing_there, nothing_there)


# The reference


def score_reference(
    objective: PreferenceObjective,
    model: Any,
    rows: ComparedRows,
    layout: ScoringLayout,
    before_batch: BeforeBatch = nothing,
    group: Group = SINGLE_PROCESS,
) -> NDArray[np.float64]:
    """The log-probabilities of all rows in the order of the dataset, and behind them those of the mismatched ones.

    Arguments as of `Objective.losses`; layout: how rows are batched.
    """
    together = rows.dataset.rows_per_example
    items, each = objective.items(rows.dataset)
    planned = layout.layout(items, rows.dataset.rows.lengths, each)
    batches = layout.batches(planned, range(rows.dataset.items))
    found = ScoredBatch.of(objective.read(model, planned, batches, before_batch, group))
    order = np.argsort((np.concatenate(batches)[:, None] * together + np.arange(together)).reshape(-1))
    parts = [part.log_probabilities.numpy() for part in (found.answers, found.mismatched)]
    return np.concatenate([part[order] for part in parts if len(part)])


def set_reference(rows: ComparedRows, values: NDArray[np.float64]) -> None:
    """Give rows their log-probabilities in the reference, as `score_reference` returns them.

    Raises:
        NumericError: The reference gives an answer no log-probability that could be compared with.
    """
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        what = f"the reference, which is the model before training, gives an answer the log-probability {values[first]}"
        fix = "check that the base model works by itself"
        where = rows.dataset.rows.row(first % len(rows)).where
        raise NumericError(Problem(Code.LORA_START, what, where, "training.objective", fix))
    rows.reference = values[: len(rows)]
    rows.mismatched = values[len(rows) :] if len(values) > len(rows) else None


def order_note(rows: ComparedRows) -> str:
    """A line on how many pairs the reference has in order."""
    assert rows.reference is not None
    share = float((rows.reference[::2] > rows.reference[1::2]).mean())
    line = f"the chosen answer is the more likely one in {share:.0%} of the training pairs before training"
    return f"{line}: more than half are in order already" if share > _ORDERED else line
