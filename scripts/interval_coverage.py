"""How often the intervals of `loratune/statistics.py` cover the truth, and what comparing in pairs brings.

    python scripts/interval_coverage.py [--draws 2000] [--seed 0] [--rows 20 50 200] [--parts shares losses powers]

Losses are drawn with replacement from the rows of `row_losses.csv`, which were measured with
SmolLM2-135M-Instruct, and from two lognormal populations. Shares are not drawn: each number of matches is counted with
its probability. Prints Markdown tables, and the bounds that are missed, in which case it ends with exit code 1: 95 % ±
1.5 for shares, 95 % ± 2 for losses and their differences from 200 rows on. The second lognormal population, with a
skewness of 25, has no bound, as no interval that was tried holds there. Takes some minutes on one idle thread.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri, xlogy

from loratune import statistics
from loratune.statistics import Interval

Array = NDArray[np.float64]
Ends = tuple[Array, Array]
LOSSES = Path(__file__).with_name("row_losses.csv")
OURS = "loratune"
Z = float(ndtri(0.975))
SHARE_BOUND, LOSS_BOUND, LOSS_BOUND_ROWS = 0.015, 0.02, 200
PARTS = ("shares", "losses", "powers")
PROBABILITIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Of a row to match only the first time, or only the second."""


@dataclass(frozen=True)
class Population:
    """Rows to draw from.

    Attributes:
        name: What to call them.
        tokens: Supervised tokens of each row.
        nats: Model → its loss on each row, summed over the tokens.
        matches: Model → 1 for each row that it completes as expected, else 0.
        bounded: Whether coverage is held to the bound; else it is reported only.
    """

    name: str
    tokens: Array
    nats: Mapping[str, Array]
    matches: Mapping[str, Array]
    bounded: bool = True

    def figures(self) -> dict[str, Array]:
        """The loss of the base, and the difference that the adapter makes."""
        return {"loss": self.nats["base"], "difference": self.nats["long"] - self.nats["base"]}


def recorded() -> Population:
    """The measured rows."""
    with LOSSES.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "kind"}
    nats, matches = (
        {model: columns[f"{model}_{what}"] for model in ("base", "short", "long")} for what in ("nats", "match")
    )
    return Population("measured", columns["tokens"], nats, matches)


def lognormal(name: str, spread: float, rows: int = 1_000_000) -> Population:
    """Nats per token with a skewness of 6.2. spread: of the logarithm of the rows' lengths; 0: all have one."""
    dice = np.random.default_rng(0)
    tokens = np.ceil(np.exp(dice.normal(2.5, spread, rows)))
    base, adapter = (tokens * np.exp(dice.normal(mean, 1, rows)) for mean in (0.0, -0.1))
    return Population(name, tokens, {"base": base, "long": adapter}, {}, bounded=not spread)


def skewness(values: Array) -> float:
    """The third standardized moment."""
    return float(((values - values.mean()) ** 3).mean() / values.std() ** 3)


def alternatives(totals: Array, tokens: Array, times: Array) -> dict[str, Interval]:
    """Other intervals of the same ratio. times: how often each row is in each resample."""
    rows, ratio = len(totals), totals.sum() / tokens.sum()
    rest = totals - ratio * tokens
    away, count, away2, both, count2 = (times @ np.stack([rest, tokens, rest**2, rest * tokens, tokens**2], axis=1)).T
    shift, scale = away / count, rows / (rows - 1)
    low, high = ratio + np.quantile(shift, (0.025, 0.975))
    studentized = away / np.sqrt(scale * (away2 - 2 * shift * both + shift**2 * count2))
    error = math.sqrt(scale * (rest @ rest)) / tokens.sum()
    above, below = np.quantile(studentized, (0.025, 0.975)) * error
    jackknife = statistics.jackknife_interval(totals, tokens)
    assert jackknife is not None
    return {
        "jackknife with Student's t": jackknife,
        "studentized bootstrap alone": Interval(ratio - below, ratio - above),
        "percentile bootstrap": Interval(low, high),
    }


def loss_coverage(
    population: Population, totals: Array, rows: int, draws: int, seed: int
) -> tuple[dict[str, float], float]:
    """The share of samples whose interval covers the population's ratio, by method; and how much wider than the
    jackknife's our interval is, by their medians."""
    dice, tokens = np.random.default_rng((seed, rows)), population.tokens
    times = dice.multinomial(rows, np.full(rows, 1 / rows), size=2000).astype(np.float64)
    truth = totals.sum() / tokens.sum()
    found: dict[str, list[tuple[bool, float]]] = {}
    for _ in range(draws):
        drawn = dice.integers(len(tokens), size=rows)
        ours = statistics.mean_ratio_interval(totals[drawn], tokens[drawn])
        assert ours is not None
        for name, interval in {OURS: ours, **alternatives(totals[drawn], tokens[drawn], times)}.items():
            covers = interval.low <= truth <= interval.high
            found.setdefault(name, []).append((covers, interval.high - interval.low))
    widths = {name: float(np.median([width for _, width in pairs])) for name, pairs in found.items()}
    shares = {name: sum(covers for covers, _ in pairs) / draws for name, pairs in found.items()}
    return shares, widths[OURS] / widths["jackknife with Student's t"]


