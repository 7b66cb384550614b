"""From what models do on rows to their figures, the differences between them, and the verdict.

Every distinct row is one draw, with the weight of its copies: copies add no information. So shares have the interval of
Kish's effective number of rows, see `statistics.effective_rows`. Without copies that is the number of rows.
"""

import math
from collections.abc import Iterator, Sequence

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
    Difference,
    EvaluatedRow,
    Evaluation,
    Score,
    Verdict,
)
from loratune.statistics import Interval

Values = NDArray[np.float64]

SIGNIFICANT = 0.05
"""The p of McNemar's test below which two shares differ."""
_PLACES = 3
"""How many places of rows a message names."""


def compare(
    rows: Sequence[EvaluatedRow],
    metric: str = LOSS,
    forgetting: Difference | None = None,
    remarks: Sequence[str] = (),
) -> Evaluation:
    """What follows from the answers to rows.

    Args:
        rows: Distinct rows, at least one, each with the answers of `base` and `adapter`, and perhaps of `against`.
        metric: The figure that the verdict is about.
        forgetting: See `Evaluation`.
        remarks: Lines about the rows.

    Raises:
        NumericError: The loss of an adapter is not finite.
    """
    models = [name for name in (BASE, ADAPTER, AGAINST) if name in rows[0].answers]
    other = AGAINST if AGAINST in models else BASE
    lines = [*remarks]
    for name in models:
        if what := not_finite(rows, _nats(rows, name), name):
            lines.append(f"{what}, so there is no verdict on the loss against it")
    scores = {name: score(rows, name) for name in models}
    figures = [figure for figure, value in scores[ADAPTER].figures().items() if value is not None]
    paired = {
        model: {figure: difference(rows, figure, model) for figure in figures if figure != "perplexity"}
        for model in models
        if model != ADAPTER
    }
    differences = paired[other]
    if len(rows) < statistics.LEAST_ROWS:
        lines.append(
            f"{plural(len(rows), 'distinct row')} {'is' if len(rows) == 1 else 'are'} too few for an interval of the "
            f"loss, and for a verdict: {statistics.LEAST_ROWS} are needed"
        )
    lines += _invalid_json(rows, models)
    verdict = differences[metric].verdict if metric in differences else None
    from_base = paired[BASE] if other != BASE else {}
    return Evaluation(scores, differences, other, metric, verdict, rows, forgetting, lines, from_base)


def score(rows: Sequence[EvaluatedRow], model: str) -> Score:
    """The figures of one model with their intervals. rows: at least one."""
    nats, tokens = _weights(rows) * _nats(rows, model), _tokens(rows)
    loss = statistics.mean_ratio(nats, tokens)
    interval = statistics.loss_interval(nats, tokens)
    intervals = {LOSS: interval, "perplexity": interval and Interval(exp(interval.low), exp(interval.high))}
    figures: dict[str, float] = {}
    prompted = [row for row in rows if row.answers[model].scores]
    weights = _weights(prompted)
    for figure in prompted[0].answers[model].scores if prompted else ():
        values = _scores(prompted, figure, model)
        figures[figure] = statistics.mean_ratio(weights * values, weights)
        if figure in MEANS:
            intervals[figure] = statistics.bounded_mean_interval(values, weights)
        else:
            count = statistics.effective_rows(weights)
            intervals[figure] = statistics.wilson(min(count, figures[figure] * count), count)
    metrics = {figure: value for figure, value in figures.items() if figure not in (EXACT_MATCH, LABEL_ACCURACY)}
    matches, labels = figures.get(EXACT_MATCH), figures.get(LABEL_ACCURACY)
    count, total = int(_weights(rows).sum()), int(tokens.sum())
    return Score(loss, exp(loss), matches, labels, count, total, metrics, intervals)


def not_finite(rows: Sequence[EvaluatedRow], nats: Values, model: str) -> str:
    """On which rows the loss of a model is not finite, in words; empty if on none. nats: (rows,).

    Raises:
        NumericError: It is not finite, and the model is not the base.
    """
    bad = [row.where for row, own in zip(rows, nats, strict=True) if not math.isfinite(own)]
    what = f"the loss of {model} is NaN or inf on {len(bad):,} of {len(rows):,} rows ({', '.join(bad[:_PLACES])})"
    if bad and model != BASE:
        raise NumericError(Problem(Code.EVALUATE_LOSS_NOT_FINITE, what))
    return what if bad else ""


def loss_difference(rows: Sequence[EvaluatedRow], first: Values, second: Values) -> Difference:
    """A second loss less a first one. first, second: (rows,), nats of each distinct row."""
    return mean_difference(_weights(rows) * (second - first), _tokens(rows), lower_is_better=True)


def difference(rows: Sequence[EvaluatedRow], figure: str, other: str) -> Difference:
    """A figure of the adapter less that of another model. rows: as of `compare`; the figure is no perplexity."""
    if figure == LOSS:
        return loss_difference(rows, _nats(rows, other), _nats(rows, ADAPTER))
    prompted = [row for row in rows if row.answers[ADAPTER].scores]
    weights = _weights(prompted)
    first, second = (_scores(prompted, figure, model) for model in (other, ADAPTER))
    if figure in MEANS:
        return score_difference(first, second, weights, lower_is_better=figure in LOWER_IS_BETTER)
    return share_difference(first, second, weights, lower_is_better=figure in LOWER_IS_BETTER)


def mean_difference(totals: Values, counts: Values, *, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows.

    totals: (rows,), a figure of each row less that of what it is compared with. counts: (rows,), above 0.
    """
    return _of_means(totals, counts, statistics.mean_ratio_interval(totals, counts), lower_is_better)


def score_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """A second mean of scores between 0 and 1 less a first one. first, second: (rows,), the score of each row.
    weights: (rows,), the copies of each."""
    differences = second - first
    interval = statistics.bounded_difference_interval(differences, weights)
    return _of_means(weights * differences, weights, interval, lower_is_better)


def _of_means(totals: Values, counts: Values, interval: Interval | None, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows, with its interval."""
    value = statistics.mean_ratio(totals, counts)
    verdict = _verdict(value, interval, lower_is_better)
    needed = None
    if verdict == "indistinguishable":
        needed = _rows_needed(value, statistics.mean_ratio_error(totals, counts), len(totals))
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


def _tokens(rows: Sequence[EvaluatedRow]) -> Values:
    return _weights(rows) * np.array([row.tokens for row in rows], dtype=np.float64)


def _nats(rows: Sequence[EvaluatedRow], model: str) -> Values:
    return np.array([row.answers[model].nats for row in rows])


def _scores(rows: Sequence[EvaluatedRow], figure: str, model: str) -> Values:
    return np.array([row.answers[model].scores[figure] for row in rows])


def exp(value: float) -> float:
    """e to the power of it; inf where that is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))
