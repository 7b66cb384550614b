"""The losses of an adapter and of another model on the same rows: after training on validation or training rows, on
unrelated text, on rows of an earlier run, and on test rows; and in `evaluate`.

All losses come from `engine`: nats per supervised token over all supervised tokens, or the objective's loss per
preference pair or answer. The sampling unit is the row, because the tokens of a row depend on each other. Copies of a
row add no information: they are computed once, weighted by their number, and count as one row.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from loratune import outputs
from loratune.codes import Code
from loratune.compare.base_results import BaseResults
from loratune.compare.engine import SFT, Engine, Objective
from loratune.compare.metrics import Difference, RowLosses, loss_difference
from loratune.data import TokenizedDataset
from loratune.errors import NumericError, Problem
from loratune.events import note
from loratune.statistics import LEAST_ROWS, Interval, finite, mean_ratio_interval
from loratune.text import plural

Model = Literal["base", "start"]
GainVerdict = Literal["gain", "no gain", "worse", "not judged"]

_MOST_ROWS, _MOST_DRAWN = 64, 4096
"""The most distinct rows that are compared, and the most rows that are drawn to find them."""
_WANTED_ROWS = 8
"""Distinct rows that are compared even beyond `_SHARE`, as long as they have fewer tokens than training has read."""
_SHARE = 10
"""The sample has at most 1/`_SHARE` of the tokens trained on, within the bounds below. Scoring with base and adapter
costs two thirds of training on the same tokens, so the comparison takes at most some 7 % of the time of a long run."""
LEAST_TOKENS, _MOST_TOKENS = 2048, 32_768
"""Bounds of the sample's tokens. Below the lower one the comparison with a small model takes little time anyway."""
_VISIBLE = 5e-4
"""Nats below which a difference counts as zero, as the decimals of the report do not show it."""
_WORTH_TELLING = 0.1
"""Nats per token from which on a higher loss on unrelated text is reported: a 10 % higher perplexity."""

_NOT_PAIRED = Difference(math.nan, None)
_OTHERS = {"base": "the base", "start": "the adapter that it started from"}


