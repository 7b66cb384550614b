"""What a user requires of an adapter, so that a pipeline stops where it is not met: `--require 'exact_match>=0.9'`.

A requirement is judged on the cautious end of the 95 % interval: `exact_match>=0.9` asks that the low end be at least
0.9, and `loss<base` that the high end of the paired difference be below 0. So what too few rows cannot show is not met.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratune.codes import Code
from loratune.compare import metrics, preferences
from loratune.compare.preferences import REWARD_ACCURACY, REWARD_MARGIN
from loratune.compare.results import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    LABEL_ACCURACY,
    LOSS,
    MAJORITY,
    PERPLEXITY,
    Judgement,
    has_direction,
    is_bounded,
)
from loratune.compare.tasks import TaskMetric, TaskResults
from loratune.config.yaml_reader import number
from loratune.data import DatasetSplit
from loratune.data.formats import PAIRS, UNPAIRED
from loratune.data.row_hashes import Overlap
from loratune.errors import ConfigError, DataError, Problem, RequirementError
from loratune.statistics import Interval

OPTION = "--require"
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_FORM = re.compile(r"(?P<metric>.+)(?P<comparison><=|>=|<|>)(?P<bound>[^<>=]+)", re.DOTALL)
_DIFFERENCE = "difference."
_TASK_METRIC = re.compile(r"[^.:]+\..+", re.DOTALL)
"""`TASK.METRIC`."""
_NAMES = 12
"""Names of tasks or metrics that a message lists."""
FORGETTING, _INVALID_JSON = "forgetting", "invalid_json"
_OF_ROWS = (LOSS, PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY)
"""The metrics of rows that have one answer, besides those of --metric."""
_OF_COMPARED = {kind: (LOSS, *preferences.metrics_of(paired=kind == PAIRS), FORGETTING) for kind in (PAIRS, UNPAIRED)}
"""Kind of preference rows → their metrics."""
_SHORT = {"accuracy": REWARD_ACCURACY, "margin": REWARD_MARGIN}
"""Short names of metrics of preferences."""


@dataclass(frozen=True)
class Requirement:
    """One requirement.

    Attributes:
        text: As the user wrote it.
        metric: The name of the metric in an evaluation, `forgetting`, or `TASK.METRIC`.
        comparison: `<`, `<=`, `>` or `>=`.
        bound: A number, or the model whose metric it is, `majority` among them.
        of_difference: Whether it is about how the adapter differs from what it is compared with, in this metric.
        of_task: Whether the metric is one of a task of the lm-evaluation-harness.
    """

    text: str
    metric: str
    comparison: str
    bound: float | str
    of_difference: bool = False
    of_task: bool = False


# What is required


def parse(
    values: Sequence[str],
    asked: Sequence[str] = (),
    *,
    against: bool = False,
    forgetting: bool = False,
    rows: bool = True,
    tasks: bool = False,
) -> list[Requirement]:
    """The requirements that the option states, each once.

    Args:
        values: Of the option.
        asked: The names of the metrics that are computed besides those of all rows.
        against: Whether there is another adapter.
        forgetting: Whether it is measured.
        rows: Whether there are rows, without which there are no metrics but those of tasks.
        tasks: Whether there are tasks; see also `check_tasks`.

    Raises:
        ConfigError: Some are not valid, or are about what the evaluation will not compute.
    """
    computed = [*_OF_ROWS, *asked]
    computed += [_INVALID_JSON] if "json" in computed else []
    computed += dict.fromkeys(metric for of_kind in _OF_COMPARED.values() for metric in of_kind[1:-1])
    computed += [FORGETTING] if forgetting else []
    requirements, problems = [], list[Problem]()
    for value in dict.fromkeys(values):
        try:
            requirements.append(_parse(value, computed, against=against, rows=rows, tasks=tasks))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return requirements


def _parse(text: str, computed: Sequence[str], *, against: bool, rows: bool, tasks: bool) -> Requirement:
    if (match := _FORM.fullmatch(text.strip())) is None:
        what = f"`{text}` is not a metric, one of < <= > >=, and a bound"
        raise _refusal(Code.USAGE_BAD_VALUE, what, "write it like 'exact_match>=0.9', 'loss<base'")
    name, comparison, bound = (match[part].strip() for part in ("metric", "comparison", "bound"))
    of_difference = name.startswith(_DIFFERENCE)
    metric = name.removeprefix(_DIFFERENCE)
    if _TASK_METRIC.fullmatch(metric):
        return _of_task(text, metric, comparison, bound, of_difference=of_difference, tasks=tasks)
    metric = _metric(metric, computed, of_difference=of_difference)
    if not rows:
        what, fix = f"`{metric}` is computed on rows", "name them with --data FILE"
        raise _refusal(Code.USAGE_CONFLICT, what, fix)
    if bound not in (BASE, AGAINST, MAJORITY):
        return Requirement(text, metric, comparison, _number(bound, metric, text, of_difference), of_difference)
    if of_difference or metric == FORGETTING:
        what = f"`{text}` compares a difference with a model"
        raise _refusal(Code.USAGE_BAD_VALUE, what, "give a number")
    if bound == MAJORITY and not _is_bounded(metric):
        what = f"`{text}` is about the most frequent answer, of which there is no {metric}"
        raise _refusal(Code.USAGE_BAD_VALUE, what, f"compare {EXACT_MATCH}, label or a metric with it")
    if bound == AGAINST and not against:
        what = f"`{text}` is about another adapter"
        raise _refusal(Code.USAGE_CONFLICT, what, "name it with --against DIR")
    return Requirement(text, metric, comparison, bound)


def _of_task(text: str, metric: str, comparison: str, bound: str, *, of_difference: bool, tasks: bool) -> Requirement:
    """A requirement of a metric of a task, of which nothing is known yet. Raises ConfigError as `_parse` does."""
    if not tasks:
        what, fix = (
            f"`{metric}` is a metric of a task",
            f"name it with --tasks {metric.split('.')[0]}",
        )
        raise _refusal(Code.USAGE_CONFLICT, what, fix)
    if bound == AGAINST or (bound == BASE and of_difference):
        what = f"`{text}` does not work for a task, which runs on adapter and base alone"
        raise _refusal(Code.USAGE_BAD_VALUE, what, f"compare the metric with {BASE} or a number")
    limit = bound if bound == BASE else _finite(bound, text)
    return Requirement(text, metric, comparison, limit, of_difference, of_task=True)


def _metric(name: str, computed: Sequence[str], *, of_difference: bool) -> str:
    """A metric by the name that the user gives. Raises ConfigError: there is no such metric, or it is not computed."""
    metric, is_metric = _SHORT.get(name, name), name == _INVALID_JSON
    try:
        metric, is_metric = metrics.parse([name])[0].name, True
    except ConfigError as error:
        is_metric |= error.problems[0].code is not Code.USAGE_BAD_VALUE  # known, but a package is missing
    if not (of_difference and metric in (PERPLEXITY, FORGETTING)):
        if metric in computed:
            return metric
        if metric == FORGETTING:
            what, fix = "`forgetting` is not measured", "name a text with --forgetting FILE"
            raise _refusal(Code.USAGE_CONFLICT, what, fix)
        if is_metric:
            fix = f"add {metrics.OPTION} '{'json' if metric == _INVALID_JSON else metric}'"
            raise _refusal(Code.USAGE_CONFLICT, f"`{metric}` is not computed", fix)
    near = difflib.get_close_matches(metric, (*computed, FORGETTING), n=1, cutoff=0.5)
    fix = f"the metrics are {', '.join(one for one in computed if has_direction(one))}"
    fix = f"did you mean `{near[0]}`? {fix}" if near and near[0] != metric else fix
    prefix = _DIFFERENCE if of_difference else ""
    raise _refusal(Code.USAGE_BAD_VALUE, f"there is no metric `{prefix}{name}`", fix)


def _number(bound: str, metric: str, text: str, of_difference: bool) -> float:
    """The number of a bound. Raises ConfigError: it is not a number, or one that the metric cannot pass."""
    value = _finite(bound, text)
    least = -1 if of_difference else 0
    if _is_bounded(metric) and not least <= value <= 1:
        what = f"the bound of `{text}` is not between {least} and 1, as {metric} is"
        raise _refusal(Code.USAGE_BAD_VALUE, what, "90 % is 0.9")
    return value


def _finite(bound: str, text: str) -> float:
    """The number of a bound. Raises ConfigError: it is not a finite number."""
    if (value := number(bound)) is None or not math.isfinite(value):
        what = f"the bound of `{text}` is not a finite number"
        raise _refusal(Code.USAGE_BAD_VALUE, what, f"give one, or `{BASE}`, `{AGAINST}` or `{MAJORITY}`")
    return value


def _refusal(code: Code, what: str, fix: str) -> ConfigError:
    return ConfigError(Problem(code, what, key=OPTION, fix=fix))


def _is_bounded(metric: str) -> bool:
    return metric != FORGETTING and is_bounded(metric)


def check_rows(
    requirements: Sequence[Requirement], split: DatasetSplit, overlap: Overlap, *, allow_overlap: bool
) -> None:
    """Check, before a model is loaded, that rows can show what is required of them.

    Raises:
        ConfigError: Rows of that kind do not have the metric.
        DataError: Some are also in train, unless that is allowed; or a requirement is about answers to prompts, and
            no row has one.
    """
    of_rows = [one for one in requirements if not one.of_task]
    known = _OF_COMPARED.get(split.kind or "", ())
    others = {metric for metrics in _OF_COMPARED.values() for metric in metrics} - {LOSS, FORGETTING}
    fix = f"take one of {', '.join(known or _OF_ROWS)}{'' if known else f', or one that {metrics.OPTION} adds'}"
    if problems := [
        Problem(Code.USAGE_BAD_VALUE,
                f"`{one.text}`: there is no {one.metric} of {split.kind or 'rows with one answer'}",
                split.source, OPTION, fix)
        for one in of_rows
        if (one.metric not in known if known else one.metric in others)
    ]:  # fmt: skip
        raise ConfigError(problems)
    answers = [one for one in of_rows if _is_bounded(one.metric)]
    if answers and split.formats == ["text"]:
        what = f"no row has a prompt, so there is no {answers[0].metric}"
        raise DataError(Problem(Code.DATA_FIELD, what, split.source, OPTION, "give rows with prompts"))
    if of_rows and overlap.found and not allow_overlap:
        fix = "take rows that it has not seen; or use --allow-overlap"
        raise DataError([Problem(Code.EVALUATE_OVERLAP, what, split.source, OPTION, fix) for what in overlap.remarks()])


def check_tasks(requirements: Sequence[Requirement], names: Sequence[str]) -> None:
    """Check, before a model is loaded, that what is required of tasks is required of those that will run.

    names: of the tasks, and of groups of them.

    Raises:
        ConfigError: Some is not. Which metrics a task gives shows only when it has run.
    """
    if problems := [
        Problem(
            Code.USAGE_BAD_VALUE,
            f"`{one.text}` is about none of the tasks",
            key=OPTION,
            fix=f"take one of {_listed(names)}, and its metric behind a dot",
        )
        for one in requirements
        if one.of_task and not any(one.metric.startswith(f"{name}.") for name in names)
    ]:
        raise ConfigError(problems)


def _listed(names: Sequence[str]) -> str:
    """Names in a list, of which the end is left out where there are many."""
    return ", ".join(names[:_NAMES]) + (f", and {len(names) - _NAMES:,} more" if len(names) > _NAMES else "")


# Whether it is met


def judge_task(requirement: Requirement, metrics: Mapping[str, TaskMetric], collapsed: str = "") -> Judgement:
    """Whether a requirement of a task is met. metrics: by `TASK.METRIC`. collapsed: see `Comparison`."""
    if (found := metrics.get(requirement.metric)) is None:
        reason = f"no task gives it, but {_listed([*metrics]) or 'no metric at all'}"
        return Judgement(requirement.text, False, None, None, reason)
    value, interval = found.values[ADAPTER], found.intervals[ADAPTER]
    if collapsed:
        return Judgement(requirement.text, False, value, interval, f"the adapter {collapsed}")
    if requirement.of_difference or requirement.bound == BASE:
        difference = found.difference
        return judge(requirement, difference.value, difference.interval, difference.is_distinguishable)
    return judge(requirement, value, interval, True)


def judged_tasks(results: TaskResults, requirements: Sequence[Requirement]) -> TaskResults:
    """Results of tasks alone with whether each requirement is met, in their order. requirements: of tasks."""
    return replace(results, requirements=[judge_task(one, results.metrics()) for one in requirements])


def judge(requirement: Requirement, value: float, interval: Interval | None, is_distinguishable: bool) -> Judgement:
    """Whether a value and its interval meet a requirement."""
    is_model = isinstance(requirement.bound, str)

    def judgement(reason: str) -> Judgement:
        return Judgement(requirement.text, not reason, value, interval, reason)

    if not math.isfinite(value):
        return judgement("NaN or inf")
    what = "the difference of the loss" if requirement.metric == PERPLEXITY else "the difference"
    subject = f"{what} to {requirement.bound} is {value:.6g}" if is_model else f"{value:.6g}"
    if interval is None:
        which = ", or it is no mean of rows" if requirement.of_task else ""
        return judgement(f"{subject}, without an interval, for which there are too few rows{which}")
    bound = 0.0 if isinstance(requirement.bound, str) else requirement.bound
    holds = _COMPARISONS[requirement.comparison]
    end, which = (interval.high, "high") if "<" in requirement.comparison else (interval.low, "low")
    subject += f", 95 % interval {interval.low:.6g} to {interval.high:.6g}"
    if not holds(end, bound):
        return judgement(f"{subject}, whose {which} end is not {requirement.comparison} {bound:g}")
    if not is_distinguishable and not holds(0.0, bound):  # it says that there is a difference
        return judgement(f"{subject}, but McNemar's test cannot tell the two apart")
    return judgement("")


def check_met(judgements: Sequence[Judgement]) -> None:
    """Raises RequirementError: some are not met."""
    if problems := [
        Problem(Code.EVALUATE_REQUIREMENT, f"`{one.text}` is not met: {one.reason}", key=OPTION)
        for one in judgements
        if not one.met
    ]:
        raise RequirementError(problems)
