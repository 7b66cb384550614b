"""Metrics of tasks of the lm-evaluation-harness, base and adapter compared document by document.

The harness gives each metric a standard error of its own. Base and adapter answer the same documents, so the difference
is compared in pairs here, which is more exact than two intervals.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets.exceptions import DatasetsError

from loratune import statistics
from loratune.codes import Code
from loratune.compare.losses import Difference, exp, mean_difference, score_difference, share_difference
from loratune.compare.results import ADAPTER, BASE, Judgement
from loratune.errors import ConfigError, DataError, LoratuneError, Problem, missing_package
from loratune.statistics import Interval

OPTION = "--tasks"
MEAN, PERPLEXITY, WEIGHTED_PERPLEXITY, BITS_PER_BYTE = "mean", "perplexity", "weighted_perplexity", "bits_per_byte"
"""How the harness makes one metric of the values of documents, by the names under which it registers the functions:
their mean; e to the power of the nats per document, or per unit that a value counts; and nats per unit in bits."""

_SCALES: dict[str, tuple[int, Callable[[float], float]]] = {
    MEAN: (1, lambda ratio: ratio),
    PERPLEXITY: (-1, exp),
    WEIGHTED_PERPLEXITY: (-1, exp),
    BITS_PER_BYTE: (-1, lambda ratio: ratio / math.log(2)),
}
"""Aggregation → with which sign the values count; and the metric as a function of their mean, or of the ratio of sums.
All of the functions rise."""


@dataclass(frozen=True)
class TaskMetric:
    """One metric of one task.

    Attributes:
        values: Model → the metric as the harness computes it.
        intervals: Model → its 95 % interval. None where there are too few documents, or the metric is none that comes
            from a mean over documents.
        errors: Model → the standard error that the harness gives, where there is no interval; None if it gives none.
        difference: Of the adapter less the base.
        rows: How many documents were scored.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    errors: Mapping[str, float | None]
    difference: Difference
    rows: int

    def as_json(self) -> dict[str, Any]:
        """Plain values; metrics that are not finite are null."""
        plain: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        plain["intervals"] = {name: interval and interval.as_json() for name, interval in self.intervals.items()}
        plain |= {"stderr": dict(self.errors)} if self.errors else {}
        return plain | {"difference": self.difference.as_json(), "verdict": self.difference.verdict, "rows": self.rows}


@dataclass(frozen=True)
class TaskResults:
    """What the harness found.

    Attributes:
        tasks: Task, or group of tasks → metric → metric. A metric of a filter other than `none` is `metric,filter`.
        limit: How many documents of each task were taken at most; None for all.
        chat: Whether prompts went through the chat template.
        version: Of the harness.
        remarks: Lines for the user.
        requirements: Whether what the user requires is met, where nothing but tasks was run.
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

    def as_json(self) -> dict[str, Any]:
        """Plain values, in keys of their own beside those of an evaluation on rows."""
        tasks = {
            task: {name: metric.as_json() for name, metric in metrics.items()} for task, metrics in self.tasks.items()
        }
        values = {"tasks": tasks, "limit": self.limit, "chat_template": self.chat, "lm_eval": self.version}
        required = [one.as_json() for one in self.requirements]
        return values | ({"requirements": required} if required else {})


def is_path(spec: str) -> bool:
    """Whether a task is named by a path. No task of the harness has a name with a slash, or that ends so."""
    return "/" in spec or spec.endswith((".yaml", ".yml")) or spec in (".", "..")


def parse(text: str) -> list[str]:
    """The tasks of a list with commas, each once.

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


def unknown_task(name: str, known: Sequence[str]) -> Problem:
    """The problem of a task that the harness does not have."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    fix = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    fix = f"write {name}/ for the tasks in that directory" if Path(name).is_dir() else fix
    return Problem(Code.EVALUATE_TASK, f"the lm-evaluation-harness has no task {name!r}", key="--tasks", fix=fix)


def load_error(spec: str, error: BaseException) -> LoratuneError:
    """The error of a task that the harness cannot load."""
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if isinstance(error, OSError | DatasetsError):  # as all errors of the network and of the hub are
        fix = "the rows come from the Hugging Face hub or from the files that the task's YAML names"
        if isinstance(error, ConnectionError):
            fix = "without a network, HF_HUB_OFFLINE=1 takes rows of earlier downloads and does not wait for the hub"
        return DataError(Problem(Code.EVALUATE_TASK, f"its rows cannot be loaded: {reason}", spec, fix=fix))
    return DataError(Problem(Code.EVALUATE_TASK, f"the harness cannot load it: {reason}", spec))


def check_same_task(spec: str, name: str, first: Any, second: Any) -> None:
    """Raises ConfigError: two tasks have one name, of which the harness would run one."""
    if repr(first.dump_config()) != repr(second.dump_config()):
        what, fix = f"another task is called {name!r} too", "give each a name of its own, or run one of them"
        raise ConfigError(Problem(Code.EVALUATE_TASK, what, spec, "--tasks", fix))


def check_supported(name: str, task: Any) -> None:
    """Raises ConfigError: the task needs what is not given to it here."""
    reason = ""
    if getattr(task, "UNSAFE_CODE", False):
        reason = "runs code that the model writes, which is not allowed here"
    elif getattr(task, "MULTIMODAL", False):
        reason = "needs images or sound"
    if reason:
        raise ConfigError(Problem(Code.EVALUATE_TASK, reason, name, "--tasks", "leave it out"))


def compare_metric(
    values: Mapping[str, float],
    errors: Mapping[str, float | None],
    samples: Mapping[str, Sequence[Any]],
    aggregation: str,
    higher_is_better: bool | None,
) -> TaskMetric:
    """Compare base and adapter on one metric.

    Args:
        values: Model → the metric as the harness computes it.
        errors: Model → its standard error by the harness.
        samples: Model → the metric of each document, the same documents in the same order: a number, or a pair of a
            log-likelihood and what it counts, such as words.
        aggregation: How the metric comes from them.
        higher_is_better: None where the harness does not say.
    """
    rows = len(samples[BASE])
    if aggregation not in _SCALES or not _is_numeric([*samples[BASE], *samples[ADAPTER]]):
        difference = Difference(values[ADAPTER] - values[BASE], None)
        return TaskMetric(values, dict.fromkeys(values), errors, difference, rows)
    if aggregation == MEAN and {*samples[BASE], *samples[ADAPTER]} <= {0, 1}:
        intervals, difference = _compare_shares(samples, not higher_is_better)
    elif aggregation == MEAN and all(0 <= value <= 1 for value in (*samples[BASE], *samples[ADAPTER])):
        intervals, difference = _compare_scores(samples, not higher_is_better)
    else:
        intervals, difference = _compare_ratios(samples, not higher_is_better, *_SCALES[aggregation])
    if higher_is_better is None:
        difference = replace(difference, verdict=None, rows_needed=None)
    return TaskMetric(values, intervals, {}, difference, rows)


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
    """Of metrics that are a function of a mean, or of a ratio of two sums, over documents.

    What is compared in pairs is the mean or ratio, which is in nats where the metric is a perplexity. Its difference
    and the ends of its interval are then taken to the metric's scale, from the base's metric as it was found. So the
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