@dataclass(frozen=True)
class LossComparison:
    """The losses of an adapter and of its base, or of another model, on the same rows.

    Attributes:
        split: The split of the rows: `validation`, `training` or `test`; `held-out` for the rows of `evaluate`, and
            `unrelated` for text that no training row is about.
        rows: The number of distinct rows compared.
        drawn: The number of rows compared, including copies.
        total: The number of rows of the split, including copies.
        tokens: The number of supervised tokens, pairs or answers of the rows.
        unit: The unit over which losses are averaged: `token`, `pair` or `answer`.
        adapter: The loss of the adapter, per `unit`; in nats, for tokens.
        interval: The 95 % interval of `adapter`; None for too few rows.
        base: The loss of the other model; NaN on test rows, which only the adapter is scored on.
        difference: The paired difference, the loss of the adapter minus the loss of the other model.
        other: The other model: the `base`; or the `start`, the adapter from which training continued.
        kinds: Kind of unrelated text → the difference on the passages of this kind alone.
        validation_rows: The number of distinct validation rows, if they were too few, so that training rows were
            compared.
        description: The rows in words, if they are more than rows of `split`.
    """

    split: str
    rows: int
    drawn: int
    total: int
    tokens: int
    unit: str
    adapter: float
    interval: Interval | None
    base: float = math.nan
    difference: Difference = _NOT_PAIRED
    other: Model = "base"
    kinds: Mapping[str, Difference] = field(default_factory=dict)
    validation_rows: int | None = None
    description: str = ""

    @classmethod
    def of(
        cls, base: RowLosses | None, adapter: RowLosses, split: str, *, total: int | None = None, unit: str = "token",
        kinds: Mapping[str, Sequence[int]] | None = None,
    ) -> "LossComparison":  # fmt: skip
        """Create it from the losses of each distinct row.

        Args:
            base: The losses of the other model, if there is one.
            adapter: The losses of the adapter on the same rows.
            split: See `LossComparison`.
            total: The number of rows of the split; by default the rows of the losses, with copies.
            unit: See `LossComparison`.
            kinds: Kind of unrelated text → places of its rows among the losses.
        """
        drawn = round(adapter.copies.sum())
        found = cls(
            split=split, rows=len(adapter), drawn=drawn, total=total or drawn, tokens=int(adapter.counts.sum()),
            unit=unit, adapter=adapter.loss, interval=mean_ratio_interval(adapter.totals, adapter.counts),
        )  # fmt: skip
        if base is None:
            return found
        by_kind = {
            kind: loss_difference(base.take(places), adapter.take(places)) for kind, places in (kinds or {}).items()
        }
        return replace(found, base=base.loss, difference=loss_difference(base, adapter), kinds=by_kind)

    @property
    def better_by(self) -> float:
        """The loss of the other model minus the loss of the adapter: above 0 if the adapter is better."""
        return -self.difference.value

    @property
    def gain_interval(self) -> Interval | None:
        """The 95 % interval of `better_by`; None for too few rows."""
        interval = self.difference.interval
        return interval and Interval(-interval.high, -interval.low)

    @property
    def loss_interval(self) -> Interval | None:
        """The 95 % interval of `adapter`, whose lower end is at least 0; None for too few rows."""
        return self.interval and Interval(max(0.0, self.interval.low), self.interval.high)

    @property
    def is_higher(self) -> bool:
        """Whether the loss of the adapter is significantly higher than the loss of the other model."""
        return self.gain_interval is not None and self.gain_interval.high < 0

    @property
    def verdict(self) -> GainVerdict:
        """`gain` or `worse` if the interval excludes 0, and the difference is visible."""
        return gain_verdict(self.adapter, self.better_by, self.gain_interval)

    def held_out_interval(self, loss: float) -> Interval | None:
        """The 95 % interval of the adapter's loss on all validation rows, whose value is `loss`.

        The interval of the compared rows is scaled by the square root of their fraction of all rows, assuming the same
        variance between rows. None if too few validation rows were compared.
        """
        if self.split != "validation" or self.interval is None:
            return None
        share = math.sqrt(self.drawn / self.total)
        low = loss - share * (self.adapter - self.interval.low)
        return Interval(max(low, 0.0), loss + share * (self.interval.high - self.adapter))

    def sampled_rows(self) -> str:
        """`12 validation rows`, `64 of 500 validation pairs`, `3 distinct of 9 validation rows`."""
        what = f"{self.split} {item(self.unit)}"
        if self.rows == self.total:
            return plural(self.rows, what)
        distinct = " distinct" if self.drawn > self.rows else ""
        return f"{self.rows:,}{distinct} of {plural(self.total, what)}"

    @property
    def gain_line(self) -> str:
        """A line with the verdict, and how much better than the other model the adapter is."""
        losses = f"{self.other} {_nats(self.base)}, adapter {_nats(self.adapter)}"
        if not math.isfinite(self.better_by):
            return f"not judged: not all losses on {self.sampled_rows()} are finite ({losses})"
        if self.validation_rows is not None:
            losses += f"; validation gave {plural(self.validation_rows, f'distinct {item(self.unit)}')}, too few"
        if (interval := self.gain_interval) is None:
            what = f"{self.sampled_rows()} {'is' if self.rows == 1 else 'are'} too few"
            if self.drawn < self.total:
                what = f"a run this short compares only {self.sampled_rows()}"
            return f"not judged: {what}, {LEAST_ROWS} are needed ({losses})"
        nats = f"{_nats(self.better_by)} {per(self.unit)}"
        numbers = f"(95 % interval {_nats(interval.low)} to {_nats(interval.high)}; {losses})"
        match self.verdict:
            case "gain":
                return f"{nats} on {self.sampled_rows()} {numbers}"
            case "worse":
                return f"worse than {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {numbers}"
        return f"none over {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {numbers}"

    @property
    def change_line(self) -> str:
        """A line with the loss of both models, on rows that the adapter was not trained for."""
        interval, kinds = "", ""
        if (ends := self.difference.interval) is not None:
            interval = f", 95 % interval {ends.low:+.4f} to {ends.high:+.4f}"
        if self.kinds:
            kinds = "; " + ", ".join(f"{kind} {own.value:+.3f}" for kind, own in self.kinds.items())
        return (
            f"{'base' if self.other == 'base' else 'loss'} {self.base:.4f} → {self.adapter:.4f} on "
            f"{self.description or self.sampled_rows()} ({self.difference.value:+.4f}{interval}{kinds})"
        )

    @property
    def loss_line(self) -> str:
        """The loss of the adapter: `0.1043 on 200 test rows (95 % interval 0.0911 to 0.1202)`."""
        copies = f", {self.rows:,} distinct" if self.rows < self.drawn else ""
        loss = f"{self.adapter:.4f}" if self.unit == "token" else f"{self.adapter:.4f} {per(self.unit)}"
        what = f"{loss} on {plural(self.drawn, f'{self.split} {item(self.unit)}')}{copies}"
        if (interval := self.loss_interval) is None:
            return f"{what} (no interval: {LEAST_ROWS} distinct {item(self.unit)}s are needed)"
        return f"{what} (95 % interval {interval.low:.4f} to {interval.high:.4f})"

    @property
    def has_suffered(self) -> bool:
        """Whether the loss on unrelated text has become much worse for sure."""
        value, interval = self.difference.value, self.difference.interval
        return not math.isfinite(value) or (interval is not None and interval.low >= _WORTH_TELLING)

    def to_dict(self) -> outputs.Gain:
        """Plain values, as `gain` in `loratune.json`. Numbers that are not finite are null."""
        low, high = finite(self.gain_interval) or (None, None)
        adapter_low, adapter_high = finite(self.interval) or (None, None)
        return {
            "split": self.split, "rows": self.rows, "drawn": self.drawn, "total": self.total, "base": finite(self.base),
            "adapter": finite(self.adapter), "better_by": finite(self.better_by), "low": low, "high": high,
            "validation_rows": self.validation_rows, "adapter_low": adapter_low, "adapter_high": adapter_high,
            "unit": self.unit, "other": self.other, "rows_needed": self.difference.rows_needed,
        }  # fmt: skip


