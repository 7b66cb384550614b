"""`Comparison`: metrics of each model from its scores on rows, the differences between models, and the verdict."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
from pandas import DataFrame, json_normalize

from loratune import outputs, statistics
from loratune.codes import Code
from loratune.compare import metrics, requirements
from loratune.compare import text as wording
from loratune.compare import verdict as verdicts
from loratune.compare.abstention import Abstention
from loratune.compare.answers import ComparedRow, ModelAnswer
from loratune.compare.behavior import Behavior
from loratune.compare.classification import Classification
from loratune.compare.collapse import PromptSensitivity
from loratune.compare.losses import LossComparison
from loratune.compare.metrics import (
    Difference,
    RowLosses,
    Values,
    Verdict,
    difference_with_verdict,
    exp,
    loss_difference,
    mean_difference,
    score_difference,
    share_difference,
)
from loratune.compare.objectives import Formula
from loratune.compare.reasoning import Reasoning
from loratune.compare.requirements import Judgement, Requirement
from loratune.compare.tasks import TaskResults
from loratune.compare.tool_calls import CallErrors
from loratune.compare.verdict import SHORT, Answers
from loratune.config.arguments import checked
from loratune.errors import ConfigError, NumericError, Problem
from loratune.statistics import Interval, finite
from loratune.text import one_line, plural, table

_TIE = 0.5
_PLACES = 3
"""The number of rows that a message names."""


@dataclass(frozen=True)
class Score:
    """The metrics of one model on the rows.

    Attributes:
        metrics: Metric → its value. `loss`: a mean over supervised tokens, or over pairs or answers of preferences.
            `perplexity`: exp of a loss per token, inf on overflow. `exact_match`: the fraction of rows whose greedy
            completion is the expected text followed by its end. `label_accuracy`: the fraction whose completion starts
            with the expected text. Both are None if no row has a prompt. Also requested metrics, and the
            metrics of preferences.
        rows: The number of rows.
        tokens: Supervised tokens.
        intervals: Metric → its 95 % interval; None if there are too few rows.
    """

    metrics: Mapping[str, float | None]
    rows: int
    tokens: int
    intervals: Mapping[str, Interval | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Metrics that are not finite are null, as JSON cannot represent them."""
        others = {"rows": self.rows, "tokens": self.tokens, "intervals": finite(self.intervals)}
        return {**finite(self.metrics), **others}


