"""From what models do on rows to their figures, the differences between them, and the verdict.

Every distinct row is one draw, with the weight of its copies: copies add no information. So shares have the interval of
Kish's effective number of rows, see `statistics.effective_rows`. Without copies that is the number of rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.codes import Code
from loratune.console import plural
from loratune.errors import NumericError, Problem
from loratune.evaluation.metrics import MEANS
from loratune.evaluation.results import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    LABEL_ACCURACY,
    LOSS,
    LOWER_IS_BETTER,
    MAJORITY,
    PERPLEXITY,
    Difference,
    EvaluatedRow,
    Evaluation,
    ModelAnswer,
    Score,
    Verdict,
    has_direction,
    is_bounded,
)
from loratune.statistics import Interval
from loratune.training.preference_figures import REWARD_ACCURACY, REWARD_MARGIN

Values = NDArray[np.float64]

SIGNIFICANT = 0.05
"""The p of McNemar's test below which two shares differ."""
_TIE = 0.5
_PLACES = 3
"""How many places of rows a message names."""


def compare(
    rows: Sequence[EvaluatedRow],
    metric: str = LOSS,
    forgetting: Difference | None = None,
    remarks: Sequence[str] = (),
    majority: Sequence[ModelAnswer] = (),
) -> Evaluation:
    """What follows from the answers to rows.

    Args:
        rows: Distinct rows, at least one, each with the answers of `base` and `adapter`, and perhaps of `against`.
        metric: The figure that the verdict is about.
        forgetting: See `Evaluation`.
        remarks: Lines about the rows.
        majority: What always to give the most frequent answer comes to on each row; empty where there is no such.

    Raises:
        NumericError: The loss of an adapter is not finite.
    """
    models = [name for name in (BASE, ADAPTER, AGAINST) if name in rows[0].answers]
    other = AGAINST if AGAINST in models else BASE
    lines = [*remarks]
    for name in models:
        if what := not_finite(rows, _losses(rows, name), name):
            lines.append(f"{what}, so there is no verdict on the loss against it")
    scores = {name: score(rows, name) for name in models}
    figures = [figure for figure, value in scores[ADAPTER].figures.items() if value is not None]
    paired = {
        model: {figure: difference(rows, figure, model) for figure in figures if figure != PERPLEXITY}
        for model in models
        if model != ADAPTER
    }
    differences = paired.pop(other)
    verdict = differences[metric].verdict if metric in differences else None
    if majority:
        answered = [
            replace(row, answers={**row.answers, MAJORITY: one}) for row, one in zip(rows, majority, strict=True)
        ]
        scores[MAJORITY] = score(answered, MAJORITY)
        paired[MAJORITY] = {figure: difference(answered, figure, MAJORITY) for figure in figures if is_bounded(figure)}
    if len(rows) < statistics.LEAST_ROWS:
        count = plural(len(rows), f"distinct {rows[0].item}")
        lines.append(
            f"{count} {'is' if len(rows) == 1 else 'are'} too few for an interval of the "
            f"loss, and for a verdict: {statistics.LEAST_ROWS} are needed"
        )
    lines += _invalid_json(rows, models)
    constant = next((one.text for one in majority if one.text is not None), None)
    return Evaluation(scores, differences, other, metric, verdict, rows, forgetting, lines, paired, constant)


def score(rows: Sequence[EvaluatedRow], model: str) -> Score:
    """The figures of one model with their intervals. rows: at least one."""
    figures: dict[str, float | None] = {}
    intervals: dict[str, Interval | None] = {}
    if model != MAJORITY:  # which has no probabilities
        losses, counts = _weights(rows) * _losses(rows, model), _counts(rows)
        loss, interval = statistics.mean_ratio(losses, counts), statistics.loss_interval(losses, counts)
        figures[LOSS], intervals[LOSS] = loss, interval
        if rows[0].unit == "token":
            figures |= {PERPLEXITY: exp(loss), EXACT_MATCH: None, LABEL_ACCURACY: None}
            intervals[PERPLEXITY] = interval and Interval(exp(interval.low), exp(interval.high))
    for figure in dict.fromkeys(figure for row in rows for figure in row.answers[model].scores):
        figures[figure], intervals[figure] = _figure(rows, figure, model)
    weights = _weights(rows)
    tokens = int((weights * [row.tokens for row in rows]).sum())
    return Score(figures, int(weights.sum()), tokens, intervals)


