"""The losses of preference objectives, as functions of the summed log-probabilities of answers, and their metrics.

y is an answer to the prompt x, y_w the chosen answer of a pair and y_l the rejected one, |y| the tokens of an answer,
p(y|x) its probability under the trained model, and ref(y|x) its probability under the reference. Each objective defines
a loss for every pair or answer; training minimizes the mean over an optimizer step.

- `dpo` (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid(r(y_w) - r(y_l)), r(y) = beta log(p(y|x) / ref(y|x)).
  With label smoothing e: -(1 - e) log sigmoid(m) - e log sigmoid(-m), the conservative DPO of Mitchell 2023
  (ericmitchell.ai/cdpo.pdf), of the margin m = r(y_w) - r(y_l).
- `simpo` (Meng et al. 2024, arXiv:2405.14734): the same with r(y) = beta log p(y|x) / |y|, and m - simpo_gamma instead
  of m; there is no reference.
- `orpo` (Hong et al. 2024, arXiv:2403.07691): -a(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), where a(y) =
  log p(y|x) / |y| and odds = q / (1 - q) with q = exp a(y); there is no reference. The first term is the mean over the
  tokens of each answer; TRL includes the prompt, and averages over all tokens of a batch.
- `kto` (Ethayarajh et al. 2024, arXiv:2402.01306): desirable_weight (1 - sigmoid(r(y) - z)) for a desirable answer, and
  undesirable_weight (1 - sigmoid(z - r(y))) for an undesirable one, with DPO's r. z is beta times the KL divergence of
  p from ref, estimated as the mean of log(p(y'|x) / ref(y'|x)) over prompts with mismatched answers, clipped at 0; no
  gradient flows through it.

With `sft_weight`, `dpo` and `simpo` add the term -sft_weight a(y_w) (Pang et al. 2024, arXiv:2404.19733).

The metrics:
- `reward_accuracy`: the fraction of pairs whose chosen answer has the higher reward, ties counting half; or of unpaired
  preferences whose reward is on the right side of KTO's border, which is beta times its estimate of the divergence.
- `reward_margin`: the mean reward of chosen answers minus the mean reward of rejected ones; or the same of desirable
  and undesirable answers.
- `ranking_accuracy`: the fraction of pairs whose chosen answer is the more probable one (Chen et al. 2024,
  arXiv:2405.19534), regardless of the reference.
- `chosen_log_probability`, and the same for the other sides: the mean over answers of their summed log-probabilities.
- `preferred_length`: the mean tokens of the more probable answer of each pair.

Fractions have Wilson's interval, means the interval of `metrics.sum_interval`; a pair is one draw.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from loratune import kernels, statistics
from loratune.compare.metrics import (
    LOG_PROBABILITY,
    PREFERRED_LENGTH,
    RANKING_ACCURACY,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    Values,
    sides,
    sum_interval,
)
from loratune.config import DEFAULT_BETA, PREFERENCE_KEYS, PreferenceSection
from loratune.data.rendering.spans import CHOSEN
from loratune.statistics import Interval, finite
from loratune.text import plural

WITH_REFERENCE = ("dpo", "kto")
"""The objectives that use a reference model."""
SATURATED = 4.6
"""The margin above which the gradient of a pair is below a hundredth of its maximum: sigmoid(-4.6) = 0.01."""
_MOST_SATURATED = 0.9
"""The fraction of saturated pairs above which a warning is reported."""


@dataclass(frozen=True)
class AnswerScores:
    """Log-probabilities of answers under a model and the reference.

    Attributes:
        log_probabilities: (answers,), float64, summed over their tokens.
        tokens: (answers,), their supervised tokens.
        reference: (answers,), float64, log-probabilities under the reference; zeros if the objective has none.
    """

    log_probabilities: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def per_token(self) -> Tensor:
        """(answers,), the mean log-probability of their tokens; 0 for an answer without tokens."""
        return self.log_probabilities / self.tokens.clamp(min=1)

    def take(self, which: Tensor) -> "AnswerScores":
        """Some of the answers."""
        return AnswerScores(self.log_probabilities[which], self.tokens[which], self.reference[which])


@dataclass(frozen=True)
class Formula:
    """An objective with the parameters of `PreferenceSection`; a null `beta` is replaced by its default."""

    name: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @classmethod
    def of(cls, name: str, section: PreferenceSection) -> "Formula":
        """The formula of an objective, with the parameters of a section."""
        numbers = section.model_dump()
        return cls(name, **numbers | {"beta": DEFAULT_BETA[name] if section.beta is None else section.beta})

    @property
    def has_reference(self) -> bool:
        """Whether it uses a reference model."""
        return self.name in WITH_REFERENCE

    def numbers(self) -> dict[str, Any]:
        """Its name, and the parameters that it uses."""
        return {key: value for key, value in asdict(self).items() if self.name in PREFERENCE_KEYS.get(key, self.name)}

    def __str__(self) -> str:
        """`dpo with beta 0.1`; parameters with default values are left out."""
        defaults = {field.name: field.default for field in fields(self)}
        own = [f"{key} {one:g}" for key, one in self.numbers().items() if key != "name" and one != defaults[key]]
        return f"{self.name} with {', '.join(own)}"

    def compared_with(self, reference: str) -> str:
        """`dpo with beta 0.1, the base as the reference`. reference: its name, if the objective has one."""
        return f"{self}, {f'{reference} as the reference' if self.has_reference else 'without a reference'}"

    def item_losses(self, answers: AnswerScores, sides: Tensor, estimate: float) -> Tensor:
        """(items,), the loss of each pair, or of each answer.

        Args:
            answers: The answers; for pairs, chosen and rejected ones in the same order.
            sides: (answers,), see `TokenizedRow.side`.
            estimate: See `answer_losses`; not used by objectives on pairs.
        """
        if self.name == "kto":
            return self.answer_losses(answers, sides > 0, estimate)
        signs, device = kernels.on_host(sides), answers.tokens.device
        good, bad = (kernels.send(torch.nonzero(own)[:, 0], device) for own in (signs > 0, signs < 0))
        return self.pair_losses(answers.take(good), answers.take(bad))

    def rewards(self, answers: AnswerScores) -> Tensor:
        """(answers,), r(y); for ORPO, beta times the mean log-probability of the tokens, as TRL reports it."""
        if self.has_reference:
            return self.beta * (answers.log_probabilities - answers.reference)
        return self.beta * answers.per_token

    def pair_losses(self, chosen: AnswerScores, rejected: AnswerScores) -> Tensor:
        """(pairs,), the loss of each pair."""
        if self.name == "orpo":
            odds = _log_odds(chosen.per_token) - _log_odds(rejected.per_token)
            return -chosen.per_token - self.beta * logsigmoid(odds)
        margin = self.rewards(chosen) - self.rewards(rejected)
        if self.name == "simpo":
            margin = margin - self.simpo_gamma
        losses = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        return losses - self.sft_weight * chosen.per_token if self.sft_weight else losses

    def answer_losses(self, answers: AnswerScores, desirable: Tensor, divergence: float) -> Tensor:
        """(answers,), the loss of each unpaired answer.

        Args:
            answers: The answers.
            desirable: (answers,), bool, whether each is desirable.
            divergence: The estimated KL divergence, at least 0; z is beta times this.
        """
        difference = self.rewards(answers) - self.beta * divergence
        good, bad = 1 - torch.sigmoid(difference), 1 - torch.sigmoid(-difference)
        return torch.where(desirable, self.desirable_weight * good, self.undesirable_weight * bad)

    def first_loss(self) -> float | None:
        """The loss if the model equals the reference; None if it depends on the answers."""
        if self.name == "dpo" and not self.sft_weight:
            return float(-logsigmoid(torch.zeros((), dtype=torch.float64)))
        both = self.desirable_weight == self.undesirable_weight
        return 0.5 * self.desirable_weight if self.name == "kto" and both else None


def divergence(answers: AnswerScores | None) -> float:
    """KTO's estimate of the KL divergence from the reference, from mismatched answers; 0 without any."""
    if answers is None or not len(answers.log_probabilities):
        return 0.0
    return max(0.0, float((answers.log_probabilities - answers.reference).mean()))


