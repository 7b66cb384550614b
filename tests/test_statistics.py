"""Intervals and tests for comparisons: against references, for invariances, and in simulations."""

import math
import time
from collections.abc import Callable

import interval_coverage
import numpy as np
import pytest
from scipy import stats

from loratune.statistics import (
    LEAST_ROWS,
    Interval,
    bounded_difference_interval,
    bounded_mean_interval,
    jackknife_interval,
    loss_interval,
    mcnemar,
    mean_ratio_error,
    mean_ratio_interval,
    median_interval,
    positive_ratio_interval,
    rows_needed,
    share_difference_error,
    share_difference_interval,
    wilson,
)

Rows = tuple[np.ndarray, np.ndarray]
MEANS = (jackknife_interval, mean_ratio_interval)


def made(count: int, seed: int = 0, zeros: float = 0.0) -> Rows:
    """Skewed nats and tokens of rows. zeros: the share of rows with zero nats."""
    dice = np.random.default_rng(seed)
    tokens = np.ceil(np.exp(dice.normal(2, 1, count)))
    return tokens * np.exp(dice.normal(0, 1, count)) * (dice.random(count) >= zeros), tokens


def ends(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


@pytest.mark.parametrize("matches, rows", [(0, 20), (1, 29), (15, 148), (81, 263), (199, 200), (7, 7)])
def test_wilson_interval_matches_scipy(matches: int, rows: int) -> None:
    expected = stats.binomtest(matches, rows).proportion_ci(method="wilson")
    assert ends(wilson(matches, rows)) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_matches_the_textbook_and_accepts_fractions() -> None:
    """81 of 263: R. G. Newcombe, Statistics in Medicine 17, 1998, p. 857, table I."""
    assert ends(wilson(81, 263)) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(3, 10).low < wilson(3.5, 10).low < wilson(4, 10).low
    assert ends(wilson(3.5, 10)) == pytest.approx([1 - end for end in reversed(ends(wilson(6.5, 10)))])
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1 and wilson(0, 5).to_dict() == [0, wilson(0, 5).high]


@pytest.mark.parametrize("first, second", [(1, 9), (5, 5), (0, 0), (0, 6), (59, 121), (150, 86)])
def test_mcnemar_equals_the_sign_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_matches_values_computed_by_hand() -> None:
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)


def test_share_difference_intervals_match_values_computed_by_hand() -> None:
    """The 21 children of Bentur et al. 2009 in M. W. Fagerland et al., Statistics in Medicine 33, 2014: 7 react only
    the first time, 1 only the second. So the shares are 8/23 and 2/23, and the variance (10/23 - (6/23)²) / 23."""
    half = 1.959964 * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert ends(share_difference_interval(7, 1, 21)) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-6)
    assert ends(share_difference_interval(1, 7, 21)) == pytest.approx((6 / 23 - half, 6 / 23 + half), abs=1e-6)
    low, high = ends(share_difference_interval(0, 0, 200))
    assert -0.03 < low == -high < 0  # equal rows do not prove that there is no difference
    assert share_difference_interval(0.5, 4, 30).low > share_difference_interval(1, 4, 30).low
    outcomes = np.array([-1.0] * 3 + [1.0] * 8 + [0.0] * 39)
    assert share_difference_error(3, 8, 50) == pytest.approx(outcomes.std() / math.sqrt(50))