@dataclass(frozen=True)
class Comparison:
    """The comparison of an adapter with its base, or with another adapter, on the same rows.

    Attributes:
        scores: Model → its metrics: `base`, `adapter`, and if available `against` and `majority`.
        paired: Model → metric → difference between the adapter and that model; `compared_with` comes first.
        metric: The metric of the verdict beside another adapter.
        rows: The distinct rows, in the order of the split.
        forgetting: The losses of base and adapter on unrelated text; None if not requested.
        behavior: How the base's answers to everyday instructions change; None if not requested.
        reasoning: Whether it still reasons; None if not requested, or its base does not.
        remarks: Lines for the user: rows that were truncated or dropped, or are also in train; too few rows.
        majority: The most frequent expected answer; None if answers are not labels.
        tasks: Results of tasks of the lm-evaluation-harness; None if not requested.
        overlap: The number of rows read, and of those that are also in train; None if unknown.
        requirements: Whether each requirement is met.
        objective: The objective that defines the loss and the rewards of preferences; None for other rows.
        sensitivity: How much the adapter's predictions depend on the prompt; None if not measured.
        collapsed: Why the adapter counts as collapsed, as the predicate of a sentence; empty if it does not.
        special_tokens: Special tokens of the tokenizer, as text; prompts may contain them.
        computed_by: How losses were computed: dtype, layers and batches; see `Engine.computed_by`.
        own_fields: Place → the fields of the row there, if kept.
        classification: The labels that the adapter gives, if answers are labels.
        prompt: What the prompted base is told, in words; empty if there is none.
        abstention: The threshold from which on answers are right as often as asked for; None if not asked.
    """

    scores: Mapping[str, Score]
    paired: Mapping[str, Mapping[str, Difference]]
    metric: str
    rows: Sequence[ComparedRow]
    forgetting: LossComparison | None = None
    behavior: Behavior | None = None
    reasoning: Reasoning | None = None
    remarks: Sequence[str] = ()
    majority: str | None = None
    tasks: TaskResults | None = None
    overlap: Mapping[str, int] | None = None
    requirements: Sequence[Judgement] = ()
    objective: Formula | None = None
    sensitivity: PromptSensitivity | None = None
    collapsed: str = ""
    special_tokens: Sequence[str] = ()
    computed_by: Mapping[str, str] = field(default_factory=dict)
    own_fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classification: Classification | None = None
    prompt: str = ""
    abstention: Abstention | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Model → metric → its value."""
        return {model: dict(score.metrics) for model, score in self.scores.items()}

    @property
    def compared_with(self) -> str:
        """The model that the adapter is mainly compared with: `against` if there is one, else `base`."""
        return next(iter(self.paired))

    @property
    def differences(self) -> Mapping[str, Difference]:
        """Metric → difference between the adapter and `compared_with`."""
        return self.paired[self.compared_with]

    @cached_property
    def gain(self) -> LossComparison:
        """The losses of adapter and base on the rows."""
        base, adapter = (losses_of(self.rows, model) for model in (metrics.BASE, metrics.ADAPTER))
        return LossComparison.of(base, adapter, "held-out", unit=self.unit)

    @property
    def judged_by(self) -> str:
        """The metric that decides: the requested one, or exact matches if all answers are short, or the loss."""
        if self.metric != metrics.LOSS or not all(row.expected is not None for row in self.rows):
            return self.metric
        return metrics.EXACT_MATCH if max(row.tokens for row in self.rows) <= SHORT + 1 else metrics.LOSS

    @property
    def decisive(self) -> str:
        """The metric that decides beside another adapter: `judged_by`, or the loss where answers show no difference."""
        by_answers = self.differences.get(self.judged_by)
        is_open = by_answers is None or by_answers.verdict in (None, "indistinguishable")
        return self.metric if is_open else self.judged_by

    @property
    def answers(self) -> Answers | None:
        """How many answers are right, if they decide."""
        if (metric := self.judged_by) == metrics.LOSS or metric not in self.paired[metrics.BASE]:
            return None
        adapter, base = (self.scores[model] for model in (metrics.ADAPTER, metrics.BASE))
        shares = [one.metrics[metric] for one in (adapter, base)]
        assert shares[0] is not None and shares[1] is not None
        found = Answers(
            adapter.rows, shares[0], adapter.intervals.get(metric), shares[1], self.paired[metrics.BASE][metric],
            metric=metric, of_prompted=self.scores[metrics.PROMPTED].metrics.get(metric) if self.prompt else None,
        )  # fmt: skip
        if (over := self.paired.get(metrics.MAJORITY, {}).get(metric)) is None:
            return found
        constant = self.scores[metrics.MAJORITY].metrics[metric]
        return replace(found, majority=(self.majority or "").strip(), of_majority=constant, over_majority=over)

    @property
    def over_prompted(self) -> tuple[str, float, Difference] | None:
        """By which metric the prompted base is compared, its value, and the paired difference of the adapter from it:
        the metric that judges answers, or exact matches where the loss judges. None without it."""
        paired = self.paired.get(metrics.PROMPTED, {})
        metric = self.judged_by if self.judged_by in paired else metrics.EXACT_MATCH
        share = self.scores[metrics.PROMPTED].metrics.get(metric) if metric in paired else None
        return None if share is None else (metric, share, paired[metric])

    @property
    def verdict(self) -> verdicts.Name | Verdict | None:
        """The verdict on the adapter by the table of `verdict`; beside another adapter whether it is better than that
        one by `decisive`, None if there are too few rows."""
        if self.compared_with != metrics.BASE:
            return self.differences[self.decisive].verdict if self.decisive in self.differences else None
        return verdicts.decide_verdict(self.gain, self.answers, collapsed=bool(self.collapsed))

    @property
    def tool_calls(self) -> dict[str, CallErrors]:
        """Model → what is wrong with its calls; empty unless they are compared."""
        models = [name for name in self.rows[0].answers if metrics.TOOL_CALL in self.scores[name].metrics]
        return {
            name: CallErrors.of(
                (row.copies, one.scores, one.wrong_arguments)
                for row, one in ((row, row.answers[name]) for row in self.rows)
                if metrics.TOOL_CALL in one.scores
            )
            for name in models
        }

    @property
    def item(self) -> str:
        """The word for the rows, see `ComparedRow.item`."""
        return self.rows[0].item

    @property
    def unit(self) -> str:
        """The unit over which the loss is averaged: `token`, `pair` or `answer`."""
        return self.item if self.rows[0].compared else "token"

    def judged(self, required: Sequence[Requirement]) -> "Comparison":
        """The comparison with a judgement on each requirement."""
        return replace(self, requirements=[self._judge(one) for one in required])

    @checked
    def require(self, *texts: str) -> None:
        """Check requirements such as `exact_match>=0.9` or `loss<base`, see `requirements`.

        Raises:
            ConfigError: A requirement is not valid, or its metric was not computed.
            RequirementError: A requirement is not met.
        """
        computed = [
            name for name in self.scores[metrics.ADAPTER].metrics if name not in (metrics.LOSS, metrics.PERPLEXITY)
        ]
        required = requirements.parse_requirements(
            texts, computed, against=metrics.AGAINST in self.scores, forgetting=self.forgetting is not None,
            tasks=self.tasks is not None,
        )  # fmt: skip
        requirements.check_met(self.judged(required).requirements)

    def _judge(self, one: Requirement) -> Judgement:
        if one.of_task and self.tasks is not None:
            return requirements.judge_task(one, self.tasks.metrics(), self.collapsed)
        if one.metric == metrics.ACCURACY and self.rows[0].compared:
            one = replace(one, metric=metrics.REWARD_ACCURACY)
        score = self.scores[metrics.ADAPTER]
        value = score.metrics.get(one.metric)
        found = None if value is None else Difference(value, score.intervals.get(one.metric))
        reason = f"not computed, as no {self.item} gives it"
        if one.metric in (metrics.ACCURACY, metrics.LOG_LOSS, metrics.BRIER):
            reason = "the answers that are expected are not labels, or others than those of the training rows"
        if one.metric == metrics.FORGETTING:
            found = None if self.forgetting is None else self.forgetting.difference
        elif one.metric == metrics.REASONS:
            found = None if self.reasoning is None else self.reasoning.share
            reason = "the base does not reason"
        elif one.bound == metrics.MAJORITY and metrics.MAJORITY not in self.scores:
            found = None
            reason = f"the answers that the {self.item}s expect are not labels, so none is the most frequent"
        elif one.bound == metrics.PROMPTED and metrics.PROMPTED not in self.scores:
            found, reason = None, "the base was not prompted: see `few_shot=...` and `base_prompt=...`"
        elif found is not None and (one.of_difference or isinstance(one.bound, str)):
            # The perplexity increases with the loss.
            metric = metrics.LOSS if one.metric == metrics.PERPLEXITY else one.metric
            other = one.bound if isinstance(one.bound, str) else self.compared_with
            if (found := self.paired[other].get(metric)) is None:
                reason = f"`{metric}` is not computed for `{other}`"
        return requirements.judge(one, found, reason, self.collapsed)

    def with_abstention(self, accuracy: float) -> "Comparison":
        """The comparison with a threshold for `abstain_below`. accuracy: the share of answers that is to be right.

        Raises ConfigError: the answers are not labels.
        """
        if (found := self.classification) is None:
            what, fix = "the answers are not labels, which alone have probabilities", "leave it out"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="abstain_for", fix=fix))
        sure = found.probabilities.max(axis=1)
        return replace(self, abstention=Abstention.choose(sure, found.right, accuracy))

    def with_fields(self, fields: Mapping[str, Mapping[str, Any]]) -> "Comparison":
        """The comparison with the rows' own fields. fields: place → fields."""
        return replace(self, rows=[next(row.at_places(fields)) for row in self.rows], own_fields=fields)

    def every_row(self) -> Iterator[ComparedRow]:
        """Each row read, including copies, with its own fields; see `with_fields`."""
        return (copy for row in self.rows for copy in row.at_places(self.own_fields))

    def __repr__(self) -> str:
        """The verdict and the metrics, as `loratune evaluate` prints them."""
        lines = [wording.verdict(self), wording.rows(self)]
        tables = wording.scores_table(self), wording.differences_table(self)
        return "\n".join([*map(one_line, lines), *(line for one in tables for line in table(*one))])

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        head = f"<p><b>{escape(wording.verdict(self))}</b><br>{escape(wording.rows(self))}</p>"
        tables = wording.scores_table(self), wording.differences_table(self)
        return head + "".join(DataFrame(rows, columns=header).to_html(index=False) for header, rows in tables)

    def to_pandas(self, what: Literal["rows", "metrics"] = "rows") -> DataFrame:
        """A pandas frame of the distinct rows with their answers and scores, a column for each model and score; or of
        the metrics, a row for each model and metric with its 95 % interval."""
        if what == "rows":
            return json_normalize([row.to_dict() for row in self.rows], max_level=1)
        return DataFrame(
            {"model": model, "metric": metric, "value": value, **(vars(interval) if interval else {})}
            for model, score in self.scores.items()
            for metric, value in score.metrics.items()
            for interval in [score.intervals.get(metric)]
        )

    def to_dict(self) -> outputs.Evaluate:
        """Plain values, without the rows."""
        values: Any = {name: score.to_dict() for name, score in self.scores.items()}
        if self.majority is not None:
            values[metrics.MAJORITY]["answer"] = self.majority
        for model, differences in self.paired.items():
            key = "difference" if model == self.compared_with else f"difference_from_{model}"
            values[key] = {name: difference.to_dict() for name, difference in differences.items()}
        if self.forgetting is not None:
            kinds = {kind: one.to_dict() for kind, one in self.forgetting.kinds.items()}
            values["forgetting"] = self.forgetting.difference.to_dict() | ({"kinds": kinds} if kinds else {})
        if self.behavior is not None:
            values["behavior"] = self.behavior.to_dict()
        if self.reasoning is not None:
            values["reasons"] = self.reasoning.to_dict()
        if self.prompt:
            values[metrics.PROMPTED]["prompt"] = self.prompt
        if calls := self.tool_calls:
            values["tool_calls"] = {model: asdict(one) for model, one in calls.items()}
        if self.classification is not None:
            values["classification"] = self.classification.to_dict()
        values |= {
            "metric": self.judged_by if self.compared_with == metrics.BASE else self.decisive,
            "verdict": self.verdict,
            "overlap": self.overlap,
        }
        if self.abstention is not None:
            values["abstention"] = self.abstention.to_dict()
        values |= {"computed_by": dict(self.computed_by), "notes": [*self.remarks]}
        values |= {"prompt_sensitivity": self.sensitivity and self.sensitivity.to_dict()}
        values |= {"objective": self.objective.numbers()} if self.objective else {}
        values |= {"requirements": [one.to_dict() for one in self.requirements]} if self.requirements else {}
        values |= dict(self.tasks.to_dict()) if self.tasks is not None else {}
        return cast(outputs.Evaluate, values)


