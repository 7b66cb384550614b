"""The statistics of comparisons: 95 % intervals of losses, proportions and their differences, and paired tests.

The sampling unit is always the row, as the tokens of one row depend on each other. A loss in nats per supervised token
is therefore a ratio of two sums over rows, of nats and of tokens, and so is the difference between two models' losses
on the same rows. Copies of a row add no information: callers pass them as one row, weighted by their number.

`scripts/interval_coverage.py` measures the coverage of each interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri, stdtrit

Values = Sequence[float] | NDArray[np.float64]
Array = NDArray[np.float64]

LEAST_ROWS = 5
"""The fewest distinct rows for which a mean has an interval. With fewer, the variance is hardly known."""
LEVEL = 0.95
POWER = 0.8
_UPPER = (1 + LEVEL) / 2
_Z = float(ndtri(_UPPER))
_MOST_ROWS = 20_000
"""The most rows for which the bootstrap is used; for more, the distribution of the mean is taken as symmetric."""
_RESAMPLES = 4000
_CHUNK = 200_000
"""Resampled rows in memory at once, in several arrays of 8 bytes per row. More is slower."""
_MOST_NEEDED = 1e15
_ROUNDING = 1e-12
"""The relative spread up to which all rows are considered equal, up to rounding."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    def to_dict(self) -> list[float]:
        """`[low, high]`."""
        return [self.low, self.high]


def widened(interval: Interval, value: float, looks: int) -> Interval:
    """An interval around a value that was chosen as the best of several, by Bonferroni's correction: its reach grows as
    the normal quantile does. looks: of how many."""
    factor = float(ndtri(1 - (1 - _UPPER) / looks)) / _Z
    return Interval(value - factor * (value - interval.low), value + factor * (interval.high - value))


def finite(value: Any) -> Any:
    """A value for JSON, also inside dicts: None for inf and NaN, which JSON cannot represent, and `[low, high]` for an
    interval."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, Interval):
        return [finite(value.low), finite(value.high)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wilson(matches: float, rows: float) -> Interval:
    """The interval of a proportion, by the score test (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, p. 209).

    Args:
        matches: Rows that match; fractional if copies of rows are weighted.
        rows: The number of rows, above 0.
    """
    share = matches / rows
    return _score_interval(share, share * (1 - share), rows)


def _score_interval(mean: float, variance: float, rows: float) -> Interval:
    """Wilson's interval of a mean of values between 0 and 1, with their variance instead of that of a proportion."""
    square = _Z**2 / rows
    middle = (mean + square / 2) / (1 + square)
    half = math.sqrt(square * (variance + square / 4)) / (1 + square)
    low = 0.0 if mean == 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if mean == 1 else min(1.0, middle + half))


def loss_interval(nats: Values, tokens: Values) -> Interval | None:
    """The interval of a loss in nats per token, whose low end is at least 0; see `mean_ratio_interval`.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    interval = mean_ratio_interval(nats, tokens)
    return interval and Interval(max(0.0, interval.low), interval.high)


def bounded_mean_interval(values: Values, weights: Values) -> Interval | None:
    """The interval of a mean of scores between 0 and 1. Each end is the outer one of two intervals:
    `mean_ratio_interval`, and Wilson's interval with the variance of the scores instead of that of a proportion.

    The first has no width if all scores are equal, although five correct answers do not prove that all are correct.
    The second then has the width for as many rows that all match, or all do not. For scores of only 0 and 1 it is
    Wilson's interval itself, and for scores that vary it is hardly wider than Student's.

    Args:
        values: The score of each row.
        weights: The number of copies of each row, which count as one draw.

    Returns:
        The interval; None for fewer than `LEAST_ROWS` rows.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    values, weights = _checked(values, weights)
    mean = min(1.0, mean_ratio(weights * values, weights))
    variance = mean_ratio(weights * (values - mean) ** 2, weights)
    return _wider(values, weights, _score_interval(mean, variance, effective_rows(weights)), 0.0)


