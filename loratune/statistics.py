"""The statistics of comparisons: 95 % intervals of losses, of shares and of their differences, and tests in pairs.

The sample is always one of rows, as the tokens of one row depend on each other. A loss in nats per supervised token is
therefore a ratio of two sums over rows, of nats and of tokens, and so is the difference between two models' losses on
the same rows. Copies of a row add no information: whoever calls counts them once, with the weight of all of them.

`scripts/interval_coverage.py` measures how often each interval covers the truth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri, stdtrit

Values = Sequence[float] | NDArray[np.float64]
Array = NDArray[np.float64]

LEAST_ROWS = 5
"""Distinct rows below which a mean has no interval. That of fewer rests on a variance that is hardly known."""
LEVEL = 0.95
POWER = 0.8
_TAIL = (1 - LEVEL) / 2
_Z = float(ndtri(1 - _TAIL))
_DRAWS = 4000
_CHUNK = 4_000_000
"""Weights of rows in resamples that are in memory at once: 32 MB each of their indices and of their counts."""
_EXACT = 1e-12
"""A relative standard error below which all rows are the same but for rounding."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    def as_json(self) -> list[float]:
        """`[low, high]`."""
        return [self.low, self.high]


def wilson(matches: float, rows: float) -> Interval:
    """The interval of a share, by the score test (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, p. 209).

    Args:
        matches: Rows that match; a fraction where copies of rows are weighted.
        rows: How many rows there are, above 0.

    Raises:
        ValueError: `matches` is not between 0 and `rows`, or `rows` is not above 0.
    """
    if not (0 < rows < math.inf and 0 <= matches <= rows):
        raise ValueError(f"{matches} matches of {rows} rows are no share")
    share, square = matches / rows, _Z**2 / rows
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    low = 0.0 if matches == 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if matches == rows else min(1.0, middle + half))