def compare_rows(
    rows: Sequence[ComparedRow],
    metric: str = metrics.LOSS,
    remarks: Sequence[str] = (),
    baselines: Mapping[str, Sequence[ModelAnswer]] = MappingProxyType({}),
) -> Comparison:
    """Compute metrics, differences and verdict from the answers to rows.

    Args:
        rows: Distinct rows, at least one, each with the results of `base`, `adapter` and optionally `against`.
        metric: The metric of the verdict beside another adapter.
        remarks: Lines about the rows.
        baselines: Name of a baseline → its result on each row; see `metrics.BASELINES`.

    Raises:
        NumericError: The loss of an adapter is not finite.
    """
    lines = [*remarks]
    models = [name for name in (metrics.AGAINST, metrics.BASE, metrics.ADAPTER) if name in rows[0].answers]
    for name in models:
        if what := not_finite(rows, losses_of(rows, name).nats, name):
            lines.append(f"{what}, so there is no verdict on the loss against it")
    scores = {name: _score(rows, name) for name in (metrics.BASE, metrics.ADAPTER, metrics.AGAINST) if name in models}
    computed = [
        name
        for name, value in scores[metrics.ADAPTER].metrics.items()
        if value is not None and name != metrics.PERPLEXITY
    ]
    paired = {model: {name: _difference(rows, name, model) for name in computed} for model in models[:-1]}
    for model, given in ((name, own) for name, own in baselines.items() if own):
        answered = [replace(row, answers={**row.answers, model: one}) for row, one in zip(rows, given, strict=True)]
        scores[model] = _score(answered, model)
        paired[model] = {
            name: _difference(answered, name, model)
            for name in computed
            if metrics.is_bounded(name) and scores[model].metrics.get(name) is not None
        }
    if len(rows) < statistics.LEAST_ROWS:
        count = plural(len(rows), f"distinct {rows[0].item}")
        lines.append(
            f"{count} {'is' if len(rows) == 1 else 'are'} too few for an interval of the "
            f"loss, and for a verdict: {statistics.LEAST_ROWS} are needed"
        )
    for name in (name for name in scores if name not in metrics.BASELINES):
        if invalid := int(sum(row.answers[name].scores.get(metrics.INVALID_JSON, 0.0) * row.copies for row in rows)):
            total = sum(row.copies for row in rows)
            lines.append(f"{name}: {plural(invalid, 'answer')} of {total:,} are not valid JSON")
    constant = next((one.text for one in baselines.get(metrics.MAJORITY, ()) if one.text is not None), None)
    return Comparison(scores, paired, metric, rows, remarks=lines, majority=constant)


