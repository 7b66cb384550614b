"""Whether an adapter does better than its base: both losses of the same rows, compared in pairs.

A single mean tells little, as rows differ more from each other than the two models do. The difference of each row does
not have that spread, so few rows suffice: the 95 % interval of its mean, by Student's t, decides.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loratune import adapter, kernels, launched, trainer
from loratune.adapter import PeftModel, Start, Weights
from loratune.data import Prepared
from loratune.data.packing import Batches
from loratune.launched import Group

LEAST_JUDGED = 3
"""Rows below which no verdict is given."""
_LEAST, _MOST = 8, 64
"""Rows that are compared: at least, where there are so many, and at most."""
_SHARE = 32
"""Beyond the least, they hold at most this part of the tokens that were trained on. Two passes forward over it take
some 2 % of the time that training took."""
_LEAST_TOKENS, _MOST_TOKENS = 2048, 32_768
"""Bounds of that part."""
_SHOWN = 5e-5
"""Nats below which a difference is none: it would not show in the four decimals that losses are told with, and may be
rounding."""


@dataclass(frozen=True)
class Gain:
    """Losses of base and adapter on the same rows, in nats per learnt token, as means over rows.

    split: which rows, `validation` or `training`; rows: how many; difference: adapter less base, below 0 where the
    adapter is better; low, high: the 95 % interval of its mean; None where there are too few rows for one.
    """

    split: str
    rows: int
    base: float
    adapter: float
    difference: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Literal["gain", "no gain", "worse", "not judged"]:
        """`gain` or `worse` where the whole interval lies on one side of 0, by more than can be shown."""
        if not math.isfinite(self.adapter):
            return "worse"
        if self.low is None or self.high is None:
            return "not judged"
        apart = abs(self.difference) >= _SHOWN
        return "worse" if apart and self.low > 0 else "gain" if apart and self.high < 0 else "no gain"

    def __str__(self) -> str:
        """A line with the verdict and its figures."""
        rows = f"{self.rows:,} {self.split} row{'s' if self.rows != 1 else ''}"
        losses = f"loss {self.base:.4f} → {self.adapter:.4f}"
        if not math.isfinite(self.difference):
            return f"not judged: not all losses on {rows} are finite ({losses})"
        if self.low is None or self.high is None:
            return f"not judged: {rows} are too few to compare it with its base ({losses})"
        interval = f"95 % interval of the difference {self.low:.4f} to {self.high:.4f}"
        told = {"gain": f"{-self.difference:.4f} over the base", "no gain": "no gain over the base"}
        return f"{told.get(self.verdict, 'worse than the base')} on {rows} ({losses}; {interval})"

    def as_json(self) -> dict[str, Any]:
        """Plain values, the verdict among them."""
        return asdict(self) | {"verdict": self.verdict}


def measure(
    model: PeftModel, start: Start, trained: Weights, rows: Prepared, split: str, pad_id: int, budget: int, group: Group
) -> Gain:
    """Compare a trained adapter with its base on a sample of rows, a row at a time. All processes take a share.

    Args:
        model: The base with the adapter, as it was trained.
        start: The adapter before its first step.
        trained: Its tensors now, whole.
        rows: What the sample is drawn from; the same one for the same rows and budget.
        split: What to call these rows.
        pad_id: Of the tokenizer.
        budget: Tokens that the run was trained on.
        group: The processes of the run.
    """
    lengths = rows.rows.lengths
    batches = Batches(rows.rows, lengths, "none", 1, int(lengths.max()), pad_id)
    numbers = _sample(lengths, budget)

    def losses() -> list[trainer.Loss]:
        with kernels.fitted(model, adapter.linear, sharded=bool(launched.sharding())):
            return trainer.batch_losses(model, batches, numbers, group)

    tuned = losses()
    with adapter.as_begun(model, start, trained):
        plain = losses()
    pairs = [(one.mean, other.mean) for one, other in zip(plain, tuned, strict=True) if one.tokens]
    return compare(pairs, split)


def compare(pairs: Sequence[tuple[float, float]], split: str) -> Gain:
    """The gain that the losses of base and adapter, row by row, amount to."""
    differences = [tuned - plain for plain, tuned in pairs]
    base, tuned = (fmean(side) for side in zip(*pairs, strict=True))
    mean, rows = fmean(differences), len(pairs)
    if rows < LEAST_JUDGED or not math.isfinite(mean):
        return Gain(split, rows, base, tuned, mean, None, None)
    half = _quantile(rows - 1) * stdev(differences) / math.sqrt(rows)
    return Gain(split, rows, base, tuned, mean, mean - half, mean + half)


def _quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t, within 1 % from 2 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(degrees) ** power for power, term in enumerate(terms))


def _sample(lengths: NDArray[np.integer[Any]], budget: int) -> list[int]:
    """Numbers of the rows that are compared: few enough that it takes little time beside the training."""
    most = min(max(budget // _SHARE, _LEAST_TOKENS), _MOST_TOKENS)
    chosen: list[int] = []
    tokens = 0
    for number in np.random.default_rng(0).permutation(len(lengths))[:_MOST].tolist():
        tokens += int(lengths[number])
        if len(chosen) >= _LEAST and tokens > most:
            break
        chosen.append(number)
    return sorted(chosen)