def gain_verdict(adapter: float, better_by: float, interval: Interval | None) -> GainVerdict:
    """`gain` or `worse` if the interval excludes 0, and the difference is visible. adapter: its loss. The others: see
    `LossComparison.better_by`."""
    if not math.isfinite(adapter):
        return "worse"
    if interval is None:
        return "not judged"
    visible = abs(better_by) >= _VISIBLE
    return "gain" if visible and interval.low > 0 else "worse" if visible and interval.high < 0 else "no gain"


def per(unit: str) -> str:
    """The unit of a loss as text: `nats per token`, or `per pair` or `per answer` for preferences."""
    return "nats per token" if unit == "token" else f"per {unit}"


def item(unit: str) -> str:
    """The word for a row, by the unit of the loss: `row`, or `pair` or `answer` for preferences."""
    return "row" if unit == "token" else unit


def _nats(value: float) -> str:
    """The value with three decimals, without negative zero."""
    return f"{value:.3f}" if not abs(value) < _VISIBLE else "0.000"


@dataclass(frozen=True)
class RowSample:
    """The rows on which an adapter is compared with another model.

    Attributes:
        split: The name of their split.
        dataset: The rows of that split.
        copies: Number of a distinct row → how often it counts, see `TokenizedDataset.weighted`.
        total: How many rows, with copies, could have been drawn.
        validation_rows: The number of distinct validation rows, if these are too few.
    """

    split: str
    dataset: TokenizedDataset
    copies: Mapping[int, float]
    total: int
    validation_rows: int | None = None

    @property
    def rows(self) -> int:
        """The number of distinct rows."""
        return self.dataset.count_rows(self.copies)

    @property
    def tokens(self) -> int:
        """The tokens of the rows, supervised or not."""
        return sum(len(row.ids) for number in self.copies for row in self.dataset.item(number))


def compare_losses(
    engine: Engine,
    objective: Objective,
    other: AbstractContextManager[None],
    sample: RowSample,
    compared_with: Model = "base",
) -> LossComparison:
    """Compare the losses of a trained adapter and its base, or another model, on the same rows.

    Args:
        engine: Computes the losses of the trained adapter.
        objective: Defines the loss.
        other: A context in which the model computes as the one to compare with, see `tensors.as_initialized`.
        sample: The rows, see `sample_rows`.
        compared_with: See `LossComparison.other`.
    """
    distinct = "" if sample.rows == sum(sample.copies.values()) else "distinct "
    what = plural(sample.rows, f"{distinct}{sample.split} {item(objective.unit)}")
    note(f"comparing the adapter with {'its base' if compared_with == 'base' else 'the one it started from'} on {what}")
    adapter = engine.losses(sample.dataset, sample.copies, objective)
    with other:
        base = engine.losses(sample.dataset, sample.copies, objective)
    found = LossComparison.of(base, adapter, sample.split, total=sample.total, unit=objective.unit)
    return replace(found, other=compared_with, validation_rows=sample.validation_rows)


