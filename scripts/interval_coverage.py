"""How often the 95 % intervals of `loratune/statistics.py` cover the truth.

    python scripts/interval_coverage.py [--draws 2000] [--seed 0] [--rows 20 50 200]

Losses are drawn with replacement from the rows of `row_losses.csv`, which were measured with SmolLM2-135M-Instruct and
an adapter of 50 steps, and from two lognormal populations. Proportions are not drawn: each number of matches is counted
with its probability. Prints Markdown tables, and the bounds that are missed, in which case it ends with exit code 1:
95 % ± 1.5 for proportions, 95 % ± 2 for losses and their differences from 200 rows on. The second lognormal
population, with a skewness of 25, has no bound. Takes some minutes on one idle thread.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from loratune import statistics
from loratune.statistics import Interval

Array = NDArray[np.float64]
LOSSES = Path(__file__).with_name("row_losses.csv")
PROPORTION_BOUND, LOSS_BOUND, LOSS_BOUND_ROWS = 0.015, 0.02, 200
PROBABILITIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Of a row to match only the first time, or only the second."""


@dataclass(frozen=True)
class Population:
    """Rows to draw from.

    Attributes:
        name: What to call them.
        tokens: Supervised tokens of each row.
        nats: Loss of the base on each row, summed over its tokens, and the difference that the adapter makes.
        bounded: Whether coverage is held to the bound; else it is reported only.
    """

    name: str
    tokens: Array
    nats: Mapping[str, Array]
    bounded: bool = True


def recorded() -> Population:
    """The measured rows."""
    with LOSSES.open(encoding="utf-8", newline="") as file:
        tokens, base, adapter = np.array([[*map(float, row)] for row in [*csv.reader(file)][1:]]).T
    return Population("measured", tokens, {"loss": base, "difference": adapter - base})


def lognormal(name: str, spread: float, rows: int = 1_000_000) -> Population:
    """Nats per token with a skewness of 6.2. spread: of the logarithm of the rows' lengths; 0: all have one."""
    dice = np.random.default_rng(0)
    tokens = np.ceil(np.exp(dice.normal(2.5, spread, rows)))
    base, adapter = (tokens * np.exp(dice.normal(mean, 1, rows)) for mean in (0.0, -0.1))
    return Population(name, tokens, {"loss": base, "difference": adapter - base}, bounded=not spread)


def loss_coverage(population: Population, figure: str, rows: int, draws: int, seed: int) -> float:
    """The fraction of samples whose interval covers the population's ratio of nats to tokens."""
    dice, tokens, totals = np.random.default_rng((seed, rows)), population.tokens, population.nats[figure]
    truth, covered = totals.sum() / tokens.sum(), 0
    for _ in range(draws):
        drawn = dice.integers(len(tokens), size=rows)
        interval = statistics.mean_ratio_interval(totals[drawn], tokens[drawn])
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    return covered / draws


def wilson_coverage(rows: int) -> Array:
    """The probability that Wilson's interval covers, for each p of a uniform grid in (0, 1)."""
    chances = np.arange(0.0005, 1, 0.001)[:, None]
    matches = np.arange(rows + 1)
    weights = np.exp(
        gammaln(rows + 1) - gammaln(matches + 1) - gammaln(rows - matches + 1)
        + xlogy(matches, chances) + xlogy(rows - matches, 1 - chances)
    )  # fmt: skip
    low, high = ends(statistics.wilson(float(one), rows) for one in matches)
    covered: Array = (weights * ((low <= chances) & (chances <= high))).sum(axis=1)
    return covered


def difference_coverage(rows: int) -> Array:
    """The probability that the interval of a paired difference of proportions covers, at each point of a grid."""
    first, second = (
        one[np.add(*np.indices((rows + 1,) * 2)) <= rows].astype(float) for one in np.indices((rows + 1,) * 2)
    )
    rest = rows - first - second
    ways = gammaln(rows + 1) - gammaln(first + 1) - gammaln(second + 1) - gammaln(rest + 1)
    counts = zip(first.tolist(), second.tolist(), strict=True)
    low, high = ends(statistics.share_difference_interval(*one, rows) for one in counts)
    covered = list[float]()
    for p, q in ((p, q) for p in PROBABILITIES for q in PROBABILITIES if p + q < 0.95):
        weights = np.exp(ways + xlogy(first, p) + xlogy(second, q) + xlogy(rest, 1 - p - q))
        covered.append(float(weights @ ((low <= q - p) & (q - p <= high))))
    return np.array(covered)


def ends(intervals: Iterator[Interval]) -> tuple[Array, Array]:
    """The lower and the upper ends."""
    low, high = np.array([(one.low, one.high) for one in intervals]).T
    return low, high


def percent(share: float) -> str:
    """One decimal."""
    return f"{100 * share:.1f}"


def proportion_table() -> Iterator[str]:
    """Print how well proportions and their paired differences are covered; the missed bounds."""
    print("| rows | proportion: mean (least) | paired difference: mean (least) |\n|---|---|---|")
    for rows in (20, 50, 200, 500):
        found = {"proportion": wilson_coverage(rows), "difference": difference_coverage(rows)}
        print(f"| {rows} | {' | '.join(f'{percent(one.mean())} ({percent(one.min())})' for one in found.values())} |")
        for name, covered in found.items():
            if (name == "proportion" or rows >= LOSS_BOUND_ROWS) and abs(covered.mean() - 0.95) > PROPORTION_BOUND:
                yield f"{name}, {rows} rows: {percent(covered.mean())} %"
    print(flush=True)


def loss_table(draws: int, seed: int, sizes: Sequence[int]) -> Iterator[str]:
    """Print how well losses and their differences are covered in samples of some sizes; the missed bounds."""
    print(f"| population | {' | '.join(f'{rows} rows' for rows in sizes)} |\n|{'---|' * (len(sizes) + 1)}")
    for population in (recorded(), lognormal("lognormal", 0), lognormal("lognormal, lengths too", 1)):
        for figure, totals in population.nats.items():
            rest = totals - totals.sum() / population.tokens.sum() * population.tokens
            skewness = ((rest - rest.mean()) ** 3).mean() / rest.std() ** 3
            found = {rows: loss_coverage(population, figure, rows, draws, seed) for rows in sizes}
            what = f"{population.name}: {figure} (skewness {skewness:.1f})"
            print(f"| {what} | {' | '.join(map(percent, found.values()))} |", flush=True)
            for rows, covered in found.items():
                if population.bounded and rows >= LOSS_BOUND_ROWS and abs(covered - 0.95) > LOSS_BOUND:
                    yield f"{population.name}, {figure}, {rows} rows: {percent(covered)} %"


def main() -> None:
    """Print all tables. Exits with 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 50, 200], help="of a sample, for losses")
    options = parser.parse_args()
    if missed := [*proportion_table(), *loss_table(options.draws, options.seed, options.rows)]:
        sys.exit("\n".join(["bounds missed:", *missed]))


if __name__ == "__main__":
    main()
