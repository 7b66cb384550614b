"""Scores preferences: the rows, the objective, and the log-probabilities of its reference.

A pair is two consecutive rows, an unpaired preference is one row; either is an item. The objective needs the summed
log-probability of each row, which the output layer computes (`kernels.row_sums`). The formulas are in `objectives`.

The reference in training is the model before its first step: the base with the adapter disabled, or with the adapter
from which training continues. So no second model is needed: the log-probabilities are computed once, before the first
step, and cached with the rows, keyed by everything they depend on. In `evaluate`, the reference is the base.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune import kernels
from loratune.codes import Code
from loratune.compare.engine import Objective, Scores, run_batch
from loratune.compare.metrics import RowLosses, Values
from loratune.compare.objectives import AnswerScores, Formula, PreferenceMetrics, divergence
from loratune.config import DEFAULT_BETA, RunConfig
from loratune.data import TokenizedDataset
from loratune.data.formats import KINDS, PAIRS
from loratune.data.packing import Items
from loratune.data.rendering.spans import TokenizedRow
from loratune.errors import NumericError, Problem
from loratune.model.upstream import has_8bit_layers
from loratune.system.launcher import Group

_ROUNDING = {False: 0.25, True: 1e-3}
"""Whether the model has more than 16 bits → tolerance in nats for the log-probability of an answer computed in
different batches, per (1 + square root of its tokens). SmolLM2-135M in bfloat16: 0.35 nats more for an answer of about
20 tokens in a prefix tree of eight pairs than in the batch of the reference."""
_ROUNDING_BY_BATCH = 1.0
"""The same tolerance for bitsandbytes' 8-bit layers, which on a GPU round activations depending on the batch. On a CPU,
an answer of about 28 tokens got 3.1 nats more, half of this tolerance; a GPU was not tested."""
MOST_COMPARED = 256
"""The number of training items that are evaluated if there are no validation rows."""
_PARTNERS_TRIED = 64
"""The most rows that are searched for one with another prompt."""


# The objective and the rows of a run


def formula_for(config: RunConfig | None, kind: str) -> Formula:
    """The objective with which preferences are evaluated: the objective of the run; if it is unknown or does not fit
    the rows, DPO or KTO. kind: `PAIRS` or `UNPAIRED`."""
    trained = formula_of(config)
    if trained is not None and KINDS[trained.name] == kind:
        return trained
    name = "dpo" if kind == PAIRS else "kto"
    return Formula(name, trained.beta if trained is not None and trained.has_reference else DEFAULT_BETA[name])


def formula_of(config: RunConfig | None) -> Formula | None:
    """The objective of a run; None if the run is unknown, or was not trained on preferences."""
    if config is None or config.training.objective == "sft":
        return None
    return Formula.of(config.training.objective, config.preferences)


def described(config: RunConfig) -> str:
    """The objective of a run with its parameters and its reference, as text; empty for `sft`."""
    if config.training.objective == "sft":
        return ""
    reference = "the base"
    if config.lora.start_from is not None:
        reference = "the adapter that it started from"
    elif config.lora.init_lora_weights == "loftq":
        reference = "base and adapter before the first step"
    return Formula.of(config.training.objective, config.preferences).compared_with(reference)


class ComparedRows:
    """The rows of a split of preferences, with the fields that their batches need.

    Attributes:
        dataset: The rows.
        reference: (rows,), their log-probabilities under the reference; None if not computed.
        mismatched: (rows,), the same for mismatched answers: each prompt with the answer of another row; None if not
            computed.
    """

    def __init__(self, dataset: TokenizedDataset, max_length: int, seed: int):
        """max_length: the maximum tokens of a row. seed: for drawing mismatched answers."""
        self.dataset, self._max_length = dataset, max_length
        self.reference: Values | None = None
        self.mismatched: Values | None = None
        self._partners = _partners(dataset, seed) if dataset.is_unpaired else None

    def __len__(self) -> int:
        return len(self.dataset.rows)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        row = self.dataset.rows.row(number)
        found: dict[str, Any] = {"input_ids": list(row.ids), "labels": row.labels, "side": row.side}
        if self.reference is not None:
            found["reference"] = float(self.reference[number])
        if self._partners is not None:
            found["mismatched"] = self._mismatched(row, self.dataset.rows.row(int(self._partners[number])))
            if self.mismatched is not None:
                found["mismatched"]["reference"] = float(self.mismatched[number])
        return found

    def _mismatched(self, row: TokenizedRow, partner: TokenizedRow) -> dict[str, Any]:
        """The prompt of a row, truncated from the left if necessary, with the answer of another row."""
        start, answer = partner.spans[0][0], partner.ids[partner.spans[0][0] :]
        prompt = row.ids[: row.spans[0][0]]
        prompt = prompt[max(0, len(prompt) + len(answer) - self._max_length) :]
        spans = tuple((one - start + len(prompt), other - start + len(prompt)) for one, other in partner.spans)
        mixed = TokenizedRow(row.where, prompt + answer, spans)
        return {"input_ids": list(mixed.ids), "labels": mixed.labels}

    def partners_digest(self) -> str:
        """SHA-256 of the assignment of mismatched answers; empty if there are none."""
        return hashlib.sha256(self._partners.tobytes()).hexdigest() if self._partners is not None else ""


def _partners(dataset: TokenizedDataset, seed: int) -> NDArray[np.int64]:
    """(rows,), for each row the number of one with another prompt, if there is one near it in a random order; each row
    is the partner of about one other."""
    count = len(dataset.rows)
    order = np.random.default_rng([seed, 3]).permutation(count)
    prompts = [hash(row.ids[: row.spans[0][0]]) for row in dataset.rows.rows()]
    partners = np.empty(count, np.int64)
    for place, number in enumerate(order.tolist()):
        others = (int(order[(place + step) % count]) for step in range(1, min(count, _PARTNERS_TRIED) + 1))
        nearest = int(order[(place + 1) % count])
        partners[number] = next((other for other in others if prompts[other] != prompts[number]), nearest)
    return partners


# Scores of answers


@dataclass(frozen=True)
class PreferenceScores:
    """The scores of a model on the answers of items, in the order of the items.

    Attributes:
        answers: The scores of the rows.
        sides: (rows,), see `TokenizedRow.side`.
        divergence: KTO's estimate of the KL divergence from the reference.
        mismatched: The scores of mismatched answers; None if the objective has none.
    """

    answers: AnswerScores
    sides: Tensor
    divergence: float
    mismatched: AnswerScores | None = None

    @classmethod
    def of(cls, scores: Scores) -> "PreferenceScores":
        """Create it from plain numbers, see `PreferenceObjective.scores`."""
        numbers = {name: torch.tensor([*values], dtype=torch.float64) for name, values in scores.items()}
        answers = AnswerScores(numbers["answers"], numbers["tokens"], numbers["references"])
        mismatched = None
        if (other := numbers.get("mismatched")) is not None:
            mismatched = AnswerScores(other, torch.ones_like(other), numbers["mismatched_references"])
        return cls(answers, numbers["sides"].long(), divergence(mismatched), mismatched)

    @property
    def log_probabilities(self) -> NDArray[np.float64]:
        """(rows,), followed by the log-probabilities of mismatched answers, if any."""
        parts = [self.answers, self.mismatched] if self.mismatched else [self.answers]
        return np.concatenate([part.log_probabilities.numpy() for part in parts])

    def compared_with(self, reference: "PreferenceScores") -> "PreferenceScores":
        """The same answers, with the scores of another model as the reference."""
        answers, mismatched = replace(self.answers, reference=reference.answers.log_probabilities), self.mismatched
        if mismatched and reference.mismatched:
            mismatched = replace(mismatched, reference=reference.mismatched.log_probabilities)
        return PreferenceScores(answers, self.sides, divergence(mismatched), mismatched)


class PreferenceObjective(Objective):
    """An objective on preferences.

    Attributes:
        formula: The formula of its loss.
        unit: `pair` or `answer`.
        last: The scores of the last pass; None before the first.
    """

    def __init__(self, formula: Formula, splits: Mapping[str, ComparedRows]):
        """splits: split → rows."""
        self.formula, self.splits = formula, splits
        self.unit = "answer" if formula.name == "kto" else "pair"
        self.last: PreferenceScores | None = None
        self._step: PreferenceScores | None = None
        self._given: dict[str, Any] = {}
        self._divergence = 0.0

    # Methods of `Objective`

    def items(self, dataset: TokenizedDataset) -> tuple[Items, int]:
        """See `Objective`."""
        return next(rows for rows in self.splits.values() if rows.dataset is dataset), dataset.rows_per_example

    def begin_step(self, model: Any, batches: Sequence[dict[str, Any]], count: Any, group: Group) -> Any:
        """See `Objective`; estimates KTO's divergence over the whole step."""
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
        return torch.tensor(rows / rows_per_example)

    def set_loss_targets(self, model: Any, batch: dict[str, Any], *, by_row: bool = True) -> None:
        """See `Objective`; losses are always per row."""
        names = ("lengths", "sides", "references", "mismatched")
        self._given = {name: batch.pop(name, None) for name in names}
        kernels.set_loss_targets(model, batch["labels"], batch.pop("places", None), self._given["lengths"])

    def total(self, model: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        answers = self._answers(kernels.row_sums(model, logits, labels, self._given["lengths"]), labels)
        losses = self.formula.item_losses(answers, self._given["sides"], self._divergence)
        is_there = answers.tokens.view(len(losses), -1)[:, 0] > 0
        held = replace(answers, log_probabilities=answers.log_probabilities.detach())
        self._step = PreferenceScores(held, self._given["sides"], self._divergence)
        return (losses * is_there).sum().float(), is_there.sum()

    def scores(self, model: Any, batch: Mapping[str, Any]) -> dict[str, list[float]]:
        """See `Objective`: log-probabilities, tokens and sides of answers, and log-probabilities of mismatched ones."""
        labels, _, sums = run_batch(self, model, batch)
        answers, sides, mismatched = self._answers(sums, labels), self._given["sides"], self._given["mismatched"]
        found = {"answers": answers.log_probabilities, "tokens": answers.tokens, "references": answers.reference}
        if mismatched is not None:
            other = self._mismatched_answers(model, mismatched)
            found |= {"mismatched": other.log_probabilities, "mismatched_references": other.reference}
        return {name: values.tolist() for name, values in (found | {"sides": sides}).items()}

    def row_losses(self, scores: Scores) -> RowLosses:
        """See `Objective`."""
        self.last = PreferenceScores.of(scores)
        losses = self.item_losses(self.last)
        return RowLosses.of(losses, [1] * len(losses))

    def item_losses(self, scored: PreferenceScores) -> list[float]:
        """(items,), the losses."""
        losses: list[float] = self.formula.item_losses(scored.answers, scored.sides, scored.divergence).tolist()
        return losses

    def copies(self, dataset: TokenizedDataset) -> dict[int, float]:
        """See `Objective`; copies are computed too, as their mismatched answers differ."""
        return dict.fromkeys(range(dataset.items), 1.0)

    def metrics(self, split: str, scored: PreferenceScores) -> PreferenceMetrics:
        """The metrics of scored answers. split: the name of the rows."""
        return PreferenceMetrics.of(split, self.formula, scored.answers, scored.sides, scored.divergence)

    def logged(self, *, of_step: bool = False) -> dict[str, float]:
        """See `Objective`."""
        scored = self._step if of_step else self.last
        return {} if scored is None else self.metrics("", scored).logged()

    def check_start(self, model: Any, first: Callable[[], dict[str, Any]]) -> None:
        """See `Objective`: rewards must start at 0, otherwise the reference is wrong.

        With an 8-bit base on a GPU more is tolerated, as the rounding of bitsandbytes depends on the batch.
        """
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
        loss = float(self.formula.item_losses(answers, sides, 0.0).mean())
        expected = self.formula.first_loss()
        what = f"before the first step, the model gives an answer a log-probability {float(difference.max()):.3g} nats "
        what += f"from that of the reference, which is to be the same; the first {self.formula.name} loss is {loss:.6f}"
        what += f" instead of {expected:.6f}" if expected is not None else ""
        fix = "the reference or the model is not what it is taken for: run again with another HF_DATASETS_CACHE"
        raise NumericError(Problem(Code.LORA_START, what, key="training.objective", fix=fix))

    def _mismatched_answers(self, model: Any, batch: Mapping[str, Any]) -> AnswerScores:
        labels, _, sums = run_batch(self, model, batch)
        return self._answers(sums, labels)

    def _answers(self, sums: Tensor, labels: Tensor) -> AnswerScores:
        """What a model gives to the rows of the batch that was expected last. sums: the loss of each."""
        lengths, reference, sides = (self._given[name] for name in ("lengths", "references", "sides"))
        own = slice(None if sides is None else len(sides))  # without the texts of `retention`, which come last
        sums, tokens = sums[own], kernels.row_counts(labels, lengths)[own]
        known = torch.zeros_like(sums) if reference is None else reference.to(sums.device)
        return AnswerScores(-sums, tokens, known)


# The reference


def set_reference(rows: ComparedRows, values: NDArray[np.float64]) -> None:
    """Set the log-probabilities of rows under the reference, see `PreferenceScores.log_probabilities`.

    Raises:
        NumericError: A log-probability is not finite.
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
    """A line on the fraction of pairs that the reference ranks correctly."""
    assert rows.reference is not None
    share = float((rows.reference[::2] > rows.reference[1::2]).mean())
    line = f"the chosen answer is the more likely one in {share:.0%} of the training pairs before training"
    return f"{line}: more than half are in order already" if share > 0.5 else line
