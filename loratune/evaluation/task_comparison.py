"""One metric of a task of the lm-evaluation-harness, compared document by document.

The harness gives each figure a standard error of its own. Base and adapter answer the same documents, however, so the
difference is compared in pairs here, which is more exact than two intervals beside each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loratune import statistics
from loratune.evaluation.comparison import exp, mean_difference, score_difference, share_difference
from loratune.evaluation.results import ADAPTER, BASE, Difference, TaskFigure
from loratune.statistics import Interval

MEAN, PERPLEXITY, WEIGHTED_PERPLEXITY, BITS_PER_BYTE = "mean", "perplexity", "weighted_perplexity", "bits_per_byte"
"""How the harness makes one figure of the values of documents, by the names under which it registers the functions:
their mean; e to the power of the nats per document, or per unit that a value counts; and nats per unit in bits."""

_SCALES: dict[str, tuple[int, Callable[[float], float]]] = {
    MEAN: (1, lambda ratio: ratio),
    PERPLEXITY: (-1, exp),
    WEIGHTED_PERPLEXITY: (-1, exp),
    BITS_PER_BYTE: (-1, lambda ratio: ratio / math.log(2)),
}
"""Aggregation → with which sign the values count; and the figure as a function of their mean, or of the ratio of sums.
All of the functions rise."""


def compare(
    values: Mapping[str, float],
    errors: Mapping[str, float | None],
    samples: Mapping[str, Sequence[Any]],
    aggregation: str,
    higher_is_better: bool | None,
) -> TaskFigure:
    """Compare base and adapter on one metric.

    Args:
        values: Model → the figure as the harness computes it.
        errors: Model → its standard error by the harness.
        samples: Model → the metric of each document, the same documents in the same order: a number, or a pair of a
            log-likelihood and what it counts, such as words.
        aggregation: How the figure comes from them.
        higher_is_better: None where the harness does not say.
    """
    rows = len(samples[BASE])
    if aggregation not in _SCALES or not _is_numeric([*samples[BASE], *samples[ADAPTER]]):
        difference = Difference(values[ADAPTER] - values[BASE], None)
        return TaskFigure(values, dict.fromkeys(values), errors, difference, rows)
    if aggregation == MEAN and {*samples[BASE], *samples[ADAPTER]} <= {0, 1}:
        intervals, difference = _compare_shares(samples, not higher_is_better)
    elif aggregation == MEAN and all(0 <= value <= 1 for value in (*samples[BASE], *samples[ADAPTER])):
        intervals, difference = _compare_scores(samples, not higher_is_better)
    else:
        intervals, difference = _compare_ratios(samples, not higher_is_better, *_SCALES[aggregation])
    if higher_is_better is None:
        difference = replace(difference, verdict=None, rows_needed=None)
    return TaskFigure(values, intervals, {}, difference, rows)


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether all values are numbers, or all pairs of a number and what it counts, which is above 0."""
    if values and isinstance(values[0], tuple):
        return all(isinstance(value, tuple) and len(value) == 2 and value[1] > 0 for value in values)
    return bool(values) and all(isinstance(value, int | float | np.number) for value in values)


def _compare_shares(
    samples: Mapping[str, Sequence[Any]], lower_is_better: bool
) -> tuple[dict[str, Interval | None], Difference]:
    """Of metrics that are 0 or 1 for each document."""
    base, adapter = (np.array(samples[model], dtype=np.float64) for model in (BASE, ADAPTER))
    difference = share_difference(base, adapter, np.ones(len(base)), lower_is_better=lower_is_better)
    return {model: statistics.wilson(int(sum(own)), len(own)) for model, own in samples.items()}, difference


def _compare_scores(
    samples: Mapping[str, Sequence[Any]], lower_is_better: bool
) -> tuple[dict[str, Interval | None], Difference]:
    """Of means over documents of what lies between 0 and 1, as far as is seen."""
    base, adapter = (np.array(samples[model], dtype=np.float64) for model in (BASE, ADAPTER))
    weights = np.ones(len(base))
    intervals = {model: statistics.bounded_mean_interval(own, weights) for model, own in samples.items()}
    return intervals, score_difference(base, adapter, weights, lower_is_better=lower_is_better)


def _compare_ratios(
    samples: Mapping[str, Sequence[Any]], lower_is_better: bool, sign: int, scale: Callable[[float], float]
) -> tuple[dict[str, Interval | None], Difference]:
    """Of figures that are a function of a mean, or of a ratio of two sums, over documents.

    What is compared in pairs is the mean or ratio, which is in nats where the figure is a perplexity. Its difference
    and the ends of its interval are then taken to the figure's scale, from the base's figure as it was found. So the
    interval of a difference of perplexities is that of their quotient, and has the same verdict as that of the nats.
    """
    totals, ratios, intervals = {}, {}, dict[str, Interval | None]()
    counts = np.ones(len(samples[BASE]))
    for model, values in samples.items():
        pairs = np.array([value if isinstance(value, tuple) else (value, 1) for value in values], dtype=np.float64)
        totals[model], counts = sign * pairs[:, 0], pairs[:, 1]
        ratios[model] = float(totals[model].sum() / counts.sum())
        intervals[model] = _scaled(statistics.mean_ratio_interval(totals[model], counts), scale)
    found = mean_difference(totals[ADAPTER] - totals[BASE], counts, lower_is_better=lower_is_better)

    def from_base(difference: float) -> float:
        return scale(ratios[BASE] + difference) - scale(ratios[BASE])

    return intervals, replace(found, value=from_base(found.value), interval=_scaled(found.interval, from_base))


def _scaled(interval: Interval | None, scale: Callable[[float], float]) -> Interval | None:
    """An interval on another scale; None where an end is not finite there."""
    if interval is None:
        return None
    low, high = scale(interval.low), scale(interval.high)
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else None