def _score(rows: Sequence[ComparedRow], model: str) -> Score:
    """The metrics of one model with their intervals. rows: at least one."""
    found: dict[str, Difference | None] = {}
    if model not in metrics.BASELINES:  # they have no losses
        losses = losses_of(rows, model)
        found[metrics.LOSS] = Difference(losses.loss, interval := losses.interval)
        if not rows[0].compared:
            ends = interval and Interval(exp(interval.low), exp(interval.high))
            found[metrics.PERPLEXITY] = Difference(exp(losses.loss), ends)
            found |= {metrics.EXACT_MATCH: None, metrics.LABEL_ACCURACY: None}
    names = dict.fromkeys(metric for row in rows for metric in row.answers[model].scores)
    found |= {metric: _mean(rows, metric, model) for metric in names}
    tokens = sum(row.copies * row.tokens for row in rows)
    intervals = {metric: one.interval for metric, one in found.items() if one}
    values = {metric: None if one is None else one.value for metric, one in found.items()}
    return Score(values, sum(row.copies for row in rows), tokens, intervals)


def _mean(rows: Sequence[ComparedRow], metric: str, model: str) -> Difference:
    """A metric other than the loss, with its interval."""
    groups = [(_weights(group), _scores(group, metric, model)) for group in _groups(rows, metric)]
    if not metrics.is_bounded(metric):
        return mean_difference([(weights * values, weights) for weights, values in groups], lower_is_better=True)
    ((weights, values),) = groups
    value = statistics.mean_ratio(weights * values, weights)
    if _is_reference(metric, values):
        return Difference(value, Interval(value, value))
    if not _are_shares(metric, values):
        return Difference(value, statistics.bounded_mean_interval(values, weights))
    count = statistics.effective_rows(weights)
    return Difference(value, statistics.wilson(min(count, value * count), count))


