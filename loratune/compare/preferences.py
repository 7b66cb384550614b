"""Metrics of preferences: how often the chosen answer is preferred, and how probabilities changed.

- `reward_accuracy`: the share of pairs whose chosen answer has the higher reward, of equal ones half; or of judged
  answers whose reward is on the right side of KTO's border, which is beta times its estimate of the divergence.
- `reward_margin`: by how much rewards of chosen answers are higher than those of rejected ones, in the mean; or those
  of desirable answers than those of undesirable ones.
- `ranking_accuracy`: the share of pairs whose chosen answer is the more probable one (Chen et al. 2024,
  arXiv:2405.19534), whatever the reference says.
- `chosen_log_probability`, and the same of the other sides: summed over an answer, in the mean over answers.
- `preferred_length`: the mean tokens of the more probable answer of each pair.

Shares have Wilson's interval, means that of the delete-one jackknife; a pair is one draw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.statistics import Interval

Values = NDArray[np.float64]

REWARD_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY = "reward_accuracy", "reward_margin", "ranking_accuracy"
LOG_PROBABILITY, PREFERRED_LENGTH = "log_probability", "preferred_length"
SIDES = CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE = "chosen", "rejected", "desirable", "undesirable"
SATURATED = 4.6
"""A margin from which on a pair has less than a hundredth of its whole gradient: sigmoid(-4.6) = 0.01."""
_MOST_SATURATED = 0.9
"""The share of saturated pairs from which on that is said."""


def names_of_sides(*, paired: bool) -> tuple[str, str]:
    """What answers are called that are better, and those that are worse: of pairs, or of unpaired answers."""
    return (CHOSEN, REJECTED) if paired else (DESIRABLE, UNDESIRABLE)


def metrics_of(*, paired: bool) -> tuple[str, ...]:
    """The names of the metrics of pairs, or of unpaired answers."""
    sides = [f"{side}_{LOG_PROBABILITY}" for side in names_of_sides(paired=paired)]
    if paired:
        return REWARD_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY, *sides, PREFERRED_LENGTH
    return REWARD_ACCURACY, REWARD_MARGIN, *sides


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
class PreferenceMetric:
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
class PreferenceMetrics:
    """Metrics over pairs, or over answers that are good or bad.

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

    def by_item(self) -> dict[str, tuple[slice, Values]]:
        """Metric → which pairs, or which of the good answers and then the bad ones, it is a mean over, and what each of
        them adds. The margin of unpaired answers is a sum of two means, one of them of bad rewards with the other sign.
        """
        good, bad, every = self.good, self.bad, slice(None)
        names = [f"{name}_{LOG_PROBABILITY}" for name in self.names]
        if self.paired:
            return {
                REWARD_ACCURACY: (every, _higher(good.rewards - bad.rewards)),
                REWARD_MARGIN: (every, good.rewards - bad.rewards),
                RANKING_ACCURACY: (every, _higher(good.after - bad.after)),
                names[0]: (every, good.after),
                names[1]: (every, bad.after),
                PREFERRED_LENGTH: (every, np.where(good.after >= bad.after, good.tokens, bad.tokens)),
            }
        right = np.concatenate([_higher(good.rewards - self.border), _higher(self.border - bad.rewards)])
        count, sides = len(good.after), {}
        if len(good.after) and len(bad.after):
            sides[REWARD_MARGIN] = every, np.concatenate([good.rewards, -bad.rewards])
        return {
            REWARD_ACCURACY: (every, right),
            **sides,
            names[0]: (slice(count), good.after),
            names[1]: (slice(count, None), bad.after),
        }

    def before(self) -> "PreferenceMetrics":
        """The same of the reference, whose rewards are not known."""
        good, bad = (
            replace(side, after=side.before, rewards=np.zeros(len(side.rewards))) for side in (self.good, self.bad)
        )
        return PreferenceMetrics(self.split, self.paired, good, bad)

    @property
    def accuracy(self) -> PreferenceMetric:
        """`reward_accuracy`."""
        return _share(self.by_item()[REWARD_ACCURACY][1])

    @property
    def margin(self) -> PreferenceMetric:
        """`reward_margin`."""
        sides = (self.good.rewards - self.bad.rewards,) if self.paired else (self.good.rewards, -self.bad.rewards)
        interval = statistics.sum_of_ratios_interval([(values, np.ones_like(values)) for values in sides])
        return PreferenceMetric(sum(map(_mean, sides)), interval)

    @property
    def ranking_accuracy(self) -> PreferenceMetric:
        """`ranking_accuracy`; of pairs."""
        return _share(self.by_item()[RANKING_ACCURACY][1])

    @property
    def preferred_length(self) -> float:
        """`preferred_length`; of pairs."""
        return _mean(self.by_item()[PREFERRED_LENGTH][1])

    @property
    def names(self) -> tuple[str, str]:
        """What the two sides are called."""
        return names_of_sides(paired=self.paired)

    @property
    def rows(self) -> str:
        """`200 validation pairs`."""
        count = len(self.good.tokens) if self.paired else len(self.good.tokens) + len(self.bad.tokens)
        return f"{count:,} {self.split} {'pair' if self.paired else 'answer'}{'' if count == 1 else 's'}"

    def lines(self) -> Iterator[tuple[str, str]]:
        """Labels and texts for the end of a run."""
        yield "reward accuracy", f"{self.accuracy} on {self.rows}, margin {self.margin}"
        before = self.before()
        if self.paired:
            what = "of the pairs have the chosen answer as the more probable one"
            yield "ranking accuracy", f"{before.ranking_accuracy.value:.3f} → {self.ranking_accuracy} {what}"
        parts = []
        for name, side in zip(self.names, (self.good, self.bad), strict=True):
            if len(side.after):
                parts.append(f"{name} {_mean(side.before):.2f} → {_mean(side.after):.2f}")
        yield "log-probability", f"{', '.join(parts)} nats an answer"
        if self.paired:
            lengths = f"{before.preferred_length:.1f} → {self.preferred_length:.1f} tokens of the more probable answers"
            yield "length", f"{lengths} (chosen {_mean(self.good.tokens):.1f}, rejected {_mean(self.bad.tokens):.1f})"

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
        metrics: dict[str, Any] = {
            "split": self.split,
            REWARD_ACCURACY: self.accuracy.as_json(),
            REWARD_MARGIN: self.margin.as_json(),
            self.names[0]: self.good.as_json(),
            self.names[1]: self.bad.as_json(),
        }
        if self.paired:
            for name, one in (("before", self.before()), ("after", self)):
                metrics[f"{RANKING_ACCURACY}_{name}"] = one.ranking_accuracy.as_json()
                metrics[f"{PREFERRED_LENGTH}_{name}"] = one.preferred_length
        return metrics


def _higher(difference: Values) -> Values:
    return np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))


def _share(right: Values) -> PreferenceMetric:
    if not len(right):
        return PreferenceMetric(0.0, None)
    return PreferenceMetric(_mean(right), statistics.wilson(float(right.sum()), len(right)))


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else 0.0


def _interval(values: Values) -> Interval | None:
    return statistics.jackknife_interval(values, np.ones_like(values))


def _json(interval: Interval | None) -> list[float] | None:
    return interval.as_json() if interval else None
