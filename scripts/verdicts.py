"""How often the verdict of a run is wrongly `better than its base` or `beats base and majority`, by simulation.

    python scripts/verdicts.py [--runs 2000]

Each simulated adapter is exactly as good as its base, and as always giving the most frequent answer: the margin of a
row, by which its right answer is ahead, is a stationary process over the steps, with the base as its first value, so
its loss and its share of right answers have the same expectation at every step. The step with the lowest loss is
kept, and judged as `training.comparisons` does: by the other half of the rows from 40 on, or by the same rows. Labels
are also judged beside a base that knows none of them: better than it is right then, and only *beats* is wrong.
"""

import argparse
import itertools
from collections import Counter

import numpy as np

from loratune.compare.losses import LossComparison
from loratune.compare.metrics import RowLosses
from loratune.compare.verdict import Answers, Name, decide_verdict
from loratune.training.comparisons import LEAST_TO_JUDGE

ROWS = (8, 24, 39, 60, 200)
"""Validation rows."""
STEPS = (1, 5, 20)
"""Evaluations; the step of the one with the lowest loss is kept."""
AGAIN = (0.5, 0.95)
"""Correlation of a row's margins at two evaluations that follow each other."""
HEAVY = 1.5
"""How heavy the tails of margins are: they are the hyperbolic sine of a multiple of a normal variable."""
SKEW = 1.0
"""Deviation of the logarithm of the tokens of a row."""


def verdict_of(rows: int, steps: int, again: float, seed: int, *, labels: bool, knows: bool = True) -> Name:
    """The verdict on one run. labels: whether answers are labels, otherwise texts. knows: whether the base is as good
    as the majority; otherwise none of its labels is right, as for a base that does not know them."""
    dice = np.random.default_rng((seed, rows, steps, int(100 * again), labels))
    states = [dice.standard_normal(rows)]
    for _ in range(steps):
        states.append(again * states[-1] + np.sqrt(1 - again**2) * dice.standard_normal(rows))
    margins = [np.sinh(HEAVY * one) for one in states]
    tokens = np.ones(rows) if labels else np.exp(SKEW * dice.standard_normal(rows)).clip(0.05) * 20
    nats = [tokens * np.logaddexp(0, -one) for one in margins]
    apart = rows >= LEAST_TO_JUDGE and steps > 1
    half = dice.permutation(rows)
    choose, judge = (half[: rows // 2], half[rows // 2 :]) if apart else (half, half)
    kept = min(range(1, steps + 1), key=lambda step: nats[step][choose].sum() / tokens[choose].sum())
    base, adapter = (RowLosses.of(nats[step][judge].tolist(), tokens[judge].tolist()) for step in (0, kept))
    answers, looks = None, 1 if apart else steps
    if labels:
        first, second = ((margins[step][judge] > 0).astype(float) for step in (0, kept))
        first *= knows
        constant = (dice.random(len(judge)) < 0.5).astype(float)
        answers = Answers.of(first, second, np.ones(len(judge)), ("label", constant), looks)
    return decide_verdict(LossComparison.of(base, adapter, "validation"), answers, looks=looks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    runs = parser.parse_args().runs
    print("| answers | rows | evaluations | correlation | better | beats | wrong |\n|---|---|---|---|---|---|---|")
    for labels, rows, steps, again in itertools.product((True, False), ROWS, STEPS, AGAIN):
        found = Counter(verdict_of(rows, steps, again, seed, labels=labels) for seed in range(runs))
        better, beats = (found[name] / runs for name in ("better than its base", "beats base and majority"))
        kind = "labels" if labels else "texts"
        cells = f"{kind} | {rows} | {steps} | {again} | {better:.1%} | {beats:.1%} | {better + beats:.1%}"
        print(f"| {cells} |", flush=True)
        if labels:  # here *better* is right, and only *beats* is wrong
            unknown = (verdict_of(rows, steps, again, seed, labels=True, knows=False) for seed in range(runs))
            wrong = sum(name == "beats base and majority" for name in unknown) / runs
            print(f"| labels that the base does not know | {rows} | {steps} | {again} | | {wrong:.1%} | {wrong:.1%} |")


if __name__ == "__main__":
    main()