def bounded_difference_interval(differences: Values, weights: Values) -> Interval | None:
    """The interval of a mean of differences between scores from 0 to 1. As `bounded_mean_interval`, with the interval
    of Bonett and Price instead of Wilson's; see `share_difference_interval`.

    Args:
        differences: The difference of each row, between -1 and 1.
        weights: The number of copies of each row, which count as one draw.

    Returns:
        The interval; None for fewer than `LEAST_ROWS` rows.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    differences, weights = _checked(differences, weights)
    mean, square = (mean_ratio(weights * one, weights) for one in (differences, differences**2))
    return _wider(differences, weights, _paired_interval(mean, square, effective_rows(weights)), -1.0)


def _wider(values: Array, weights: Array, other: Interval, least: float) -> Interval | None:
    """The outer ends of `mean_ratio_interval` and another interval, clipped to `least` and 1."""
    drawn = mean_ratio_interval(weights * values, weights)
    return drawn and Interval(max(least, min(drawn.low, other.low)), min(1.0, max(drawn.high, other.high)))


def effective_rows(weights: Values) -> float:
    """The effective sample size of weighted rows: the square of the sum of the weights, divided by the sum of their
    squares (L. Kish, Survey Sampling, 1965)."""
    weights = np.asarray(weights, dtype=np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def mean_ratio(totals: Values, counts: Values) -> float:
    """sum(totals) / sum(counts) over rows, independent of the order of the rows; not finite if a total is not finite.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    totals, counts = _checked(totals, counts)
    try:
        return math.fsum(totals) / math.fsum(counts)
    except (OverflowError, ValueError):  # beyond a float; inf and -inf
        with np.errstate(over="ignore", invalid="ignore"):
            return float(totals.sum() / counts.sum())


def mean_ratio_error(totals: Values, counts: Values) -> float:
    """The standard error of sum(totals) / sum(counts) over rows, by the delete-one jackknife; NaN for fewer than two
    rows, or if a total is not finite.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    totals, counts = _checked(totals, counts)
    rows = len(totals)
    if rows < 2 or not np.isfinite(totals).all():
        return math.nan
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return math.sqrt((rows - 1) / rows * ((without - without.mean()) ** 2).sum())


def jackknife_interval(totals: Values, counts: Values) -> Interval | None:
    """The interval of sum(totals) / sum(counts) over rows, by the delete-one jackknife with Student's t (R. G. Miller,
    "The jackknife: a review", Biometrika 61, 1974). If all counts are equal, it is the interval of a t test.

    Returns:
        The interval; None for fewer than `LEAST_ROWS` rows, or if a total is not finite.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    return sum_of_ratios_interval([(totals, counts)])


def mean_ratio_interval(totals: Values, counts: Values, *, seed: int = 0) -> Interval | None:
    """The interval of sum(totals) / sum(counts) over rows. Each end is the outer one of two intervals: the studentized
    bootstrap, and the jackknife with Student's t.

    The studentized bootstrap draws rows with replacement. The distribution of (ratio of the resample - ratio) / (its
    own standard error) replaces Student's t (B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993,
    section 12.5); the standard error of the rows is the jackknife's. The bootstrap accounts for the skew of losses, for
    which Student's t has too little coverage. For differences, which have heavy tails rather than skew, it has less
    coverage than Student's t. So neither is enough alone; the measured coverage is in `scripts/memory_and_exports.md`.

    The order of rows does not matter, and negated totals give the mirrored interval.

    Args:
        totals: The total of each row, such as nats, or the nats of one model minus those of another.
        counts: The count of each row, such as supervised tokens; above 0.
        seed: Seed of the random draws.

    Returns:
        The interval, which contains the ratio; None for fewer than `LEAST_ROWS` rows, or if a total is not finite. It
        has no width if all rows have the same ratio. It is the jackknife's for more than 20,000 rows, and at an end
        for which 2.5 % of the resamples have no spread, as with few rows, most of them equal.

    Raises:
        ValueError: The numbers of totals and counts differ, or a count is not above 0 and finite.
    """
    totals, counts = _checked(totals, counts)
    wide = jackknife_interval(totals, counts)
    if wide is None or len(totals) > _MOST_ROWS:
        return wide
    if totals.sum() < 0:
        mirrored = mean_ratio_interval(-totals, counts, seed=seed)
        return mirrored and Interval(-mirrored.high, -mirrored.low)
    order = np.lexsort((counts, totals))
    totals, counts = totals[order], counts[order]
    ratio, error = mean_ratio(totals, counts), mean_ratio_error(totals, counts)
    if error <= _ROUNDING * np.abs(totals).sum() / counts.sum():
        return Interval(ratio, ratio)
    low, high = _ends(_studentized(totals - ratio * counts, counts, seed), len(totals))
    return Interval(ratio - high * error, ratio - low * error)


