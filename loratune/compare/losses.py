"""The losses of a model on rows, and how two models differ on the same rows, compared in pairs.

Every distinct row counts as one row of the sample, with the weight of its copies: copies add no information. So shares
have the interval of Kish's effective number of rows, see `statistics.effective_rows`. Without copies that is the number
of rows.
"""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.statistics import Interval, finite, loss_interval, mean_ratio

Values = NDArray[np.float64]
Sample = tuple[Values, Values]
"""Totals and counts over rows, whose ratio of sums is a mean."""
Verdict = Literal["better", "worse", "indistinguishable"]

SIGNIFICANT = 0.05
"""The p of McNemar's test below which two shares differ."""
_MOST_BYTES = 1 << 22
"""Bytes of packed row losses, once unpacked, at most."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """The losses of one model on some rows, or on preference pairs or answers; arrays (rows,).

    Attributes:
        nats: Of each row, summed over its supervised tokens; of preferences, the loss of the objective.
        tokens: Its supervised tokens; 1 for preferences.
        copies: How often the row occurs: a copy has the loss of the first of its kind, and counts as often.
    """

    nats: Values
    tokens: Values
    copies: Values

    @classmethod
    def of(cls, nats: Sequence[float], tokens: Sequence[float], copies: Sequence[int] | None = None) -> Self:
        """From plain numbers. copies: one of each row, if not given."""
        times = np.ones(len(nats)) if copies is None else np.asarray(copies, np.float64)
        return cls(np.asarray(nats, np.float64), np.asarray(tokens, np.float64), times)

    def __len__(self) -> int:
        return len(self.nats)

    @property
    def totals(self) -> Values:
        """(rows,), nats with those of the copies."""
        return self.copies * self.nats

    @property
    def counts(self) -> Values:
        """(rows,), tokens with those of the copies."""
        return self.copies * self.tokens

    @property
    def loss(self) -> float:
        """The mean over all tokens, pairs or answers. It does not depend on the order of the rows."""
        return mean_ratio(self.totals, self.counts)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the loss; None for too few rows."""
        return loss_interval(self.totals, self.counts)

    def take(self, order: Sequence[int]) -> "RowLosses":
        """Some of the rows, in this order."""
        return RowLosses(self.nats[order], self.tokens[order], self.copies[order])

    def packed(self) -> str:
        """As text of about five bytes a row, with eight digits of each loss."""
        raw = np.stack([self.nats, self.tokens, self.copies]).astype(np.float32).tobytes()
        return base64.b85encode(zlib.compress(raw)).decode()

    @classmethod
    def unpacked(cls, text: str) -> "RowLosses":
        """What `packed` made. Raises ValueError: it did not make this."""
        try:
            raw = zlib.decompressobj().decompress(base64.b85decode(text), _MOST_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        made = cls(*np.frombuffer(raw, dtype=np.float32).reshape(3, -1).astype(np.float64))
        if not (len(made.nats) and made.is_finite and (made.tokens > 0).all() and (made.copies > 0).all()):
            raise ValueError("these are not losses of rows")
        return made

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite, also as `packed` writes them."""
        with np.errstate(over="ignore"):
            return all(np.isfinite(one.astype(np.float32)).all() for one in (self.nats, self.tokens, self.copies))

    def has_rows_of(self, other: "RowLosses") -> bool:
        """Whether the rows are those of other losses, as far as their tokens and copies tell."""
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(self.copies, other.copies)


@dataclass(frozen=True)
class Difference:
    """The paired difference of a metric on the same rows: adapter minus the model it is compared with.

    For a difference between shares of rows, the verdict needs both: McNemar's p below 0.05, and an interval without 0.

    Attributes:
        value: The difference.
        interval: Its paired 95 % interval; None where there are too few rows.
        p: The exact p of McNemar's test over distinct rows, for metrics that are shares of rows; None for others.
        verdict: What it means for the adapter; None where there is no interval, or where neither more nor less of the
            metric is better.
        rows_needed: About how many distinct rows would tell the two apart, where these do not; None if not known, as
            where the difference is 0.
    """

    value: float
    interval: Interval | None
    p: float | None = None
    verdict: Verdict | None = None
    rows_needed: int | None = None

    @property
    def is_distinguishable(self) -> bool:
        """Whether it is more than chance. That of a metric of a task may have a p without a verdict."""
        return self.verdict != "indistinguishable" and (self.p or 0.0) < SIGNIFICANT

    def as_json(self) -> dict[str, Any]:
        """Plain values, `low` and `high` among them, and `rows_needed` where rows do not tell the two apart."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        values: dict[str, Any] = {"value": finite(self.value), "low": low, "high": high}
        values |= {"p": self.p} if self.p is not None else {}
        return values | ({"rows_needed": self.rows_needed} if self.verdict == "indistinguishable" else {})


def compare(base: RowLosses, adapter: RowLosses) -> Difference:
    """The paired difference of losses on the same rows: adapter minus its base, or another model."""
    return mean_difference([(adapter.totals - base.totals, adapter.counts)], lower_is_better=True)


def mean_difference(samples: Sequence[Sample], *, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows, or, of several groups of rows, a sum of such ratios.

    samples: of each group, a metric of each row less that of what it is compared with, (rows,); and counts above 0.
    """
    of_one = len(samples) == 1
    interval = statistics.mean_ratio_interval(*samples[0]) if of_one else statistics.sum_of_ratios_interval(samples)
    return judged(sum(mean_ratio(*sample) for sample in samples), interval, samples, lower_is_better)


def score_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """The difference of two means of scores between 0 and 1: second minus first. first, second: (rows,), the score of
    each row. weights: (rows,), the copies of each."""
    sample = weights * (second - first), weights
    interval = statistics.bounded_difference_interval(second - first, weights)
    return judged(mean_ratio(*sample), interval, [sample], lower_is_better)


def share_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """The difference of two shares of rows: second minus first. first, second: (rows,), 0 or 1. weights: (rows,), the
    copies of each."""
    rows = statistics.effective_rows(weights)
    shares = [float(weights[one > other].sum() / weights.sum()) for one, other in ((first, second), (second, first))]
    first_only, second_only = (share * rows for share in shares)
    interval = statistics.share_difference_interval(first_only, second_only, rows)
    lost, won = int((first > second).sum()), int((second > first).sum())
    p, value = statistics.mcnemar(lost, won), shares[1] - shares[0]
    agree = (won - lost) * value > 0  # with copies, more rows may be lost and yet fewer distinct ones, which p is about
    verdict = _verdict(value, interval, lower_is_better) if p < SIGNIFICANT and agree else "indistinguishable"
    needed = None
    if verdict == "indistinguishable":
        needed = _rows_needed(value, statistics.share_difference_error(first_only, second_only, rows), round(rows))
    return Difference(value, interval, p, verdict, needed)


def judged(value: float, interval: Interval | None, samples: Sequence[Sample], lower_is_better: bool) -> Difference:
    """A difference with its verdict. samples: totals and counts over rows, whose ratios vary as it does."""
    verdict = _verdict(value, interval, lower_is_better)
    needed = None
    if verdict == "indistinguishable":
        error = math.hypot(*(statistics.mean_ratio_error(*sample) for sample in samples))
        needed = _rows_needed(value, error, sum(len(totals) for totals, _ in samples))
    return Difference(value, interval, None, verdict, needed)


def _verdict(value: float, interval: Interval | None, lower_is_better: bool) -> Verdict | None:
    if interval is None:
        return None
    if interval.low <= 0 <= interval.high:
        return "indistinguishable"
    return "better" if (value < 0) == lower_is_better else "worse"


def _rows_needed(value: float, error: float, rows: int) -> int | None:
    """About how many rows a significant difference would need; more than there are."""
    needed = statistics.rows_needed(value, error, rows)
    return needed and max(needed, rows + 1)


def exp(value: float) -> float:
    """e to the power of it; inf where that is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))