def wilson_coverage(rows: int) -> dict[str, Array]:
    """The probability that Wilson's interval covers, and the textbook one, for each p of a uniform grid in (0, 1)."""
    chances = np.arange(0.0005, 1, 0.001)[:, None]
    matches = np.arange(rows + 1)
    weights = np.exp(
        gammaln(rows + 1) - gammaln(matches + 1) - gammaln(rows - matches + 1)
        + xlogy(matches, chances) + xlogy(rows - matches, 1 - chances)
    )  # fmt: skip
    shares = matches / rows
    half = Z * np.sqrt(shares * (1 - shares) / rows)
    ours = [statistics.wilson(float(one), rows) for one in matches]
    ends = {
        OURS: (np.array([one.low for one in ours]), np.array([one.high for one in ours])),
        "textbook": (shares - half, shares + half),
    }
    return {name: (weights * ((low <= chances) & (chances <= high))).sum(axis=1) for name, (low, high) in ends.items()}


def tango(first: Array, second: Array, rows: int) -> Ends:
    """The score interval for pairs (T. Tango, Statistics in Medicine 17, 1998), by bisection."""

    def score(difference: Array) -> Array:
        linear = (2 * rows - second + first) * difference - first - second
        constant = -first * difference * (1 - difference)
        chance = (np.sqrt(np.maximum(linear**2 - 8 * rows * constant, 0)) - linear) / (4 * rows)
        variance = np.maximum(rows * (2 * chance + difference * (1 - difference)), 1e-300)
        return np.asarray((second - first - rows * difference) / np.sqrt(variance))

    estimate = (second - first) / rows
    ends = []
    for outer, sign in ((-1.0, 1), (1.0, -1)):
        outside, inside = np.full_like(estimate, outer), estimate.copy()
        for _ in range(50):
            middle = (outside + inside) / 2
            beyond = sign * score(middle) > Z
            outside, inside = np.where(beyond, middle, outside), np.where(beyond, inside, middle)
        ends.append(outside)
    return ends[0], ends[1]


def textbook_pairs(first: Array, second: Array, rows: int) -> Ends:
    """The estimate and 1.96 standard errors."""
    difference = (second - first) / rows
    half = Z * np.sqrt((first + second) / rows - difference**2) / math.sqrt(rows)
    return difference - half, difference + half


def ours_pairs(first: Array, second: Array, rows: int) -> Ends:
    """`share_difference_interval` of each pair of numbers."""
    found = [
        statistics.share_difference_interval(*one, rows) for one in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


PAIRED: dict[str, Callable[[Array, Array, int], Ends]] = {OURS: ours_pairs, "Tango": tango, "textbook": textbook_pairs}


def share_difference_coverage(rows: int) -> dict[str, tuple[Array, float]]:
    """The probability of each interval to cover at each point of the grid, and its mean width, by method."""
    first, second = (
        one[np.add(*np.indices((rows + 1,) * 2)) <= rows].astype(float) for one in np.indices((rows + 1,) * 2)
    )
    rest = rows - first - second
    ways = gammaln(rows + 1) - gammaln(first + 1) - gammaln(second + 1) - gammaln(rest + 1)
    ends = {name: method(first, second, rows) for name, method in PAIRED.items()}
    covered: dict[str, list[float]] = {name: [] for name in ends}
    widths: dict[str, list[float]] = {name: [] for name in ends}
    for p, q in ((p, q) for p in PROBABILITIES for q in PROBABILITIES if p + q < 0.95):
        weights = np.exp(ways + xlogy(first, p) + xlogy(second, q) + xlogy(rest, 1 - p - q))
        for name, (low, high) in ends.items():
            covered[name].append(float(weights @ ((low <= q - p) & (q - p <= high))))
            widths[name].append(float(weights @ (high - low)))
    return {name: (np.array(covered[name]), float(np.mean(widths[name]))) for name in ends}


def powers(population: Population, first: str, second: str, rows: int, draws: int, seed: int) -> dict[str, float]:
    """The share of samples in which two models are told apart, by test."""
    dice, found = np.random.default_rng((seed, rows)), dict[str, int]()
    tokens_of, (before, after) = population.tokens, (population.nats[one] for one in (first, second))
    matches = [population.matches[one] for one in (first, second)]
    for _ in range(draws):
        drawn = dice.integers(len(tokens_of), size=rows)
        tokens, one, other = tokens_of[drawn], before[drawn], after[drawn]
        paired = statistics.mean_ratio_interval(other - one, tokens)
        assert paired is not None
        error = math.hypot(*(statistics.mean_ratio_error(nats, tokens) for nats in (one, other)))
        once, again = (match[drawn] for match in matches)
        share, difference = float((once + again).mean() / 2), float((again - once).mean())
        only = int((once > again).sum()), int((again > once).sum())
        shares = statistics.share_difference_interval(*only, rows)
        told_apart = {
            "loss, paired": not paired.low <= 0 <= paired.high,
            "loss, unpaired": abs((other - one).sum() / tokens.sum()) > Z * error,
            "exact match, McNemar": statistics.mcnemar(*only) < 0.05,
            "exact match, paired interval": not shares.low <= 0 <= shares.high,
            "exact match, unpaired": abs(difference) > Z * math.sqrt(2 * share * (1 - share) / rows),
        }
        for name, told in told_apart.items():
            found[name] = found.get(name, 0) + told
    return {name: count / draws for name, count in found.items()}


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for line in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(map(str, line))} |")
    print(flush=True)