def positive_ratio_interval(totals: Values, counts: Values, *, seed: int = 0) -> Interval | None:
    """The interval of sum(totals) / sum(counts) over rows, for totals of at least 0 with heavy tails.

    The upper end is that of `mean_ratio_interval`; the lower one is computed in the same way for the logarithm, so it
    is above 0. With 24 lognormal rows (600 draws), the truth is outside as often as with `mean_ratio_interval`, or
    1.7 % more often: 8 % of the time for sigma 0.7 and 1, 14 % for 1.5. Arguments, result and errors as there.
    """
    totals, counts = _checked(totals, counts)
    ratio, error = mean_ratio(totals, counts), mean_ratio_error(totals, counts)
    whole = mean_ratio_interval(totals, counts, seed=seed)
    if whole is None or error <= _ROUNDING * ratio:
        return whole
    _, high = _ends(_studentized(totals - ratio * counts, counts, seed, ratio), len(totals))
    return Interval(ratio * math.exp(-high * error / ratio), whole.high)


def _ends(studentized: Array, rows: int) -> tuple[float, float]:
    """The outer ends of the middle 95 % of resamples and of Student's t."""
    low, high = np.quantile(studentized, (1 - _UPPER, _UPPER), method="inverted_cdf").tolist()
    reach = float(stdtrit(rows - 1, _UPPER))
    below, above = (max(reach, end) if math.isfinite(end) else reach for end in (-low, high))
    return -below, above


def sum_of_ratios_interval(samples: Sequence[tuple[Values, Values]]) -> Interval | None:
    """The interval of a sum of ratios over separate samples, such as a difference between the means of two groups: by
    the jackknife and Student's t with the degrees of freedom of B. L. Welch (Biometrika 34, 1947, p. 28).

    Args:
        samples: The totals and counts of each sample, see `mean_ratio_interval`.

    Returns:
        The interval, for one sample that of `jackknife_interval`; None if a sample has fewer than `LEAST_ROWS` rows, or
        a total is not finite.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    checked = [_checked(*sample) for sample in samples]
    if any(len(totals) < LEAST_ROWS or not np.isfinite(totals).all() for totals, _ in checked):
        return None
    middle = sum(mean_ratio(*sample) for sample in checked)
    parts = np.array([mean_ratio_error(*sample) ** 2 for sample in checked])
    if not parts.sum():
        return Interval(middle, middle)
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(totals) - 1 for totals, _ in checked])).sum()
    half = float(stdtrit(freedom, _UPPER)) * math.sqrt(parts.sum())
    return Interval(middle - half, middle + half)


def _studentized(rest: Array, counts: Array, seed: int, positive: float | None = None) -> Array:
    """The distance of each resample's ratio from that of the rows, in the resample's own standard errors, by
    linearization. It is infinite if all rows of a resample are equal, and 0 if they also have the ratio of all rows.

    rest: the residual of each row, its total minus ratio times count. positive: the ratio, if the distance is that of
    the logarithms.
    """
    rows, dice = len(rest), np.random.default_rng(seed)
    columns = np.stack([rest, counts, rest**2, rest * counts, counts**2], axis=1)
    found, size = [], max(1, _CHUNK // rows)
    for start in range(0, _RESAMPLES, size):
        resamples = min(size, _RESAMPLES - start)
        drawn = dice.integers(rows, size=(resamples, rows), dtype=np.int32) + rows * np.arange(resamples)[:, None]
        times = np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows)
        away, count, away2, both, count2 = (times.astype(np.float64) @ columns).T
        shift = away / count
        spread = rows / (rows - 1) * (away2 - 2 * shift * both + shift**2 * count2)
        spread[spread <= _ROUNDING * away2] = 0
        if positive is not None:
            away = np.log1p(shift / positive) * (positive + shift) * count
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(away == 0, 0, away / np.sqrt(spread)))
    return np.concatenate(found)


def _checked(totals: Values, counts: Values) -> tuple[Array, Array]:
    """Totals and counts as arrays. Raises ValueError as `mean_ratio_interval` does."""
    totals, counts = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if totals.shape != counts.shape or totals.ndim != 1:
        raise ValueError(f"totals of shape {totals.shape} have counts of shape {counts.shape}")
    if not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError("a row has a count that is not above 0 and finite")
    return totals, counts


def median_interval(values: Values) -> Interval | None:
    """The interval of a median, whose ends are two of the values: exact for any continuous distribution (the sign test,
    W. R. Thompson, Ann. Math. Stat. 7, 1936, p. 122), and wider than 95 % for few of them, such as 97.7 % for 24.

    Returns None for fewer than six values, with which no interval is wide enough, or if one is not finite.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    outside = bdtr(np.arange(len(ordered)), len(ordered), 0.5)
    left_out = int(np.searchsorted(outside, 1 - _UPPER, side="right"))
    if not left_out or not np.isfinite(ordered).all():
        return None
    return Interval(float(ordered[left_out - 1]), float(ordered[-left_out]))


