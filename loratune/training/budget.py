"""How many optimizer steps a time budget has room for: the arithmetic, from times that were measured.

The time of a batch is taken as `a + b * operations`, fitted to batches that were timed; operations are counted from the
lengths of its rows, padding included, see `duration`. So the tokens that each step will really read decide, in the
order in which the run reads them, and not a mean. What comes beside the steps is predicted in the same way.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARM_UP = 2
"""Batches that are computed before any is timed: the first ones also allocate, compile and fill caches."""
_LEAST_TIMED, _MOST_SECONDS, _SHARE = 6, 20.0, 0.03
"""Batches are timed until there are so many of them and until timing has taken this part of the budget, or so long."""
_MOST_EPOCHS, _MOST_STEPS = 100, 2**31 - 1
"""The steps of so many epochs are predicted one by one, and further epochs are taken to repeat them; and the most steps
that a run can have."""
FEWEST = 3
"""A budget without room for so many steps is refused, unless the epochs that are asked for have fewer."""


@dataclass(frozen=True)
class Speed:
    """The time of batches: `per_batch` seconds each, and `per_operation` seconds for each operation."""

    per_batch: float
    per_operation: float

    @classmethod
    def fitted(cls, operations: Sequence[float], seconds: Sequence[float]) -> "Speed":
        """The line through the mean of batches that were timed with the least squares of the differences.

        Where the slope or the intercept came out negative, as the times vary more than the batches, it is 0.
        """
        work, taken = np.asarray(operations, np.float64), np.asarray(seconds, np.float64)
        if not work.sum():
            return cls(float(taken.mean()), 0.0)
        proportional = cls(0.0, float(taken.sum() / work.sum()))
        deviations = work - work.mean()
        if not (spread := float(deviations @ deviations)):
            return proportional
        slope = float(deviations @ (taken - taken.mean())) / spread
        if slope <= 0:
            return cls(float(taken.mean()), 0.0)
        intercept = float(taken.mean() - slope * work.mean())
        return cls(intercept, slope) if intercept >= 0 else proportional

    def seconds(self, batches: float, operations: float) -> float:
        """How long so many batches with so many operations in all take."""
        return self.per_batch * batches + self.per_operation * operations


def is_timed_enough(batches: int, elapsed: float, left: float) -> bool:
    """Whether enough batches were timed.

    Args:
        batches: How many, those of the warm-up included.
        elapsed: Seconds since the first one began.
        left: Seconds of the budget when it began.
    """
    return elapsed >= left or (batches >= WARM_UP + _LEAST_TIMED and elapsed >= min(_SHARE * left, _MOST_SECONDS))


def step_seconds(
    micro_steps: Iterator[NDArray[np.float64]], speed: Speed, optimizer: float, accumulation: int
) -> Iterator[NDArray[np.float64]]:
    """For each epoch, (steps,), the seconds of its optimizer steps.

    Args:
        micro_steps: For each epoch, the operations of its micro-steps.
        speed: That of micro-steps.
        optimizer: Seconds of the optimizer in each step.
        accumulation: Micro-steps of a step; the last step of an epoch may have fewer.
    """
    for operations in micro_steps:
        taken = speed.per_batch + speed.per_operation * operations
        yield np.add.reduceat(taken, np.arange(0, len(taken), accumulation)) + optimizer


@dataclass(frozen=True)
class StepBudget:
    """What a budget has room for.

    Attributes:
        steps: Optimizer steps.
        taken: Seconds that they take.
        beside: Seconds that come beside them: evaluations, checkpoints, and what follows the last step.
        fewest: Seconds from the first step on that the shortest run which is not refused takes.
        limited: Whether there would be time for more steps than the epochs have.
    """

    steps: int
    taken: float
    beside: float
    fewest: float
    limited: bool


def step_budget(
    left: float, steps: Iterator[NDArray[np.float64]], beside: Callable[[int], float], most: int
) -> StepBudget:
    """How many steps there is time for.

    Args:
        left: Seconds that are left.
        steps: For each epoch, the seconds of its steps.
        beside: From a number of steps to the seconds that come beside them, which must not fall by much as it rises.
        most: Steps at most.
    """
    least, bound = min(FEWEST, most), min(most, _MOST_STEPS)
    parts: list[NDArray[np.float64]] = []
    known, total = 0, 0.0
    while known < least or (total <= left and known <= bound and len(parts) < _MOST_EPOCHS):
        parts.append(next(steps))
        known, total = known + len(parts[-1]), total + float(parts[-1].sum())
    ends = np.cumsum(np.concatenate(([0.0], *parts)))

    def taken(number: int) -> float:
        rounds, rest = divmod(number, known)
        return rounds * float(ends[-1]) + float(ends[rest])

    def until(number: int) -> float:
        return taken(number) + beside(number) if number else 0.0

    found = bisect_right(range(1, bound + 1), left, key=until)
    return StepBudget(found, taken(found), beside(found) if found else 0.0, until(least), found == most)