def _log_odds(log_probabilities: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(x), with p clipped at 1 - 1e-12."""
    x = log_probabilities.clamp(max=-1e-12)
    return x - torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


# Metrics


@dataclass(frozen=True)
class Side:
    """The answers on one side; arrays (answers,).

    Attributes:
        items: The numbers of their items.
        tokens: Their supervised tokens.
        before: Their log-probabilities under the reference, or the base.
        after: Their log-probabilities under the evaluated model.
        rewards: Their rewards.
    """

    items: NDArray[np.int64]
    tokens: Values
    before: Values
    after: Values
    rewards: Values

    def to_dict(self) -> dict[str, Any]:
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
    """A fraction or a mean, with its interval, which is None if there are too few answers."""

    value: float
    interval: Interval | None

    def __str__(self) -> str:
        """`0.712 (95 % interval 0.655 to 0.763)`."""
        ends = f" (95 % interval {self.interval.low:.3f} to {self.interval.high:.3f})" if self.interval else ""
        return f"{self.value:.3f}{ends}"

    def to_dict(self) -> dict[str, Any]:
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
        border: For unpaired preferences, the reward above which an answer counts as desirable.
    """

    split: str
    paired: bool
    good: Side
    bad: Side
    border: float = 0.0

    @classmethod
    def of(
        cls, split: str, formula: Formula, answers: AnswerScores, sides: Tensor, estimate: float
    ) -> "PreferenceMetrics":
        """Create it from scores of answers, in the order of the items. Args as for `Formula.item_losses`."""
        signs = sides.cpu().numpy()
        paired = bool(len(signs)) and abs(int(signs[0])) == CHOSEN
        items = np.arange(len(signs)) // (2 if paired else 1)
        columns = answers.tokens, answers.reference, answers.log_probabilities, formula.rewards(answers)
        values = np.stack([one.double().cpu().numpy() for one in columns])
        good, bad = (Side(items[which], *values[:, which]) for which in (signs > 0, signs < 0))
        return cls(split, paired, good, bad, formula.beta * estimate)

    def by_item(self) -> dict[str, tuple[NDArray[np.int64], Values]]:
        """Metric → the items that it averages over, and their values. The margin of unpaired preferences is the mean
        desirable reward plus the mean negated undesirable reward."""
        good, bad = self.good, self.bad
        names = [f"{name}_{LOG_PROBABILITY}" for name in self.names]
        of_sides = {names[0]: (good.items, good.after), names[1]: (bad.items, bad.after)}
        if self.paired:
            margins, ranked = good.rewards - bad.rewards, good.after - bad.after
            return {
                REWARD_ACCURACY: (good.items, _higher(margins)),
                REWARD_MARGIN: (good.items, margins),
                RANKING_ACCURACY: (good.items, _higher(ranked)),
                **of_sides,
                PREFERRED_LENGTH: (good.items, np.where(ranked >= 0, good.tokens, bad.tokens)),
            }
        every = np.concatenate([good.items, bad.items])
        right = np.concatenate([_higher(good.rewards - self.border), _higher(self.border - bad.rewards)])
        has_margin = len(good.after) and len(bad.after)
        margin = {REWARD_MARGIN: (every, np.concatenate([good.rewards, -bad.rewards]))} if has_margin else {}
        return {REWARD_ACCURACY: (every, right), **margin, **of_sides}

    def before(self) -> "PreferenceMetrics":
        """The same metrics for the reference, with all rewards 0."""
        good, bad = (replace(one, after=one.before, rewards=0 * one.rewards) for one in (self.good, self.bad))
        return replace(self, good=good, bad=bad, border=0.0)

    def share(self, metric: str) -> PreferenceMetric:
        """An accuracy with its interval."""
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
        return _measured(*self.margins)

    @property
    def margins(self) -> tuple[Values, ...]:
        """Groups of values; the sum of their means is `reward_margin`."""
        good, bad = self.good.rewards, self.bad.rewards
        return (good - bad,) if self.paired else (good, -bad)

    def logged(self) -> dict[str, float]:
        """Metrics for a report of the trainer, without intervals."""
        names = zip(self.names, (self.good, self.bad), strict=True)
        own = {f"{name}_{LOG_PROBABILITY}": _mean(side.after) for name, side in names if len(side.after)}
        accuracy, margin = _mean(self.by_item()[REWARD_ACCURACY][1]), sum(map(_mean, self.margins))
        return {REWARD_ACCURACY: accuracy, REWARD_MARGIN: margin, **own}

    @property
    def preferred_length(self) -> float:
        """`preferred_length`; for pairs only."""
        return _mean(self.by_item()[PREFERRED_LENGTH][1])

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two sides."""
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

    def warnings(self, *, of_training: bool) -> Iterator[str]:
        """Warnings: chosen answers became less likely; at the end of a training, also that most pairs are saturated."""
        if not self.paired:
            return
        change, margins = _measured(self.good.after - self.good.before), self.good.rewards - self.bad.rewards
        if change.interval and change.interval.high < 0 and _mean(margins) > 0:
            yield (
                f"chosen answers became less likely, by {-change.value:.2f} nats in the mean, while the margin grew: "
                "rejected ones only fell further; preferences.sft_weight holds them up"
            )
        saturated = _mean(margins > SATURATED)
        if of_training and saturated > _MOST_SATURATED:
            yield (
                f"{saturated:.0%} of the pairs have a margin above {SATURATED}, and teach next to nothing any more: "
                "fewer steps, a lower training.learning_rate or a lower preferences.beta would do"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        metrics: dict[str, Any] = {"split": self.split, REWARD_ACCURACY: self.accuracy.to_dict()}
        metrics |= {REWARD_MARGIN: self.margin.to_dict()}
        metrics |= {name: side.to_dict() for name, side in zip(self.names, (self.good, self.bad), strict=True)}
        for name, one in (("before", self.before()), ("after", self)) if self.paired else ():
            metrics[f"{RANKING_ACCURACY}_{name}"] = one.share(RANKING_ACCURACY).to_dict()
            metrics[f"{PREFERRED_LENGTH}_{name}"] = one.preferred_length
        return metrics


def _higher(difference: Values) -> Values:
    return np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _measured(*groups: Values) -> PreferenceMetric:
    """The sum of the means of groups, with its interval."""
    interval = sum_interval([(values, np.ones_like(values)) for values in groups])
    return PreferenceMetric(sum(map(_mean, groups)), interval)
