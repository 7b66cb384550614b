"""Evaluates a new adapter at the end of training: the gain over the base on held-out rows, the change of the loss on
other text, and the loss on test rows.

All losses come from `engine`, as in `evaluate`: nats per supervised token over all supervised tokens, or the
objective's loss per preference pair or answer. The sampling unit is the row, because the tokens of a row depend on each
other. Copies of a row add no information: they are computed once, weighted by their number, and count as one row.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from loratune.codes import Code
from loratune.compare.base_results import BaseResults
from loratune.compare.engine import SFT, Engine, Objective
from loratune.compare.metrics import RowLosses, compare
from loratune.data import TokenizedDataset
from loratune.errors import NumericError, Problem
from loratune.events import note
from loratune.statistics import LEAST_ROWS, Interval, finite, mean_ratio_interval
from loratune.text import plural

Model = Literal["base", "start"]

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

_OTHERS = {"base": "the base", "start": "the adapter that it started from"}


@dataclass(frozen=True)
class Gain:
    """Losses of base and adapter on the same rows, in nats per supervised token.

    Attributes:
        split: The split of the rows, `validation` or `training`.
        rows: The number of distinct rows compared.
        drawn: The number of rows compared, including copies.
        total: Rows of the split.
        base: Loss of the base.
        adapter: Loss of the adapter.
        better_by: Loss of the base minus loss of the adapter: above 0 if the adapter is better.
        low: Lower end of the 95 % interval of `better_by`; None for too few rows.
        high: Upper end of that interval.
        validation_rows: Distinct validation rows, if they were too few, so that training rows were compared.
        adapter_low: Lower end of the 95 % interval of `adapter`; None for too few rows.
        adapter_high: Upper end of that interval.
        unit: The unit over which losses are averaged: `token`, `pair` or `answer`.
        other: The model that the adapter is compared with: its `base`; or its `start`, the adapter from which training
            continued, if that is the reference of the objective. The field `base` is then the loss of `start`.
        rows_needed: The estimated number of rows for a significant difference, if it is not.
    """

    split: str
    rows: int
    drawn: int
    total: int
    base: float
    adapter: float
    better_by: float
    low: float | None
    high: float | None
    validation_rows: int | None = None
    adapter_low: float | None = None
    adapter_high: float | None = None
    unit: str = "token"
    other: Model = "base"
    rows_needed: int | None = None

    @classmethod
    def of(
        cls, base: RowLosses, adapter: RowLosses, split: str, *, total: int | None = None,
        validation_rows: int | None = None, unit: str = "token", other: Model = "base",
    ) -> "Gain":  # fmt: skip
        """Create it from the losses of two models on the same distinct rows. total: by default the rows with copies."""
        difference, drawn = compare(base, adapter), round(adapter.copies.sum())
        low, high = finite(difference.interval) or (None, None)
        own_low, own_high = finite(mean_ratio_interval(adapter.totals, adapter.counts)) or (None, None)
        return cls(
            split, len(adapter), drawn, total or drawn, base.loss, adapter.loss, -difference.value,
            None if high is None else -high, None if low is None else -low, validation_rows, own_low, own_high, unit,
            other, difference.rows_needed,
        )  # fmt: skip

    @property
    def verdict(self) -> Literal["gain", "no gain", "worse", "not judged"]:
        """`gain` or `worse` if the interval excludes 0, and the difference is visible."""
        if not math.isfinite(self.adapter):
            return "worse"
        if self.low is None or self.high is None:
            return "not judged"
        visible = abs(self.better_by) >= _VISIBLE
        return "gain" if visible and self.low > 0 else "worse" if visible and self.high < 0 else "no gain"

    def held_out_interval(self, loss: float) -> Interval | None:
        """The 95 % interval of the adapter's loss on all validation rows, whose value is `loss`.

        The interval of the compared rows is scaled by the square root of their fraction of all rows, assuming the same
        variance between rows. None if too few validation rows were compared.
        """
        if self.split != "validation" or self.adapter_low is None or self.adapter_high is None:
            return None
        share = math.sqrt(self.drawn / self.total)
        low, high = loss - share * (self.adapter - self.adapter_low), loss + share * (self.adapter_high - self.adapter)
        return Interval(max(low, 0.0), high)

    def __str__(self) -> str:
        """A line with the verdict and its numbers."""
        losses = f"{self.other} {_nats(self.base)}, adapter {_nats(self.adapter)}"
        if not math.isfinite(self.better_by):
            return f"not judged: not all losses on {self.sampled_rows()} are finite ({losses})"
        if self.validation_rows is not None:
            losses += f"; validation gave {plural(self.validation_rows, f'distinct {item(self.unit)}')}, too few"
        if self.low is None or self.high is None:
            what = f"{self.sampled_rows()} {'is' if self.rows == 1 else 'are'} too few"
            if self.drawn < self.total:
                what = f"a run this short compares only {self.sampled_rows()}"
            return f"not judged: {what}, {LEAST_ROWS} are needed ({losses})"
        nats = f"{_nats(self.better_by)} {per(self.unit)}"
        numbers = f"(95 % interval {_nats(self.low)} to {_nats(self.high)}; {losses})"
        match self.verdict:
            case "gain":
                return f"{nats} on {self.sampled_rows()} {numbers}"
            case "worse":
                return f"worse than {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {numbers}"
        return f"none over {_OTHERS[self.other]} on {self.sampled_rows()}: {nats} {numbers}"

    def sampled_rows(self) -> str:
        """`12 validation rows`, `64 of 500 validation pairs`, `3 distinct of 9 validation rows`."""
        what = f"{self.split} {item(self.unit)}"
        if self.rows == self.total:
            return plural(self.rows, what)
        distinct = " distinct" if self.drawn > self.rows else ""
        return f"{self.rows:,}{distinct} of {plural(self.total, what)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Numbers that are not finite are null."""
        return dict(finite(asdict(self)))