def test_jackknife_equals_students_interval_for_rows_of_equal_length() -> None:
    """The 0.975 quantile is compared with tables."""
    values = np.random.default_rng(0).normal(0.3, 2, 40)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert ends(jackknife_interval(7 * values, [7] * 40)) == pytest.approx((expected.low, expected.high))
    assert mean_ratio_error(7 * values, [7] * 40) == pytest.approx(stats.sem(values))
    for degrees, quantile in ((4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (127, 1.9788)):
        totals = np.random.default_rng(degrees).normal(size=degrees + 1)
        low, high = ends(jackknife_interval(totals, [1] * len(totals)))
        assert (high - low) / 2 / mean_ratio_error(totals, [1] * len(totals)) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize("rows, zeros", [(5, 0.0), (12, 0.5), (60, 0.9), (1000, 0.0)])
def test_mean_interval_invariances(rows: int, zeros: float) -> None:
    """Invariant to the order of rows, scaled by units, mirrored when two models swap. Another seed changes it
    slightly."""
    totals, tokens = made(rows, rows, zeros)
    low, high = ends(mean_ratio_interval(totals, tokens))
    order = np.random.default_rng(1).permutation(rows)
    assert ends(mean_ratio_interval(totals[order], tokens[order])) == (low, high)
    assert ends(mean_ratio_interval(4 * totals, 2 * tokens)) == (2 * low, 2 * high)
    assert ends(mean_ratio_interval(-totals, tokens)) == (-high, -low)
    jackknife = ends(jackknife_interval(totals, tokens))
    assert low <= jackknife[0] + 1e-9 and jackknife[1] <= high + 1e-9
    other = ends(mean_ratio_interval(totals, tokens, seed=1))
    assert other == pytest.approx((low, high), abs=0.2 * (high - low))
    assert rows < 10 or zeros or other != (low, high)


def test_upper_end_reflects_skewed_losses() -> None:
    """If a few rows dominate the mean, the true mean may well be higher."""
    totals, tokens = made(100)
    (low, high), jackknife = ends(mean_ratio_interval(totals, tokens)), ends(jackknife_interval(totals, tokens))
    assert high - jackknife[1] > 0.05 * (jackknife[1] - jackknife[0]) > jackknife[0] - low


def test_pairing_removes_shared_variation() -> None:
    first, tokens = made(200)
    second = first - 0.05 * tokens * (1 + 0.1 * np.random.default_rng(5).normal(size=200))
    low, high = ends(mean_ratio_interval(second - first, tokens))
    assert -0.06 < low < -0.05 < high < -0.04
    alone = ends(mean_ratio_interval(first, tokens))
    assert alone[1] - alone[0] > 10 * (high - low)


@pytest.mark.parametrize("interval", MEANS)
def test_degenerate_rows_give_a_point_or_no_interval(interval: Callable[..., Interval | None]) -> None:
    assert ends(interval([0.0] * 9, range(1, 10))) == (0, 0)
    assert ends(interval([0.3] * 9, [7] * 9)) == pytest.approx((0.3 / 7, 0.3 / 7), rel=1e-12)
    assert ends(interval([0.1 * count for count in range(1, 10)], range(1, 10))) == pytest.approx((0.1, 0.1), rel=1e-9)
    few, enough = range(1, LEAST_ROWS), range(1, LEAST_ROWS + 1)
    assert interval(few, few[::-1]) is None and interval(enough, enough[::-1]) is not None and interval([], []) is None
    for bad in (math.nan, math.inf, -math.inf):
        assert interval([1.0, 2.0, 3.0, 4.0, bad, 6.0], [1] * 6) is None
        assert math.isnan(mean_ratio_error([1.0, bad], [1, 1]))
    assert math.isnan(mean_ratio_error([1.0], [1]))


def test_nearly_constant_rows_use_the_jackknife_interval() -> None:
    """Most resamples of these rows have no spread, so they are not informative."""
    totals, tokens = [0.0] * 8 + [1.0], [1] * 9
    assert ends(mean_ratio_interval(totals, tokens)) == pytest.approx(ends(jackknife_interval(totals, tokens)))


def test_equal_scores_still_give_a_wide_interval() -> None:
    """Five correct answers give the interval of five matching rows, for any score."""
    for score in (0, 1):
        assert bounded_mean_interval([score] * 5, [1] * 5) == wilson(5 * score, 5)
    low, high = ends(bounded_mean_interval([0.5] * 5, [1] * 5))
    assert low < 0.3 and high > 0.7
    assert bounded_difference_interval([0] * 5, [1] * 5) == share_difference_interval(0, 0, 5)
    low, high = ends(bounded_difference_interval([1] * 5, [1] * 5))
    assert 0 < low < 0.3 and high == 1
    one, copied = (ends(bounded_mean_interval([1] * 6, weights)) for weights in ([1] * 6, [200] + [1] * 5))
    assert copied[0] < one[0]
    assert bounded_mean_interval([1] * 4, [1] * 4) is bounded_difference_interval([1] * 4, [1] * 4) is None
    scores = np.random.default_rng(0).beta(3, 2, 200)
    drawn, found = (ends(one(scores, [1] * 200)) for one in (mean_ratio_interval, bounded_mean_interval))
    assert drawn[1] - drawn[0] <= found[1] - found[0] < 1.05 * (drawn[1] - drawn[0])


def test_interval_of_many_rows_is_fast() -> None:
    totals, tokens = made(5000)
    start = time.process_time()
    assert mean_ratio_interval(totals, tokens) is not None
    assert time.process_time() - start < 1
    totals, tokens = made(20_001)
    assert mean_ratio_interval(totals, tokens) == jackknife_interval(totals, tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        *(lambda interval=interval: interval([1.0] * 5, [1, 1, 1, 1, 0]) for interval in MEANS),
        *(lambda interval=interval: interval([1.0] * 5, [1] * 6) for interval in MEANS),
        lambda: mean_ratio_error([1.0] * 2, [1, math.nan]),
    ],
)
def test_invalid_samples_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        wrong()