def share_difference_interval(first_only: float, second_only: float, rows: float) -> Interval:
    """The interval of the difference between two paired proportions, second minus first, by the adjusted Wald interval
    (D. G. Bonett and R. M. Price, J. Educ. Behav. Stat. 37, 2012, p. 479).

    Args:
        first_only: Rows that match only the first time; fractional if copies of rows are weighted.
        second_only: Rows that match only the second time.
        rows: The number of rows, above 0.
    """
    return _paired_interval((second_only - first_only) / rows, (second_only + first_only) / rows, rows)


def _paired_interval(mean: float, square: float, rows: float) -> Interval:
    """The adjusted Wald interval of a mean of differences between -1 and 1: Wald's interval with two rows added, of the
    differences -1 and 1. square: the mean of the squared differences."""
    shifted, wider = mean * rows / (rows + 2), (square * rows + 2) / (rows + 2)
    half = _Z * math.sqrt(max(0.0, wider - shifted**2) / (rows + 2))
    return Interval(max(-1.0, shifted - half), min(1.0, shifted + half))


def share_difference_error(first_only: float, second_only: float, rows: float) -> float:
    """The standard error of the difference between two paired proportions; see `share_difference_interval`."""
    return math.sqrt(max(0.0, first_only + second_only - (second_only - first_only) ** 2 / rows)) / rows


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value of the equality of two paired proportions: the sign test on rows that match only once
    (Q. McNemar, Psychometrika 12, 1947, p. 153)."""
    fewer, either = min(first_only, second_only), first_only + second_only
    return min(1.0, 2 * float(bdtr(fewer, either, 0.5)))


def rows_needed(difference: float, standard_error: float, rows: int) -> int | None:
    """The number of similar rows needed to detect a difference of this size: the 95 % interval excludes 0 with a power
    of 80 %, by the normal approximation, which is a few rows too low when the result is below a few dozen.

    Args:
        difference: The difference found.
        standard_error: The standard error of the difference; see `mean_ratio_error` and `share_difference_error`.
        rows: The number of rows on which both were computed.

    Returns:
        The total number of rows, at least `LEAST_ROWS`; None if the difference is 0, if a number is not finite, or if
        more than 10¹⁵ rows were needed, as such a difference may be due to rounding.
    """
    if difference == 0 or not (math.isfinite(difference) and math.isfinite(standard_error)):
        return None
    factor = (_Z + float(ndtri(POWER))) * standard_error / difference
    needed = rows * factor * factor
    return max(LEAST_ROWS, math.ceil(needed)) if needed <= _MOST_NEEDED else None