def _difference(rows: Sequence[ComparedRow], metric: str, other: str) -> Difference:
    """The difference of a metric other than the perplexity: adapter minus another model."""
    if metric == metrics.LOSS:
        return loss_difference(losses_of(rows, other), losses_of(rows, metrics.ADAPTER))
    groups = [
        (_weights(group), *(_scores(group, metric, model) for model in (other, metrics.ADAPTER)))
        for group in _groups(rows, metric)
    ]
    lower_is_better = metric in metrics.LOWER_IS_BETTER
    if not metrics.is_bounded(metric):
        samples = [(weights * (second - first), weights) for weights, first, second in groups]
        found = mean_difference(samples, lower_is_better=lower_is_better)
        return found if metrics.has_direction(metric) else replace(found, verdict=None, rows_needed=None)
    ((weights, first, second),) = groups
    if _is_reference(metric, first):
        own = _mean(rows, metric, metrics.ADAPTER)
        interval = own.interval and Interval(own.interval.low - _TIE, own.interval.high - _TIE)
        return difference_with_verdict(own.value - _TIE, interval, [(weights * second, weights)], lower_is_better)
    differ = share_difference if _are_shares(metric, first, second) else score_difference
    return differ(first, second, weights, lower_is_better=lower_is_better)


def _groups(rows: Sequence[ComparedRow], metric: str) -> list[list[ComparedRow]]:
    """The rows that contribute to a metric, as one group; two groups for the margin of unpaired preferences, which is a
    sum of two means."""
    own = [row for row in rows if metric in row.answers[metrics.ADAPTER].scores]
    sides = dict.fromkeys(tuple(row.compared) if metric == metrics.REWARD_MARGIN else () for row in own)
    return [[row for row in own if metric != metrics.REWARD_MARGIN or tuple(row.compared) == side] for side in sides]