@dataclass(frozen=True)
class Forgetting:
    """How training changed the loss on other rows: unrelated text, or rows of an earlier run.

    Attributes:
        comparison: The model before its first step, as `base`, and the trained one, on the same rows; None if the rows
            are unavailable.
        rows: A description of the rows.
        unknown: Why the rows are unavailable.
        before: The name of the model before its first step.
        kinds: Kind of passages → the comparison on them alone, for unrelated text.
    """

    comparison: Gain | None
    rows: str = ""
    unknown: str = ""
    before: str = "loss"
    kinds: Mapping[str, Gain] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line with the loss before and after."""
        if (measured := self.comparison) is None:
            return f"not measured: {self.unknown}"
        change = -measured.better_by
        interval = ""
        if measured.low is not None and measured.high is not None:
            interval = f", 95 % interval {-measured.high:+.4f} to {-measured.low:+.4f}"
        kinds = "; " + ", ".join(f"{kind} {-own.better_by:+.3f}" for kind, own in self.kinds.items())
        return (
            f"{self.before} {measured.base:.4f} → {measured.adapter:.4f} on {self.rows} ({change:+.4f}{interval}"
            f"{kinds if self.kinds else ''})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: losses in nats per supervised token, and their `change`, above 0 if the loss has increased.

        Losses that are not finite are null.
        """
        if (measured := self.comparison) is None:
            return {"not_measured": self.unknown}
        low, high = measured.low, measured.high
        return {
            **{name: getattr(measured, name) for name in ("split", "rows", "drawn", "total")},
            **finite({"before": measured.base, "after": measured.adapter, "change": -measured.better_by}),
            "low": None if high is None else -high,
            "high": None if low is None else -low,
            **({"kinds": finite({kind: -own.better_by for kind, own in self.kinds.items()})} if self.kinds else {}),
        }

    @property
    def remark(self) -> str:
        """A line on a large and significant increase of the loss on unrelated text; else empty."""
        measured = self.comparison
        if measured is None:
            return ""
        if math.isfinite(measured.better_by) and (measured.high is None or -measured.high < _WORTH_TELLING):
            return ""
        change = f"by {-measured.better_by:.2f} nats per token" if math.isfinite(measured.adapter) else "beyond measure"
        return (
            f"what the base could do elsewhere has suffered, {change} on unrelated text; where that matters, set or "
            "raise retention.kl_weight, or lower training.learning_rate"
        )


