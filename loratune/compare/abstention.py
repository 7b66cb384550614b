"""From which probability on a classifier's answers are right as often as is asked for, with a guarantee.

Thresholds are tested in a fixed order, from stricter to looser ones, until one fails: fixed-sequence testing with
several starts, each with its share of the risk (Angelopoulos et al., arXiv 2110.01052, section 3.2). The test is the
exact binomial p-value of the answered rows. The starts are where a quarter, a half, three quarters and all of the rows
are answered, or with few rows where enough are to hold at all. That depends on how many rows are answered, and not on
whether the answers are right: so the threshold that is taken is wrong with a probability of at most 5 %. Each distinct
row counts once.
"""

import math
from dataclasses import dataclass
from typing import Any

from scipy.special import bdtrc

from loratune.compare.metrics import Values

_RISK = 0.05
"""The probability with which fewer answers may be right than is promised."""
THRESHOLDS = (*(1 - 10 ** (-step / 8) for step in range(48, 2, -1)), 0.4, 0.3, 0.2, 0.1, 0.0)
"""From 0.999999 to 0."""
_STARTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of answered rows at which a sequence of tests begins."""
_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Abstention:
    """A threshold for `abstain_below`, chosen on rows.

    Attributes:
        accuracy: The share of answers that is to be right.
        threshold: Answers of at least this probability are given; None if no threshold holds.
        answered: The share of the rows that is answered by it, or else by the threshold that comes closest.
        right: The share of those answers that is right.
        rows: The number of distinct rows.
        rows_needed: About how many rows would be enough if they are like these; None if a threshold holds, or if no
            number would.
    """

    accuracy: float
    threshold: float | None
    answered: float
    right: float
    rows: int
    rows_needed: int | None = None

    @classmethod
    def choose(cls, probability: Values, right: Values, accuracy: float) -> "Abstention":
        """Choose the threshold that answers the most rows.

        Args:
            probability: (rows,) of the label that is given.
            right: (rows,) whether it is the expected one.
            accuracy: The share of answers that is to be right, above 0 and below 1.
        """
        total, risk = len(right), _RISK / len(_STARTS)
        starts: tuple[float, ...] = _STARTS
        if total < 2 * _least(risk, accuracy):
            starts, risk = (0.0,), _RISK
        counts = [(threshold, probability >= threshold) for threshold in THRESHOLDS]
        tested = [(threshold, int(mask.sum()), int(right[mask].sum())) for threshold, mask in counts if mask.any()]
        held: tuple[float, int, int] | None = None
        for start in starts:
            for one in tested:
                if one[1] < max(_least(risk, accuracy), start * total):
                    continue
                if _p(one[2], one[1], accuracy) > risk:
                    break
                held = one if held is None or one[1] >= held[1] else held
        if held is not None:
            return cls(accuracy, held[0], held[1] / total, held[2] / held[1], total)
        needed = [(_answers_needed(hits / answers, accuracy, risk) * total / answers, answers, hits)
                  for _, answers, hits in tested]  # fmt: skip
        rows, answers, hits = min(needed, default=(math.inf, 0, 0))
        most = math.ceil(rows) if total < rows <= _MOST_ROWS else None
        return cls(accuracy, None, answers / max(1, total), hits / max(1, answers), total, most)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dict(vars(self))


def _p(hits: int, answers: int, accuracy: float) -> float:
    """The probability of at least so many right answers, if each is right with a probability of `accuracy`."""
    return float(bdtrc(hits - 1, answers, accuracy)) if hits else 1.0


def _least(risk: float, accuracy: float) -> int:
    """The fewest answers that hold if all of them are right."""
    return math.ceil(math.log(risk) / math.log(accuracy))


def _answers_needed(right: float, accuracy: float, risk: float) -> float:
    """The least number of answers that would hold if this share of them is right; inf if none does."""
    if right <= accuracy:
        return math.inf
    low, high = 1, 2
    while _p(math.floor(right * high), high, accuracy) > risk:
        low, high = high, 2 * high
        if high > _MOST_ROWS:
            return math.inf
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _p(math.floor(right * middle), middle, accuracy) <= risk else (middle, high)
    return float(high)