def _figure(rows: Sequence[EvaluatedRow], figure: str, model: str) -> tuple[float, Interval | None]:
    """A figure beside the loss, with its interval."""
    groups = [(_weights(group), _scores(group, figure, model)) for group in _groups(rows, figure)]
    if not is_bounded(figure):
        samples = [(weights * values, weights) for weights, values in groups]
        return sum(statistics.mean_ratio(*sample) for sample in samples), _interval(samples)
    ((weights, values),) = groups
    value = statistics.mean_ratio(weights * values, weights)
    if _is_reference(figure, values):
        return value, Interval(value, value)
    if not _are_shares(figure, values):
        return value, statistics.bounded_mean_interval(values, weights)
    count = statistics.effective_rows(weights)
    return value, statistics.wilson(min(count, value * count), count)


def _interval(samples: Sequence[tuple[Values, Values]]) -> Interval | None:
    """The interval of a ratio of two sums over rows, or of a sum of such ratios."""
    return (
        statistics.mean_ratio_interval(*samples[0]) if len(samples) == 1 else statistics.sum_of_ratios_interval(samples)
    )


def _groups(rows: Sequence[EvaluatedRow], figure: str) -> list[list[EvaluatedRow]]:
    """The rows that add to a figure: one group, or, where it is the sum of the means of two groups, as the margin of
    judged answers is, both."""
    own = [row for row in rows if figure in row.answers[ADAPTER].scores]
    if figure != REWARD_MARGIN:
        return [own]
    sides = dict.fromkeys(tuple(row.compared) for row in own)
    return [[row for row in own if tuple(row.compared) == side] for side in sides]


def _is_reference(figure: str, values: Values) -> bool:
    """Whether they are of the reference itself, whose rewards are all 0, so that half of all ties count as right. Other
    rows would show the same."""
    return figure == REWARD_ACCURACY and bool((values == _TIE).all())


def _are_shares(figure: str, *scores: Values) -> bool:
    """Whether a figure is a share of rows, each of which counts or does not."""
    return figure not in MEANS and all(((values == 0) | (values == 1)).all() for values in scores)


def not_finite(rows: Sequence[EvaluatedRow], losses: Values, model: str) -> str:
    """On which rows the loss of a model is not finite, in words; empty if on none. losses: (rows,).

    Raises:
        NumericError: It is not finite, and the model is not the base.
    """
    bad = [row.where for row, own in zip(rows, losses, strict=True) if not math.isfinite(own)]
    count = plural(len(rows), rows[0].item)
    what = f"the loss of {model} is NaN or inf on {len(bad):,} of {count} ({', '.join(bad[:_PLACES])})"
    if bad and model != BASE:
        raise NumericError(Problem(Code.EVALUATE_LOSS_NOT_FINITE, what))
    return what if bad else ""


def loss_difference(rows: Sequence[EvaluatedRow], first: Values, second: Values) -> Difference:
    """A second loss less a first one. first, second: (rows,), the summed loss of each distinct row."""
    return mean_difference(_weights(rows) * (second - first), _counts(rows), lower_is_better=True)


def difference(rows: Sequence[EvaluatedRow], figure: str, other: str) -> Difference:
    """A figure of the adapter less that of another model. rows: as of `compare`; the figure is no perplexity."""
    if figure == LOSS:
        return loss_difference(rows, _losses(rows, other), _losses(rows, ADAPTER))
    groups = [
        (_weights(group), *(_scores(group, figure, model) for model in (other, ADAPTER)))
        for group in _groups(rows, figure)
    ]
    lower_is_better = figure in LOWER_IS_BETTER
    if not is_bounded(figure):
        samples = [(weights * (second - first), weights) for weights, first, second in groups]
        found = _of_means(samples, _interval(samples), lower_is_better)
        return found if has_direction(figure) else replace(found, verdict=None, rows_needed=None)
    ((weights, first, second),) = groups
    if _is_reference(figure, first):
        value, interval = _figure(rows, figure, ADAPTER)
        interval = interval and Interval(interval.low - _TIE, interval.high - _TIE)
        return _judged(value - _TIE, interval, [(weights * second, weights)], lower_is_better)
    if _are_shares(figure, first, second):
        return share_difference(first, second, weights, lower_is_better=lower_is_better)
    return score_difference(first, second, weights, lower_is_better=lower_is_better)