def percent(share: float) -> str:
    """One decimal."""
    return f"{100 * share:.1f}"


def wilson_table() -> Iterator[str]:
    """Print how well shares are covered; the missed bounds."""
    lines = []
    for rows in (20, 50, 200, 1000):
        covered = wilson_coverage(rows)
        lines.append([f"{rows:,}", *(f"{percent(one.mean())} ({percent(one.min())})" for one in covered.values())])
        if abs(covered[OURS].mean() - 0.95) > SHARE_BOUND:
            yield f"share, {rows} rows: {percent(covered[OURS].mean())} %"
    table(["rows", "Wilson: mean (least)", "textbook"], lines)


def loss_table(draws: int, seed: int, sizes: Sequence[int]) -> Iterator[str]:
    """Print how well losses and their differences are covered in samples of some sizes; the missed bounds."""
    lines, names = [], list[str]()
    for population in (recorded(), lognormal("lognormal", 0), lognormal("lognormal, lengths too", 1)):
        for figure, totals in population.figures().items():
            rest = totals - totals.sum() / population.tokens.sum() * population.tokens
            for rows in sizes:
                shares, wider = loss_coverage(population, totals, rows, draws, seed)
                names = [*shares]
                what = f"{population.name}: {figure} (skewness {skewness(rest):.1f})"
                lines.append([what, rows, *map(percent, shares.values()), f"{wider:.2f}"])
                if population.bounded and rows >= LOSS_BOUND_ROWS and abs(shares[OURS] - 0.95) > LOSS_BOUND:
                    yield f"{population.name}, {figure}, {rows} rows: {percent(shares[OURS])} %"
    table(["population", "rows", *names, "width / jackknife's"], lines)


def power_table(draws: int, seed: int) -> None:
    """Print how often two models are told apart, and whether `rows_needed` foretells it."""
    population, lines, foretold = recorded(), [], []
    tokens, count = population.tokens, len(population.tokens)
    for first, second in (("base", "long"), ("short", "long")):
        saved = population.nats[second] - population.nats[first]
        once, again = population.matches[first], population.matches[second]
        effects = {
            "loss, paired": (saved.sum() / tokens.sum(), statistics.mean_ratio_error(saved, tokens)),
            "exact match, paired interval": (
                (again - once).mean(),
                statistics.share_difference_error((once > again).sum(), (again > once).sum(), count),
            ),
        }
        found = {rows: powers(population, first, second, rows, draws, seed) for rows in (20, 50, 200)}
        lines += [[f"{first}, {second}", test, *(percent(one[test]) for one in found.values())] for test in found[20]]
        for test, (difference, error) in effects.items():
            rows = statistics.rows_needed(float(difference), error, count)
            assert rows is not None
            power = powers(population, first, second, rows, draws, seed)[test]
            foretold.append([f"{first}, {second}", test, f"{difference:.3f}", rows, percent(power)])
    table(["models", "test", "20 rows", "50 rows", "200 rows"], lines)
    table(["models", "test", "difference", "rows for 80 %", "told apart with so many, %"], foretold)


def share_difference_table() -> Iterator[str]:
    """Print how well differences of shares are covered; the missed bounds."""
    lines = []
    for rows in (20, 50, 200, 500):
        found = share_difference_coverage(rows)
        cells = (f"{percent(one.mean())} ({percent(one.min())}), {width:.3f}" for one, width in found.values())
        lines.append([rows, *cells])
        if rows >= LOSS_BOUND_ROWS and abs(found[OURS][0].mean() - 0.95) > SHARE_BOUND:
            yield f"difference of shares, {rows} rows: {percent(found[OURS][0].mean())} %"
    table(["rows", *(f"{name}: mean (least), width" for name in PAIRED)], lines)


def main() -> None:
    """Print all tables. Exits with 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description="Measure how often 95 % intervals cover the truth.")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 50, 200], help="of a sample, for losses")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = parser.parse_args()
    missed = list[str]()
    if "shares" in options.parts:
        missed += [*wilson_table(), *share_difference_table()]
    if "losses" in options.parts:
        missed += loss_table(options.draws, options.seed, options.rows)
    if "powers" in options.parts:
        power_table(options.draws, options.seed)
    if missed:
        sys.exit("\n".join(["bounds missed:", *missed]))


if __name__ == "__main__":
    main()