def mean_ratio_error(totals: Values, counts: Values) -> float:
    """The standard error of sum(totals) / sum(counts) over rows, by linearization (W. G. Cochran, Sampling Techniques,
    3rd edition, 1977, section 6.4); NaN for fewer than two rows.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    nats, tokens = _checked(totals, counts)
    rows = len(nats)
    if rows < 2:
        return math.nan
    rest = nats - nats.sum() / tokens.sum() * tokens
    return float(math.sqrt(rows / (rows - 1) * (rest @ rest)) / tokens.sum())


def mean_ratio_interval(totals: Values, counts: Values, *, seed: int = 0) -> Interval | None:
    """The interval of sum(totals) / sum(counts) over rows, by a studentized bootstrap.

    Rows are drawn with replacement, and the distribution of (ratio of the resample - ratio) / (its own standard error)
    takes the place of Student's t (B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12).
    That follows the skew of the losses, which the interval of a t test does not. The order of rows does not matter, and
    totals with the other sign give the mirrored interval. Where more than 2.5 % of the resamples have no spread, as
    with few rows of which most are the same, it is the interval of `jackknife_interval`.

    Args:
        totals: Of each row, such as nats, or nats of one model less those of another.
        counts: Of each row, such as supervised tokens; above 0.
        seed: Of the random draws.

    Returns:
        The interval, which holds the ratio; None for fewer than `LEAST_ROWS` rows and where a total is not finite. It
        has no width where all rows are the same.

    Raises:
        ValueError: There are as many totals as counts, or a count is not above 0 and finite.
    """
    nats, tokens = _checked(totals, counts)
    if len(nats) < LEAST_ROWS or not np.isfinite(nats).all():
        return None
    if nats.sum() < 0:
        mirrored = mean_ratio_interval(-nats, tokens, seed=seed)
        return mirrored and Interval(-mirrored.high, -mirrored.low)
    order = np.lexsort((tokens, nats))
    nats, tokens = nats[order], tokens[order]
    ratio, error = float(nats.sum() / tokens.sum()), mean_ratio_error(nats, tokens)
    if error <= _EXACT * np.abs(nats).sum() / tokens.sum():
        return Interval(ratio, ratio)
    drawn = _studentized(nats - ratio * tokens, tokens, seed)
    low, high = np.quantile(drawn, (_TAIL, 1 - _TAIL), method="inverted_cdf")
    if not (math.isfinite(low) and math.isfinite(high)):
        return jackknife_interval(nats, tokens)
    return Interval(min(ratio, ratio - float(high) * error), max(ratio, ratio - float(low) * error))


def _studentized(rest: Array, tokens: Array, seed: int) -> Array:
    """How far the ratio of each resample is from that of the rows, in its own standard errors; infinite where all rows
    of a resample are the same, and 0 where they also have the ratio of all.

    rest: of each row, its total less what its count lets expect.
    """
    rows, dice = len(rest), np.random.default_rng(seed)
    columns = np.stack([rest, tokens, rest**2, rest * tokens, tokens**2], axis=1)
    found = []
    for size in _chunks(_DRAWS, max(1, _CHUNK // rows)):
        drawn = dice.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        away, count, away2, both, count2 = (weights.astype(np.float64) @ columns).T
        shift = away / count
        spread = away2 - 2 * shift * both + shift**2 * count2
        spread[spread <= _EXACT * away2] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(
                np.nan_to_num(away / np.sqrt(rows / (rows - 1) * spread), nan=0.0, posinf=np.inf, neginf=-np.inf)
            )
    return np.concatenate(found)


def _chunks(total: int, size: int) -> list[int]:
    """A total in parts of at most a size."""
    return [min(size, total - start) for start in range(0, total, size)]


def jackknife_interval(totals: Values, counts: Values) -> Interval | None:
    """The interval of sum(totals) / sum(counts) over rows, by the delete-one jackknife with Student's t (R. G. Miller,
    "The jackknife: a review", Biometrika 61, 1974). Where all counts are the same, it is that of a t test.

    Returns:
        The interval; None for fewer than `LEAST_ROWS` rows and where a total is not finite.

    Raises:
        ValueError: See `mean_ratio_interval`.
    """
    nats, tokens = _checked(totals, counts)
    rows = len(nats)
    if rows < LEAST_ROWS or not np.isfinite(nats).all():
        return None
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    error = math.sqrt((rows - 1) / rows * ((without - without.mean()) ** 2).sum())
    ratio, half = float(nats.sum() / tokens.sum()), float(stdtrit(rows - 1, 1 - _TAIL)) * error
    return Interval(ratio - half, ratio + half)


def _checked(totals: Values, counts: Values) -> tuple[Array, Array]:
    """Both as arrays. Raises ValueError as `mean_ratio_interval` does."""
    nats, tokens = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if nats.shape != tokens.shape or nats.ndim != 1:
        raise ValueError(f"{nats.shape} totals have {tokens.shape} counts")
    if not (np.isfinite(tokens) & (tokens > 0)).all():
        raise ValueError("a row has a count that is not above 0 and finite")
    return nats, tokens


def share_difference_interval(first_only: float, second_only: float, rows: float) -> Interval:
    """The interval of a second share less a first one, of the same rows, by the adjusted Wald interval for pairs (D. G.
    Bonett and R. M. Price, J. Educ. Behav. Stat. 37, 2012, p. 479).

    Args:
        first_only: Rows that match only the first time; a fraction where copies of rows are weighted.
        second_only: Rows that match only the second time.
        rows: How many rows there are, above 0.

    Raises:
        ValueError: The rows that match once are below 0 or more than all rows.
    """
    _check_shares(first_only, second_only, rows)
    first, second = (first_only + 1) / (rows + 2), (second_only + 1) / (rows + 2)
    half = _Z * math.sqrt(max(0.0, first + second - (second - first) ** 2) / (rows + 2))
    return Interval(max(-1.0, second - first - half), min(1.0, second - first + half))


def share_difference_error(first_only: float, second_only: float, rows: float) -> float:
    """The standard error of a second share less a first one, of the same rows; see `share_difference_interval`."""
    _check_shares(first_only, second_only, rows)
    return math.sqrt(max(0.0, first_only + second_only - (second_only - first_only) ** 2 / rows)) / rows


def _check_shares(first_only: float, second_only: float, rows: float) -> None:
    if not (0 < rows < math.inf and first_only >= 0 and second_only >= 0 and first_only + second_only <= rows):
        raise ValueError(f"{first_only} and {second_only} of {rows} rows are no shares")


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p of two shares of the same rows being equal: the sign test on rows that match once
    (Q. McNemar, Psychometrika 12, 1947, p. 153).

    Raises:
        ValueError: A number is below 0.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"{first_only} and {second_only} are no numbers of rows")
    fewer, either = min(first_only, second_only), first_only + second_only
    return min(1.0, 2 * float(bdtr(fewer, either, 0.5)))


def rows_needed(difference: float, standard_error: float, rows: int) -> int | None:
    """How many rows of the same kind would make a difference of this size distinguishable: the 95 % interval would
    exclude 0 with a probability of 80 %, by the normal approximation.

    Args:
        difference: What was found.
        standard_error: Of the difference, on `rows` rows; see `mean_ratio_error` and `share_difference_error`.
        rows: On how many rows it was found.

    Returns:
        The rows in all, at least `LEAST_ROWS`; None where the difference is 0, or a number is not finite.
    """
    if difference == 0 or not (math.isfinite(difference) and math.isfinite(standard_error)):
        return None
    factor = (_Z + float(ndtri(POWER))) * standard_error / difference
    return max(LEAST_ROWS, math.ceil(rows * factor**2))
