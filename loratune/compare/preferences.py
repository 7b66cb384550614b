"""Metrics of preferences: how often the chosen answer is preferred, and how probabilities changed.

- `reward_accuracy`: the share of pairs whose chosen answer has the higher reward, of equal ones half; or of unpaired
  preferences whose reward is on the right side of KTO's border, which is beta times its estimate of the divergence.
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
from torch import Tensor

from loratune import statistics
from loratune.compare.metrics import (
    LOG_PROBABILITY,
    PREFERRED_LENGTH,
    RANKING_ACCURACY,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    sides,
)
from loratune.compare.objectives import AnswerScores, Formula
from loratune.data.rendering import CHOSEN
from loratune.statistics import Interval, finite
from loratune.text import plural

Values = NDArray[np.float64]

SATURATED = 4.6
"""A margin from which on a pair has less than a hundredth of its whole gradient: sigmoid(-4.6) = 0.01."""
_MOST_SATURATED = 0.9
"""The share of saturated pairs from which on that is reported."""


@dataclass(frozen=True)
class Side:
    """The answers on one side; arrays (answers,).

    Attributes:
        tokens: Their supervised tokens.
        before: Their log-probabilities in the reference, or the base.
        after: Those of the model that is measured.
        rewards: Their rewards.
    """

    tokens: Values
    before: Values
    after: Values
    rewards: Values

    def as_json(self) -> dict[str, Any]:
        """The means: of tokens, log-probabilities and their change, with the interval of the change."""
        change = _measured(self.after - self.before)
        return {
            "answers": len(self.after),
            "tokens": _mean(self.tokens),
            "log_probability_before": _mean(self.before),
            "log_probability": _mean(self.after),
            "change": change.value,
            "change_interval": finite(change.interval),
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
        return {"value": self.value, "interval": finite(self.interval)}


@dataclass(frozen=True)
class PreferenceMetrics:
    """Metrics over pairs, or over unpaired preferences.

    Attributes:
        split: The name of the rows.
        paired: Whether they are pairs.
        good: The chosen answers, or the desirable ones.
        bad: The rejected ones, or the undesirable ones.
        border: The reward from which on an answer of unpaired preferences counts as desirable.
    """

    split: str
    paired: bool
    good: Side
    bad: Side
    border: float = 0.0

    @classmethod
    def of(
        cls, split: str, formula: Formula, answers: AnswerScores, signs: Tensor, estimate: float
    ) -> "PreferenceMetrics":
        """From what a model gives to answers.

        signs: (answers,), see `TokenizedRow.side`. estimate: see `divergence`.
        """
        columns = answers.tokens, answers.reference, answers.log_probabilities, formula.rewards(answers)
        good, bad = (Side(*(one[which].double().cpu().numpy() for one in columns)) for which in (signs > 0, signs < 0))
        paired = bool(len(signs)) and abs(int(signs[0])) == CHOSEN
        return cls(split, paired, good, bad, formula.beta * estimate)

    def by_item(self) -> dict[str, tuple[slice, Values]]:
        """Metric → which pairs, or which of the desirable answers and then the undesirable ones, it is a mean over, and
        what each of them adds. The margin of unpaired preferences is a sum of two means, one of them of undesirable
        rewards with the other sign."""
        good, bad, every, first = self.good, self.bad, slice(None), slice(len(self.good.after))
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
        has_margin = len(good.after) and len(bad.after)
        margin = {REWARD_MARGIN: (every, np.concatenate([good.rewards, -bad.rewards]))} if has_margin else {}
        others = {names[0]: (first, good.after), names[1]: (slice(first.stop, None), bad.after)}
        return {REWARD_ACCURACY: (every, right), **margin, **others}

    def before(self) -> "PreferenceMetrics":
        """The same of the reference, whose rewards are not known."""
        good, bad = (
            replace(one, after=one.before, rewards=np.zeros_like(one.rewards)) for one in (self.good, self.bad)
        )
        return PreferenceMetrics(self.split, self.paired, good, bad)

    def share(self, metric: str) -> PreferenceMetric:
        """One of the accuracies."""
        right = self.by_item()[metric][1]
        interval = statistics.wilson(float(right.sum()), len(right)) if len(right) else None
        return PreferenceMetric(_mean(right), interval)

    @property
    def accuracy(self) -> PreferenceMetric:
        """`reward_accuracy`."""
        return self.share(REWARD_ACCURACY)

    @property
    def margin(self) -> PreferenceMetric:
        """`reward_margin`."""
        good, bad = self.good.rewards, self.bad.rewards
        return _measured(good - bad) if self.paired else _measured(good, -bad)

    @property
    def preferred_length(self) -> float:
        """`preferred_length`; of pairs."""
        return _mean(self.by_item()[PREFERRED_LENGTH][1])

    @property
    def names(self) -> tuple[str, str]:
        """What the two sides are called."""
        return sides(paired=self.paired)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Labels and texts for the end of a run."""
        count = len(self.good.tokens) if self.paired else len(self.good.tokens) + len(self.bad.tokens)
        rows = plural(count, f"{self.split} {'pair' if self.paired else 'answer'}")
        yield "reward accuracy", f"{self.accuracy} on {rows}, margin {self.margin}"
        before = self.before()
        if self.paired:
            what = "of the pairs have the chosen answer as the more probable one"
            first, last = (one.share(RANKING_ACCURACY) for one in (before, self))
            yield "ranking accuracy", f"{first.value:.3f} → {last} {what}"
        parts = [
            f"{name} {_mean(side.before):.2f} → {_mean(side.after):.2f}"
            for name, side in zip(self.names, (self.good, self.bad), strict=True)
            if len(side.after)
        ]
        yield "log-probability", f"{', '.join(parts)} nats an answer"
        if self.paired:
            lengths = f"{before.preferred_length:.1f} → {self.preferred_length:.1f} tokens of the more probable answers"
            yield "length", f"{lengths} (chosen {_mean(self.good.tokens):.1f}, rejected {_mean(self.bad.tokens):.1f})"

    def warnings(self) -> Iterator[str]:
        """What may not be intended."""
        if not self.paired:
            return
        change, margins = _measured(self.good.after - self.good.before), self.good.rewards - self.bad.rewards
        if change.interval and change.interval.high < 0 and _mean(margins) > 0:
            yield (
                f"chosen answers became less likely, by {-change.value:.2f} nats in the mean, while the margin grew: "
                "rejected ones only fell further; preferences.sft_weight holds them up"
            )
        saturated = _mean(margins > SATURATED)
        if saturated > _MOST_SATURATED:
            yield (
                f"{saturated:.0%} of the pairs have a margin above {SATURATED}, and teach next to nothing any more: "
                "fewer steps, a lower training.learning_rate or a lower preferences.beta would do"
            )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        metrics: dict[str, Any] = {"split": self.split, REWARD_ACCURACY: self.accuracy.as_json()}
        metrics |= {REWARD_MARGIN: self.margin.as_json()}
        metrics |= {name: side.as_json() for name, side in zip(self.names, (self.good, self.bad), strict=True)}
        for name, one in (("before", self.before()), ("after", self)) if self.paired else ():
            metrics[f"{RANKING_ACCURACY}_{name}"] = one.share(RANKING_ACCURACY).as_json()
            metrics[f"{PREFERRED_LENGTH}_{name}"] = one.preferred_length
        return metrics


def _higher(difference: Values) -> Values:
    return np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _measured(*groups: Values) -> PreferenceMetric:
    """The sum of the means of groups, with its interval."""
    interval = statistics.sum_of_ratios_interval([(values, np.ones_like(values)) for values in groups])
    return PreferenceMetric(sum(map(_mean, groups)), interval)
