"""What is said of answers that are compared: how often the right one is preferred, and at what cost in probability.

Shares have Wilson's interval, means that of the delete-one jackknife; a pair is one draw.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.statistics import Interval

Values = NDArray[np.float64]

SATURATED = 4.6
"""A margin from which on a pair has less than a hundredth of its whole gradient: sigmoid(-4.6) = 0.01."""
_MOST_SATURATED = 0.9
"""The share of saturated pairs from which on that is said."""


@dataclass(frozen=True)
class Side:
    """The answers on one side.

    Attributes:
        tokens: (answers,), their supervised tokens.
        before: (answers,), their log-probabilities in the reference, or the base.
        after: (answers,), those of the model that is looked at.
        rewards: (answers,), their rewards.
    """

    tokens: Values
    before: Values
    after: Values
    rewards: Values

    def as_json(self) -> dict[str, Any]:
        """The means: of tokens, log-probabilities and their change, with the interval of the change."""
        change = self.after - self.before
        return {
            "answers": len(change),
            "tokens": _mean(self.tokens),
            "log_probability_before": _mean(self.before),
            "log_probability": _mean(self.after),
            "change": _mean(change),
            "change_interval": _json(_interval(change)),
        }


@dataclass(frozen=True)
class Figure:
    """A share or a mean, with its interval; None where there are too few answers for one."""

    value: float
    interval: Interval | None

    def __str__(self) -> str:
        """`0.712 (95 % interval 0.655 to 0.763)`."""
        ends = f" (95 % interval {self.interval.low:.3f} to {self.interval.high:.3f})" if self.interval else ""
        return f"{self.value:.3f}{ends}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "interval": _json(self.interval)}


@dataclass(frozen=True)
class PreferenceFigures:
    """Figures over pairs, or over answers that are good or bad.

    Attributes:
        split: The name of the rows.
        paired: Whether they are pairs.
        good: The chosen answers, or the desirable ones.
        bad: The rejected ones, or the undesirable ones.
        border: The reward from which on an answer counts as taken for a good one, where they are no pairs.
    """

    split: str
    paired: bool
    good: Side
    bad: Side
    border: float = 0.0

    @property
    def accuracy(self) -> Figure:
        """The share of pairs whose chosen answer has the higher reward; or of answers that are on the right side of the
        border. Of equal rewards, as before the first step, half count."""
        if self.paired:
            right = _higher(self.good.rewards - self.bad.rewards)
        else:
            right = np.concatenate([_higher(self.good.rewards - self.border), _higher(self.border - self.bad.rewards)])
        return _share(right)

    @property
    def margin(self) -> Figure:
        """How much higher the rewards of good answers are, in the mean."""
        if self.paired:
            margins = self.good.rewards - self.bad.rewards
            return Figure(_mean(margins), _interval(margins))
        return Figure(_mean(self.good.rewards) - _mean(self.bad.rewards), None)

    def ordered(self, *, before: bool) -> Figure:
        """The share of pairs whose chosen answer has the higher log-probability. before: in the reference."""
        good, bad = (side.before if before else side.after for side in (self.good, self.bad))
        return _share(_higher(good - bad))

    def preferred_length(self, *, before: bool) -> float:
        """The mean tokens of the answer of each pair that has the higher log-probability. before: in the reference."""
        good, bad = (side.before if before else side.after for side in (self.good, self.bad))
        return _mean(np.where(good >= bad, self.good.tokens, self.bad.tokens))

    @property
    def names(self) -> tuple[str, str]:
        """What the two sides are called."""
        return ("chosen", "rejected") if self.paired else ("desirable", "undesirable")

    @property
    def rows(self) -> str:
        """`200 validation pairs`."""
        count = len(self.good.tokens) if self.paired else len(self.good.tokens) + len(self.bad.tokens)
        return f"{count:,} {self.split} {'pair' if self.paired else 'answer'}{'' if count == 1 else 's'}"

    def lines(self) -> Iterator[tuple[str, str]]:
        """Labels and texts for the end of a run."""
        what = "pairs in order" if self.paired else "answers on their side"
        yield "preferences", f"{what}, by rewards: {self.accuracy} of {self.rows}; margin {self.margin}"
        if self.paired:
            before, after = self.ordered(before=True), self.ordered(before=False)
            yield "in order", f"by log-probabilities {before.value:.3f} before, {after}"
        parts = []
        for name, side in zip(self.names, (self.good, self.bad), strict=True):
            if len(side.after):
                parts.append(f"{name} {_mean(side.before):.2f} → {_mean(side.after):.2f}")
        yield "log-probability", ", ".join(parts)
        if self.paired:
            lengths = f"preferred answers have {self.preferred_length(before=True):.1f} tokens before, "
            lengths += f"{self.preferred_length(before=False):.1f} after (chosen {_mean(self.good.tokens):.1f}, "
            yield "length", f"{lengths}rejected {_mean(self.bad.tokens):.1f})"

    def warnings(self) -> Iterator[str]:
        """What may not be intended."""
        if not self.paired:
            return
        change, margins = self.good.after - self.good.before, self.good.rewards - self.bad.rewards
        interval = _interval(change)
        if interval and interval.high < 0 and _mean(margins) > 0:
            yield (
                f"chosen answers became less likely, by {-_mean(change):.2f} nats in the mean, while the margin grew: "
                "rejected ones only fell further; preferences.sft_weight holds them up"
            )
        saturated = float((margins > SATURATED).mean()) if len(margins) else 0.0
        if saturated > _MOST_SATURATED:
            yield (
                f"{saturated:.0%} of the pairs have a margin above {SATURATED}, and teach next to nothing any more: "
                "fewer steps, a lower training.learning_rate or a lower preferences.beta would do"
            )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        figures: dict[str, Any] = {
            "split": self.split,
            "reward_accuracy": self.accuracy.as_json(),
            "reward_margin": self.margin.as_json(),
            self.names[0]: self.good.as_json(),
            self.names[1]: self.bad.as_json(),
        }
        if self.paired:
            for name, before in (("before", True), ("after", False)):
                figures[f"ordered_{name}"] = self.ordered(before=before).as_json()
                figures[f"preferred_length_{name}"] = self.preferred_length(before=before)
        return figures


def _higher(difference: Values) -> Values:
    return np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))


def _share(right: Values) -> Figure:
    if not len(right):
        return Figure(0.0, None)
    return Figure(_mean(right), statistics.wilson(float(right.sum()), len(right)))


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else 0.0


def _interval(values: Values) -> Interval | None:
    return statistics.jackknife_interval(values, np.ones_like(values))


def _json(interval: Interval | None) -> list[float] | None:
    return interval.as_json() if interval else None
