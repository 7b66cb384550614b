"""Metrics of tasks of the lm-evaluation-harness, with base and adapter compared document by document; `harness` runs
them.

The harness computes a standard error for each metric. As base and adapter answer the same documents, the difference is
computed from paired values here, which is more exact than two separate intervals.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from loratune import outputs, statistics
from loratune.codes import Code
from loratune.compare.metrics import ADAPTER, BASE, Difference, exp, mean_difference, score_difference, share_difference
from loratune.compare.requirements import Judgement, Requirement, judge_task
from loratune.errors import ConfigError, Problem, missing_package
from loratune.statistics import Interval, finite

OPTION = "tasks"

Scale = Callable[[float], float]
MEAN = "mean"
_SCALES: dict[str, tuple[int, Scale]] = {
    MEAN: (1, lambda ratio: ratio),
    "perplexity": (-1, exp),
    "weighted_perplexity": (-1, exp),
    "bits_per_byte": (-1, lambda ratio: ratio / math.log(2)),
}
"""Name of the harness's aggregation function → the sign of the documents' values; and the metric as an increasing
function of their mean, or of the ratio of their sums."""


@dataclass(frozen=True)
class TaskMetric:
    """One metric of one task.

    Attributes:
        values: Model → the metric as computed by the harness.
        intervals: Model → its 95 % interval; None if there are too few documents, or the metric is not based on a mean
            over documents.
        errors: Model → the harness's standard error, for metrics without intervals; None if it has none.
        difference: The difference, adapter minus base.
        rows: The number of scored documents.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    errors: Mapping[str, float | None]
    difference: Difference
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; metrics that are not finite are null."""
        plain = {**finite(self.values), "intervals": finite(self.intervals)}
        plain |= {"stderr": dict(self.errors)} if self.errors else {}
        return plain | {"difference": self.difference.to_dict(), "verdict": self.difference.verdict, "rows": self.rows}


@dataclass(frozen=True)
class TaskResults:
    """The results of the harness.

    Attributes:
        tasks: Task, or group of tasks → name → metric. The name with a filter other than `none` is `metric,filter`.
        limit: The maximum number of documents of each task; None for all.
        chat: Whether prompts were rendered with the chat template.
        version: The version of the harness.
        remarks: Lines for the user.
        requirements: Judgements on the requirements, if only tasks were run.
    """

    tasks: Mapping[str, Mapping[str, TaskMetric]]
    limit: int | None
    chat: bool
    version: str
    remarks: Sequence[str] = ()
    requirements: Sequence[Judgement] = ()

    def metrics(self) -> dict[str, TaskMetric]:
        """`TASK.METRIC` → metric."""
        return {f"{task}.{name}": metric for task, metrics in self.tasks.items() for name, metric in metrics.items()}

    def judged(self, required: Sequence[Requirement]) -> "TaskResults":
        """The results with a judgement on each requirement. required: on tasks only."""
        return replace(self, requirements=[judge_task(one, self.metrics()) for one in required])

    def to_dict(self) -> outputs.Tasks:
        """Plain values, under other keys than an evaluation on rows has."""
        tasks = {task: {name: one.to_dict() for name, one in metrics.items()} for task, metrics in self.tasks.items()}
        values: Any = {"tasks": tasks, "limit": self.limit, "chat_template": self.chat, "lm_eval": self.version}
        required = [one.to_dict() for one in self.requirements]
        return cast(outputs.Tasks, values | ({"requirements": required} if required else {}))


def compare_metric(
    values: Mapping[str, float],
    errors: Mapping[str, float | None],
    samples: Mapping[str, Sequence[Any]],
    aggregation: str,
    higher_is_better: bool | None,
) -> TaskMetric:
    """Compare base and adapter on one metric.

    Args:
        values: Model → the metric as computed by the harness.
        errors: Model → its standard error by the harness.
        samples: Model → the metric of each document, the same documents in the same order: a number, or a pair of a
            log-likelihood and a count, such as words.
        aggregation: The name of the harness's function that aggregates them.
        higher_is_better: Whether higher is better; None if the harness does not define it.
    """
    tables = [_table(samples[model]) for model in (BASE, ADAPTER)]
    base, adapter = tables
    if aggregation not in _SCALES or base is None or adapter is None:
        difference = Difference(values[ADAPTER] - values[BASE], None)
        return TaskMetric(values, dict.fromkeys(values), errors, difference, len(samples[BASE]))
    (sign, scale), lower_is_better = _SCALES[aggregation], not higher_is_better
    totals, counts = {BASE: sign * base[0], ADAPTER: sign * adapter[0]}, base[1]
    every = np.concatenate([*totals.values()])
    intervals: dict[str, Interval | None]
    if aggregation == MEAN and np.isin(every, (0, 1)).all():
        difference = share_difference(totals[BASE], totals[ADAPTER], counts, lower_is_better=lower_is_better)
        intervals = {model: statistics.wilson(int(own.sum()), len(own)) for model, own in totals.items()}
    elif aggregation == MEAN and ((every >= 0) & (every <= 1)).all():
        difference = score_difference(totals[BASE], totals[ADAPTER], counts, lower_is_better=lower_is_better)
        intervals = {model: statistics.bounded_mean_interval(own, counts) for model, own in totals.items()}
    else:
        difference = _on_scale(totals, counts, scale, lower_is_better)
        found = {model: statistics.mean_ratio_interval(own, counts) for model, own in totals.items()}
        intervals = {model: _scaled(one, scale) for model, one in found.items()}
    if higher_is_better is None:
        difference = replace(difference, verdict=None, rows_needed=None)
    return TaskMetric(values, intervals, {}, difference, len(counts))


def _table(values: Sequence[Any]) -> NDArray[np.float64] | None:
    """(2, documents), values and their counts, 1 for plain numbers; None if a value is neither a number nor a pair."""
    pairs = [value if isinstance(value, tuple) else (value, 1) for value in values]
    numeric = all(len(pair) == 2 and isinstance(pair[0], int | float | np.number) and pair[1] > 0 for pair in pairs)
    return np.array(pairs, dtype=np.float64).T if pairs and numeric else None


def _on_scale(totals: Mapping[str, Any], counts: Any, scale: Scale, lower_is_better: bool) -> Difference:
    """The difference of metrics that are a function of a mean, or of a ratio of two sums, over documents.

    The paired difference is computed for the mean or ratio, which is in nats if the metric is a perplexity. The
    difference and the ends of its interval are then converted to the metric's scale, starting from the base's metric.
    So the interval of a difference of perplexities corresponds to the interval of their quotient, and has the same
    verdict as the difference in nats.
    """
    found = mean_difference([(totals[ADAPTER] - totals[BASE], counts)], lower_is_better=lower_is_better)
    start = float(totals[BASE].sum() / counts.sum())

    def from_base(difference: float) -> float:
        return scale(start + difference) - scale(start)

    return replace(found, value=from_base(found.value), interval=_scaled(found.interval, from_base))


def _scaled(interval: Interval | None, scale: Scale) -> Interval | None:
    """An interval on another scale; None if an end is not finite."""
    scaled = interval and Interval(scale(interval.low), scale(interval.high))
    return scaled if scaled and math.isfinite(scaled.low) and math.isfinite(scaled.high) else None


def parse_tasks(text: str) -> list[str]:
    """The tasks of a comma-separated list, without duplicates.

    Raises:
        ConfigError: The list is empty; the package lm-eval, which runs them, is not installed.
    """
    specs = list(dict.fromkeys(spec for part in text.split(",") if (spec := part.strip())))
    if not specs:
        what, fix = "names no task", "name tasks such as arc_easy,hellaswag, or YAML files of tasks"
        raise ConfigError(Problem(Code.EVALUATE_TASK, what, key=OPTION, fix=fix))
    if find_spec("lm_eval") is None:
        raise ConfigError(missing_package(Code.SYSTEM_MISSING_PACKAGE, "lm-eval", "runs tasks", "eval", key=OPTION))
    return specs


def is_path(spec: str) -> bool:
    """Whether a task is given as a path. No task name of the harness contains a slash or ends in .yaml or .yml."""
    return "/" in spec or spec.endswith((".yaml", ".yml")) or spec in (".", "..")