def compare_on_unrelated_text(
    base: BaseResults, text: TokenizedDataset, kinds: Mapping[str, Sequence[int]]
) -> LossComparison:
    """Compare the losses of a trained adapter and its base on unrelated text.

    Args:
        base: The results of the base.
        text: The passages.
        kinds: Kind of passages → numbers of their rows, in any order.
    """
    numbers = dict.fromkeys(range(text.items), 1)
    before, after = base.losses(text, numbers), base.engine.losses(text, numbers)
    known = {kind: own for kind, own in kinds.items() if max(own) < text.items}
    what = f"{plural(text.items, 'passage')} of general text, {max(text.rows.lengths)} tokens at most"
    return replace(LossComparison.of(before, after, "unrelated", kinds=known), description=what)


def score_test_rows(engine: Engine, objective: Objective, test: TokenizedDataset) -> LossComparison:
    """The loss of an adapter on all test rows, without another model. Raises NumericError: it is NaN or inf."""
    losses = engine.losses(test, SFT.copies(test), objective)
    if not math.isfinite(losses.loss):
        what, fix = f"the loss on the test rows is {losses.loss}", "lower training.learning_rate"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key="data.test", fix=fix))
    found = LossComparison.of(None, losses, "test", unit=objective.unit)
    if (weights := test.rows.weights) is None:
        return found
    return replace(found, tokens=int(test.rows.supervised[weights > 0].sum()))


def sample_rows(
    splits: Mapping[str, TokenizedDataset], budget: int, *, least: int = LEAST_TOKENS,
    left_out: Collection[int] = frozenset(),
) -> RowSample:  # fmt: skip
    """Choose the rows to compare; the same arguments give the same rows.

    Args:
        splits: Split → rows. The sample is drawn from the first split with enough distinct rows, or else from the last.
        budget: Tokens that a run is trained on.
        least: Tokens that the sample may have even after a short run.
        left_out: Numbers of validation items that are not drawn.
    """
    found: dict[str, RowSample] = {}
    for name, rows in splits.items():
        drawable = [*range(rows.items)]
        if name == "validation" and left_out:
            drawable = [number for number in drawable if number not in left_out]
        copies = rows.weighted(_draw(rows, budget, drawable, least=least))
        total = rows.count_rows(rows.weighted(dict.fromkeys(drawable, 1)))
        found[name] = RowSample(name, rows, copies, total)
    chosen = next((one for one in found.values() if one.rows >= LEAST_ROWS), [*found.values()][-1])
    if "validation" in found and chosen.split != "validation":
        chosen = replace(chosen, validation_rows=found["validation"].rows)
    return chosen


def _draw(split: TokenizedDataset, budget: int, among: Sequence[int], *, least: int = LEAST_TOKENS) -> dict[int, int]:
    """Draw the rows to compare. Their tokens are limited by the tokens of training, or by `least`, so that the
    comparison after a short run is short.

    Returns:
        Number of a distinct row → its copies among the drawn rows, including itself.
    """
    share = min(max(budget // _SHARE, least), _MOST_TOKENS)
    copies: dict[int, int] = {}
    tokens = 0
    drawn = np.random.default_rng(0).choice(among, min(len(among), _MOST_DRAWN), replace=False).tolist()
    for number, first in split.firsts(drawn):
        rows = split.item(number)
        if not all(row.supervised for row in rows):
            continue
        if first not in copies:
            tokens += sum(len(row.ids) for row in rows)
            limit = max(share, budget) if len(copies) < _WANTED_ROWS else share
            if len(copies) == _MOST_ROWS or tokens > limit:
                break
        copies[first] = copies.get(first, 0) + 1
    return dict(sorted(copies.items()))