def _is_reference(metric: str, values: Values) -> bool:
    """Whether the values are reward accuracies of the reference itself: its rewards are all 0, and ties count half, on
    any rows."""
    return metric == metrics.REWARD_ACCURACY and bool((values == _TIE).all())


def _are_shares(metric: str, *scores: Values) -> bool:
    """Whether a metric is a proportion of rows, with scores of 0 or 1."""
    return metric not in metrics.MEANS and all(((values == 0) | (values == 1)).all() for values in scores)


def not_finite(rows: Sequence[ComparedRow], losses: Values, model: str) -> str:
    """A text on the rows for which the loss of a model is not finite; empty if there are none. losses: (rows,).

    Raises:
        NumericError: A loss of a model other than the base is not finite.
    """
    bad = [row.where for row, own in zip(rows, losses, strict=True) if not math.isfinite(own)]
    count = plural(len(rows), rows[0].item)
    what = f"the loss of {model} is NaN or inf on {len(bad):,} of {count} ({', '.join(bad[:_PLACES])})"
    if bad and model != metrics.BASE:
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what))
    return what if bad else ""


def losses_of(rows: Sequence[ComparedRow], model: str) -> RowLosses:
    """The losses of one model on the rows."""
    nats = [row.answers[model].loss for row in rows]
    return RowLosses.of(nats, [row.count for row in rows], [row.times for row in rows])


def _weights(rows: Sequence[ComparedRow]) -> Values:
    return np.array([row.times for row in rows], dtype=np.float64)


def _scores(rows: Sequence[ComparedRow], metric: str, model: str) -> Values:
    return np.array([row.answers[model].scores[metric] for row in rows])