@pytest.mark.parametrize("count", [6, 7, 24, 25, 100, 1001])
def test_median_interval_equals_that_of_scipy(count: int) -> None:
    values = made(count)[0]
    expected = stats.quantile_test(values, p=0.5).confidence_interval()
    assert ends(median_interval(values)) == ends(median_interval(values[::-1])) == (expected.low, expected.high)


def test_median_interval_needs_six_finite_values() -> None:
    assert median_interval([]) is None and median_interval([1.0] * 5) is None
    assert median_interval([1.0] * 6) == Interval(1.0, 1.0) and median_interval([1.0] * 6 + [math.inf]) is None


def test_rows_needed() -> None:
    """A difference of half a standard deviation needs (1.960 + 0.842)² / 0.5² = 31.4 rows, for any sample size."""
    assert rows_needed(0.5, 1 / math.sqrt(10), 10) == rows_needed(-0.5, 1 / math.sqrt(1000), 1000) == 32
    assert rows_needed(1.0, 1e-9, 50) == rows_needed(1.0, 0.0, 50) == LEAST_ROWS
    for difference, error in (
        (0.0, 1.0),
        (5e-324, 1.0),
        (1e-17, 1.0),
        (math.nan, 1.0),
        (math.inf, 1.0),
        (1.0, math.nan),
    ):
        assert rows_needed(difference, error, 50) is None


def test_share_intervals_have_the_nominal_coverage() -> None:
    """Computed exactly, weighting every number of matches by its probability."""
    share, difference = interval_coverage.wilson_coverage(50), interval_coverage.difference_coverage(50)
    assert abs(share.mean() - 0.95) < 0.005
    assert difference.min() > 0.94 and difference.mean() < 0.97


def test_loss_intervals_have_the_nominal_coverage_on_real_rows() -> None:
    population, deviation = interval_coverage.recorded(), math.sqrt(0.95 * 0.05 / 150)
    for figure in population.nats:
        assert abs(interval_coverage.loss_coverage(population, figure, 60, 150, 0) - 0.95) < 2 * deviation


@pytest.mark.slow
def test_coverage_is_within_the_reported_bounds() -> None:
    """As reported in `scripts/memory_and_exports.md`: 95 % ± 1.5 for shares, ± 2 for losses with 200 rows or more."""
    missed = [*interval_coverage.proportion_table(), *interval_coverage.loss_table(2000, 0, [200])]
    assert missed == []


def test_loss_intervals_do_not_go_below_0() -> None:
    nats, tokens = [0.0, 0.0, 0.0, 0.0, 0.0, 0.001, 9.0], [2.0] * 7
    whole, loss = mean_ratio_interval(nats, tokens), loss_interval(nats, tokens)
    assert whole is not None and whole.low < 0
    assert loss == Interval(0.0, whole.high)


def test_intervals_of_positive_ratios_with_heavy_tails() -> None:
    """They are above 0, contain the ratio, and scale with it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(8, 48, 24).astype(float)
    totals = counts * rng.lognormal(0.0, 1.5, 24)
    found = positive_ratio_interval(totals, counts)
    assert found and 0 < found.low < totals.sum() / counts.sum() < found.high
    scaled = positive_ratio_interval(100 * totals, counts)
    assert scaled and (scaled.low, scaled.high) == pytest.approx((100 * found.low, 100 * found.high))
    totals[0] *= 100
    wider = positive_ratio_interval(totals, counts)
    assert wider and 0 < wider.low < totals.sum() / counts.sum() < wider.high
    assert positive_ratio_interval(np.zeros(24), counts) == Interval(0.0, 0.0)
    assert positive_ratio_interval(counts[:1], counts[:1]) is None