def mean_difference(totals: Values, counts: Values, *, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows.

    totals: (rows,), a figure of each row less that of what it is compared with. counts: (rows,), above 0.
    """
    return _of_means([(totals, counts)], statistics.mean_ratio_interval(totals, counts), lower_is_better)


def score_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """A second mean of scores between 0 and 1 less a first one. first, second: (rows,), the score of each row.
    weights: (rows,), the copies of each."""
    differences = second - first
    interval = statistics.bounded_difference_interval(differences, weights)
    return _of_means([(weights * differences, weights)], interval, lower_is_better)


def _of_means(samples: Sequence[tuple[Values, Values]], interval: Interval | None, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows, or a sum of such ratios, with its interval."""
    value = sum(statistics.mean_ratio(*sample) for sample in samples)
    return _judged(value, interval, samples, lower_is_better)


def _judged(
    value: float, interval: Interval | None, samples: Sequence[tuple[Values, Values]], lower_is_better: bool
) -> Difference:
    """A difference with its verdict. samples: totals and counts over rows, whose ratios vary as it does."""
    verdict = _verdict(value, interval, lower_is_better)
    needed = None
    if verdict == "indistinguishable":
        error = math.hypot(*(statistics.mean_ratio_error(*sample) for sample in samples))
        needed = _rows_needed(value, error, sum(len(totals) for totals, _ in samples))
    return Difference(value, interval, None, verdict, needed)


def share_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """A second share of rows less a first one. first, second: (rows,), 0 or 1. weights: (rows,), the copies of each."""
    rows = statistics.effective_rows(weights)
    shares = [float(weights[one > other].sum() / weights.sum()) for one, other in ((first, second), (second, first))]
    first_only, second_only = (share * rows for share in shares)
    interval = statistics.share_difference_interval(first_only, second_only, rows)
    lost, won = int((first > second).sum()), int((second > first).sum())
    p, value = statistics.mcnemar(lost, won), shares[1] - shares[0]
    agree = (won - lost) * value > 0  # with copies, more rows may be lost and yet fewer distinct ones, which p is about
    verdict = _verdict(value, interval, lower_is_better) if p < SIGNIFICANT and agree else "indistinguishable"
    needed = None
    if verdict == "indistinguishable":
        needed = _rows_needed(value, statistics.share_difference_error(first_only, second_only, rows), round(rows))
    return Difference(value, interval, p, verdict, needed)


def _verdict(value: float, interval: Interval | None, lower_is_better: bool) -> Verdict | None:
    if interval is None:
        return None
    if interval.low <= 0 <= interval.high:
        return "indistinguishable"
    return "better" if (value < 0) == lower_is_better else "worse"


def _rows_needed(value: float, error: float, rows: int) -> int | None:
    """How many rows would tell, where these do not: more than these."""
    needed = statistics.rows_needed(value, error, rows)
    return needed and max(needed, rows + 1)


def _invalid_json(rows: Sequence[EvaluatedRow], models: Sequence[str]) -> Iterator[str]:
    """How many answers are no JSON, a line for each model that has such answers."""
    for name in models:
        invalid = [row.answers[name].scores.get("invalid_json", 0.0) for row in rows]
        if count := int(sum(one * row.copies for one, row in zip(invalid, rows, strict=True))):
            yield f"{name}: {plural(count, 'answer')} of {sum(row.copies for row in rows):,} are not valid JSON"


def _weights(rows: Sequence[EvaluatedRow]) -> Values:
    return np.array([row.copies for row in rows], dtype=np.float64)


def _counts(rows: Sequence[EvaluatedRow]) -> Values:
    return _weights(rows) * np.array([row.count for row in rows], dtype=np.float64)


def _losses(rows: Sequence[EvaluatedRow], model: str) -> Values:
    return np.array([row.answers[model].loss for row in rows])


def _scores(rows: Sequence[EvaluatedRow], figure: str, model: str) -> Values:
    return np.array([row.answers[model].scores[figure] for row in rows])


def exp(value: float) -> float:
    """e to the power of it; inf where that is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))
