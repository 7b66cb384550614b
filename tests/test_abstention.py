"""The threshold of `evaluate --abstain-for`: its guarantee, simulated, and what is said where no threshold holds."""

import math
from itertools import product
from math import comb

import numpy as np
import pytest
from conftest import mainly

from loratune.compare.abstention import THRESHOLDS, Abstention


def drawn(rows: int, generator: np.random.Generator, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities from 0.5 to 1, and answers that are right less often than they say if `bias` is below 0."""
    probability = 1 - 0.5 * generator.random(rows) ** 3
    return probability, (generator.random(rows) < np.clip(probability + bias, 0, 1)).astype(np.float64)


@pytest.mark.parametrize(("rows", "bias"), mainly([(80, -0.05), (400, 0.0)], product((80, 400), (0.0, -0.05, 0.03))))
def test_the_promise_is_kept_in_95_of_100_calibrations(rows: int, bias: float) -> None:
    """The true accuracy above a threshold is known from a million rows."""
    generator = np.random.default_rng(rows)
    probability, right = drawn(1_000_000, generator, bias)
    order = np.argsort(probability)
    means = np.cumsum(right[order][::-1])[::-1] / np.arange(len(order), 0, -1)
    true = {one: means[min(np.searchsorted(probability[order], one), len(order) - 1)] for one in THRESHOLDS}
    found = [Abstention.choose(*drawn(rows, generator, bias), 0.9) for _ in range(1_000)]
    wrong = sum(one.threshold is not None and true[one.threshold] < 0.9 for one in found)
    assert wrong <= 50 + 3 * math.sqrt(1_000 * 0.05 * 0.95)
    if rows == 400 and bias >= 0:
        assert sum(one.threshold is not None for one in found) > 900


def test_the_test_is_exact_and_ends_at_the_first_that_fails() -> None:
    """59 right answers of 59 are the fewest that show 95 %; of many rows, a wrong start is not the end."""
    sure = np.full(59, 0.9999)
    assert Abstention.choose(sure, np.ones(59), 0.95).threshold == THRESHOLDS[-1] == 0.0
    assert Abstention.choose(sure[1:], np.ones(58), 0.95).threshold is None
    mixed = np.concatenate([sure, np.full(100, 0.9)]), np.concatenate([np.ones(59), np.zeros(100)])
    found = Abstention.choose(*mixed, 0.95)
    assert found.threshold is not None and 0.9 < found.threshold <= 0.9999
    assert (found.answered, found.right) == (59 / 159, 1)
    for wrong in (0, 1, 2, 3, 4, 9):
        right = np.concatenate([np.ones(200 - wrong), np.zeros(wrong)])
        p = sum(comb(200, hits) * 0.95**hits * 0.05 ** (200 - hits) for hits in range(200 - wrong, 201))
        assert (Abstention.choose(np.full(200, 0.7), right, 0.95).threshold is not None) == (p <= 0.05 / 4)
    unlucky = np.linspace(1, 0.5, 200), np.concatenate([np.zeros(4), np.ones(196)])
    assert Abstention.choose(*unlucky, 0.9).threshold == 0


def test_rows_that_would_be_enough() -> None:
    few = Abstention.choose(np.full(30, 0.99), np.ones(30), 0.95)
    assert (few.threshold, few.rows_needed) == (None, 59)
    assert Abstention.choose(np.full(60, 0.99), np.concatenate([np.ones(50), np.zeros(10)]), 0.95).rows_needed is None
    nearly = Abstention.choose(np.full(100, 0.99), np.concatenate([np.ones(97), np.zeros(3)]), 0.95)
    assert nearly.threshold is None and nearly.rows_needed is not None
    needed = 2 * nearly.rows_needed  # more are needed where the risk is shared by several starts
    again = np.concatenate([np.ones(math.floor(0.97 * needed)), np.zeros(needed - math.floor(0.97 * needed))])
    assert Abstention.choose(np.full(needed, 0.99), again, 0.95).threshold is not None