@dataclass(frozen=True)
class FinalScore:
    """The loss of the adapter on the test rows, computed once, after the last step.

    Attributes:
        losses: The losses of the distinct rows.
        tokens: Supervised tokens, pairs or answers.
        unit: The unit over which the loss is averaged, see `Objective`.
    """

    losses: RowLosses
    tokens: int
    unit: str = "token"

    def __str__(self) -> str:
        """`0.1043 on 200 test rows (95 % interval 0.0911 to 0.1202)`."""
        found, rows = self.losses, round(self.losses.copies.sum())
        copies = f", {len(found):,} distinct" if len(found) < rows else ""
        loss = f"{found.loss:.4f}" if self.unit == "token" else f"{found.loss:.4f} {per(self.unit)}"
        what = f"{loss} on {plural(rows, f'test {item(self.unit)}')}{copies}"
        if (interval := found.interval) is None:
            return f"{what} (no interval: {LEAST_ROWS} distinct {item(self.unit)}s are needed)"
        return f"{what} (95 % interval {interval.low:.4f} to {interval.high:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `distinct` counts rows without copies."""
        found, interval = self.losses, self.losses.interval
        return {
            "loss": found.loss, "tokens": self.tokens, "rows": round(found.copies.sum()),
            "distinct": len(found), "interval": finite(interval),
        }  # fmt: skip


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


def measure(
    engine: Engine,
    objective: Objective,
    other: AbstractContextManager[None],
    rows: RowSample,
    compared_with: Model = "base",
) -> Gain:
    """Compare a trained adapter with its base, or another model.

    Args:
        engine: Computes the losses of the trained adapter.
        objective: Defines the loss.
        other: A context in which the model computes as the one to compare with, see `tensors.as_initialized`.
        rows: The rows, see `sample`.
        compared_with: See `Gain.other`.
    """
    distinct = "" if rows.rows == sum(rows.copies.values()) else "distinct "
    what = plural(rows.rows, f"{distinct}{rows.split} {item(objective.unit)}")
    note(f"comparing the adapter with {'its base' if compared_with == 'base' else 'the one it started from'} on {what}")
    adapter = engine.losses(rows.dataset, rows.copies, objective)
    with other:
        base = engine.losses(rows.dataset, rows.copies, objective)
    return Gain.of(
        base, adapter, rows.split, total=rows.total, validation_rows=rows.validation_rows, unit=objective.unit,
        other=compared_with,
    )  # fmt: skip


def forgetting(base: BaseResults, text: TokenizedDataset, kinds: Mapping[str, Sequence[int]]) -> Forgetting:
    """Compare a trained adapter with its base on unrelated text.

    Args:
        base: The results of the base.
        text: The passages.
        kinds: Kind of passages → numbers of their rows, in any order.
    """
    numbers = dict.fromkeys(range(text.items), 1)
    before, after = base.losses(text, numbers), base.engine.losses(text, numbers)

    def compared(kept: Sequence[int]) -> Gain:
        return Gain.of(before.take(kept), after.take(kept), "unrelated", total=len(kept))

    what = f"{plural(text.items, 'passage')} of general text, {max(text.rows.lengths)} tokens at most"
    by_kind = {kind: compared(kept) for kind, kept in kinds.items() if max(kept) < text.items}
    return Forgetting(compared(range(text.items)), what, before="base", kinds=by_kind)


def final_score(engine: Engine, objective: Objective, test: TokenizedDataset) -> FinalScore:
    """The loss of an adapter on all test rows. Raises NumericError: it is NaN or inf."""
    losses = engine.losses(test, SFT.copies(test), objective)
    if not math.isfinite(losses.loss):
        what, fix = f"the loss on the test rows is {losses.loss}", "lower training.learning_rate"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key="data.test", fix=fix))
    weights = test.rows.weights
    tokens = losses.counts.sum() if weights is None else test.rows.supervised[weights > 0].sum()
    return FinalScore(losses, int(tokens), objective.unit)


def sample(
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
        copies = rows.weighted(_sample(rows, budget, drawable, least=least))
        total = rows.count_rows(rows.weighted(dict.fromkeys(drawable, 1)))
        found[name] = RowSample(name, rows, copies, total)
    chosen = next((one for one in found.values() if one.rows >= LEAST_ROWS), [*found.values()][-1])
    if "validation" in found and chosen.split != "validation":
        chosen = replace(chosen, validation_rows=found["validation"].rows)
    return chosen


def _sample(split: TokenizedDataset, budget: int, among: Sequence[int], *, least: int = LEAST_TOKENS) -> dict[int, int]:
    """Draw the rows to compare. Their tokens are limited by those of training, or by `least`, so that the comparison
    after a short run is short.

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
