"""Requirements on an adapter; a pipeline stops if one is not met: `--require 'exact_match>=0.9'`.

A requirement is checked against the less favorable end of the 95 % interval: for `exact_match>=0.9` the low end must be
at least 0.9, for `loss<base` the high end of the paired difference must be below 0. So with too few rows, a requirement
is not met.
"""

import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune import outputs
from loratune.codes import Code
from loratune.compare import metrics
from loratune.compare.metrics import Difference
from loratune.config.yaml_files import number
from loratune.data import DatasetSplit
from loratune.data.formats import PAIRS, UNPAIRED
from loratune.data.splits import Overlap
from loratune.errors import ConfigError, DataError, Problem, RequirementError
from loratune.statistics import Interval, finite

if TYPE_CHECKING:
    from loratune.compare.tasks import TaskMetric

OPTION = "require"
_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FORM = re.compile(r"(?P<metric>.+)(?P<comparison><=|>=|<|>)(?P<bound>[^<>=]+)", re.DOTALL)
_DIFFERENCE = "difference."
_TASK_METRIC = re.compile(r"[^.:]+\..+", re.DOTALL)
"""`TASK.METRIC`."""
_OF_ROWS = (metrics.LOSS, metrics.PERPLEXITY, metrics.EXACT_MATCH, metrics.LABEL_ACCURACY)
"""The metrics of rows with one answer, without those of `metrics`."""
_OF_PREFERENCES = {kind: metrics.metrics_of(paired=kind == PAIRS) for kind in (PAIRS, UNPAIRED)}
"""Kind of preference rows → their metrics without the loss."""
_OF_LABELS = (metrics.ACCURACY, metrics.LOG_LOSS, metrics.BRIER)
"""The metrics of rows whose answers are labels."""
_OF_THE_BASE = (metrics.FORGETTING, metrics.REASONS)
"""The metrics of what the base could do, which are not computed on the rows."""
_SHORT = {"margin": metrics.REWARD_MARGIN}
"""Short names of metrics of preferences; `accuracy` is that of labels, or of rewards."""


@dataclass(frozen=True)
class Requirement:
    """One requirement.

    Attributes:
        text: The requirement as written by the user.
        metric: The name of the metric in an evaluation, `forgetting`, or `TASK.METRIC`.
        comparison: `<`, `<=`, `>` or `>=`.
        bound: A number, or the name of a model, such as `base` or `majority`, whose metric is the bound.
        of_difference: Whether it is about the difference of the metric to the model compared with.
        of_task: Whether the metric is one of a task of the lm-evaluation-harness.
    """

    text: str
    metric: str
    comparison: str
    bound: float | str
    of_difference: bool = False
    of_task: bool = False


@dataclass(frozen=True)
class Judgement:
    """Whether a requirement is met.

    Attributes:
        text: The requirement as written by the user.
        met: Whether it is met.
        value: The metric, or its difference to a model; None if not computed.
        interval: The 95 % interval of the value; its less favorable end decides.
        reason: Why it is not met; empty if it is.
    """

    text: str
    met: bool
    value: float | None
    interval: Interval | None
    reason: str = ""

    def to_dict(self) -> outputs.Requirement:
        """Plain values, without the reason."""
        low, high = finite(self.interval) or (None, None)
        return {"text": self.text, "met": self.met, "value": finite(self.value), "low": low, "high": high}


# Parsing and checking requirements


def parse_requirements(
    values: Sequence[str],
    asked: Sequence[str] = (),
    *,
    against: bool = False,
    forgetting: bool = False,
    rows: bool = True,
    tasks: bool = False,
) -> list[Requirement]:
    """The requirements given by the option, without duplicates.

    Args:
        values: The values of the option.
        asked: The names of additional metrics that are computed.
        against: Whether there is another adapter.
        forgetting: Whether forgetting is measured.
        rows: Whether there are rows; without rows, only tasks have metrics.
        tasks: Whether there are tasks; see also `check_tasks`.

    Raises:
        ConfigError: Some are not valid, or their metrics will not be computed.
    """
    computed = [*_OF_ROWS, *_OF_LABELS, *asked, *([metrics.INVALID_JSON] if "json" in asked else [])]
    computed += metrics.CALL_ERRORS if metrics.TOOL_CALL in asked else ()
    computed += dict.fromkeys(metric for of_kind in _OF_PREFERENCES.values() for metric in of_kind)
    computed += _OF_THE_BASE if forgetting else ()
    found, problems = [], list[Problem]()
    for value in dict.fromkeys(values):
        try:
            one = _parse(value, computed)
            for is_given, is_needed, what, fix in (
                (tasks, one.of_task, "of a task", f"name it with `tasks={one.metric.split('.')[0]!r}`"),
                (rows, not one.of_task, "computed on rows", "name them with `rows=FILE`"),
                (against, one.bound == metrics.AGAINST, "compared with another adapter", "name it with `against=DIR`"),
            ):
                if is_needed and not is_given:
                    raise _refusal(f"`{one.metric}` is {what}", fix, Code.USAGE_CONFLICT)
            found.append(one)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _parse(text: str, computed: Sequence[str]) -> Requirement:
    if (match := _FORM.fullmatch(text.strip())) is None:
        what = f"`{text}` is not a metric, one of < <= > >=, and a bound"
        raise _refusal(what, "write it like 'exact_match>=0.9', 'loss<base'")
    name, comparison, bound = (match[part].strip() for part in ("metric", "comparison", "bound"))
    of_difference, metric = name.startswith(_DIFFERENCE), name.removeprefix(_DIFFERENCE)
    of_task = _TASK_METRIC.fullmatch(metric) is not None
    metric = metric if of_task else _metric(metric, computed, of_difference=of_difference)
    if bound in (metrics.BASE, metrics.AGAINST, *metrics.BASELINES):
        has_none = (of_task and bound != metrics.BASE) or (
            bound in metrics.BASELINES and not metrics.is_bounded(metric)
        )
        if of_difference or metric in _OF_THE_BASE or has_none:
            raise _refusal(f"`{text}` compares `{name}` with a model that it cannot be compared with", "give a number")
        return Requirement(text, metric, comparison, bound, False, of_task)
    if (value := number(bound)) is None or not math.isfinite(value):
        what = f"the bound of `{text}` is not a finite number"
        raise _refusal(
            what, f"give one, or `{metrics.BASE}`, `{metrics.AGAINST}`, `{metrics.MAJORITY}` or `{metrics.PROMPTED}`"
        )
    least = -1 if of_difference else 0
    if not of_task and metrics.is_bounded(metric) and not least <= value <= 1:
        raise _refusal(f"the bound of `{text}` is not between {least} and 1, as {metric} is", "90 % is 0.9")
    return Requirement(text, metric, comparison, value, of_difference, of_task)


def _metric(name: str, computed: Sequence[str], *, of_difference: bool) -> str:
    """The name of a metric, from the user's name for it. Raises ConfigError: it is unknown, or not computed."""
    metric = _SHORT.get(name, name)
    options = dict.fromkeys(_OF_THE_BASE, "`forgetting=FILE`") | {metrics.INVALID_JSON: "`metrics='json'`"}
    option = (options | dict.fromkeys(metrics.CALL_ERRORS, "`metrics='tool_call'`")).get(name)
    try:
        metric = metrics.parse_metrics([name])[0].name
        option = f"`{metrics.OPTION}={metric!r}`"
    except ConfigError as error:
        if error.problems[0].code is Code.SYSTEM_MISSING_PACKAGE:
            option = f"`{metrics.OPTION}={metric!r}`"
    if not (of_difference and metric in (metrics.PERPLEXITY, *_OF_THE_BASE)):
        if metric in computed:
            return metric
        if option:
            raise _refusal(f"`{metric}` is not computed", f"add {option}", Code.USAGE_CONFLICT)
    near = difflib.get_close_matches(metric, (*computed, *_OF_THE_BASE), n=1, cutoff=0.5)
    fix = f"the metrics are {', '.join(one for one in computed if metrics.has_direction(one))}"
    fix = f"did you mean `{near[0]}`? {fix}" if near and near[0] != metric else fix
    raise _refusal(f"there is no metric `{_DIFFERENCE if of_difference else ''}{name}`", fix)


def _refusal(what: str, fix: str, code: Code = Code.USAGE_BAD_VALUE) -> ConfigError:
    return ConfigError(Problem(code, what, key=OPTION, fix=fix))


def check_rows(
    requirements: Sequence[Requirement], split: DatasetSplit, overlap: Overlap, *, allow_overlap: bool
) -> None:
    """Check, before a model is loaded, that the requirements can be evaluated on the rows.

    Raises:
        ConfigError: Rows of this kind do not have the metric.
        DataError: Some rows are also in train, unless that is allowed; or a requirement is about answers to prompts,
            and no row has a prompt.
    """
    of_rows = [one for one in requirements if not one.of_task]
    of_kind = [metrics.LOSS, *_OF_PREFERENCES[split.kind], *_OF_THE_BASE] if split.kind is not None else []
    known = [*of_kind, metrics.ACCURACY] if of_kind else []
    others = {metric for of_kind in _OF_PREFERENCES.values() for metric in of_kind}
    fix = f"take one of {', '.join(of_kind or _OF_ROWS)}{'' if known else f', or one that `{metrics.OPTION}=...` adds'}"
    kind = split.kind or "rows with one answer"
    if problems := [
        Problem(
            Code.USAGE_BAD_VALUE,
            f"`{one.text}`: there is no {one.metric} of {kind}",
            split.source,
            OPTION,
            fix,
        )
        for one in of_rows
        if (one.metric not in known if known else one.metric in others)
    ]:
        raise ConfigError(problems)
    answers = [one for one in of_rows if metrics.is_bounded(one.metric) and one.metric not in _OF_THE_BASE]
    if answers and split.formats == ["text"]:
        what = f"no row has a prompt, so there is no {answers[0].metric}"
        raise DataError(Problem(Code.DATA_FIELD, what, split.source, OPTION, "give rows with prompts"))
    if of_rows and overlap.found and not allow_overlap:
        fix = "take rows that it has not seen; or use `allow_overlap=True`"
        raise DataError([Problem(Code.EVALUATE_OVERLAP, what, split.source, OPTION, fix) for what in overlap.remarks()])


def check_tasks(requirements: Sequence[Requirement], names: Sequence[str]) -> None:
    """Check, before a model is loaded, that requirements on tasks are about tasks that will run.

    The metrics of a task are known only after it has run.

    names: the names of the tasks and of groups of tasks.

    Raises:
        ConfigError: A requirement is about another task.
    """
    fix = f"take one of {', '.join(names)}, and its metric behind a dot"
    for one in requirements:
        if one.of_task and not any(one.metric.startswith(f"{name}.") for name in names):
            raise _refusal(f"`{one.text}` is about none of the tasks", fix)


# Judging requirements


def judge_task(requirement: Requirement, found_metrics: "Mapping[str, TaskMetric]", collapsed: str = "") -> Judgement:
    """Whether a requirement of a task is met. found_metrics: by `TASK.METRIC`. collapsed: see `Comparison`."""
    one, found = found_metrics.get(requirement.metric), None
    if one is not None:
        is_paired = requirement.of_difference or requirement.bound == metrics.BASE
        found = one.difference if is_paired else Difference(one.values[metrics.ADAPTER], one.intervals[metrics.ADAPTER])
    missing = f"no task gives it, but {', '.join(found_metrics) or 'no metric at all'}"
    return judge(requirement, found, missing, collapsed)


def judge(requirement: Requirement, found: Difference | None, missing: str, collapsed: str) -> Judgement:
    """Whether a requirement is met.

    Args:
        requirement: The requirement.
        found: The metric or the difference; None if not computed.
        missing: Why it was not computed.
        collapsed: See `Comparison`.
    """
    if found is None:
        return Judgement(requirement.text, False, None, None, missing)
    reason = f"the adapter {collapsed}" if collapsed else _unmet(requirement, found)
    return Judgement(requirement.text, not reason, found.value, found.interval, reason)


def _unmet(requirement: Requirement, found: Difference) -> str:
    """Why a requirement is not met; empty if it is."""
    value, interval, bound = found.value, found.interval, requirement.bound
    if not math.isfinite(value):
        return "NaN or inf"
    what = "the difference of the loss" if requirement.metric == metrics.PERPLEXITY else "the difference"
    subject = f"{what} to {bound} is {value:.6g}" if isinstance(bound, str) else f"{value:.6g}"
    if interval is None:
        which = ", or it is not a mean over rows" if requirement.of_task else ""
        return f"{subject}, without an interval, for which there are too few rows{which}"
    limit, holds = 0.0 if isinstance(bound, str) else bound, _COMPARISONS[requirement.comparison]
    end, which = (interval.high, "high") if "<" in requirement.comparison else (interval.low, "low")
    subject += f", 95 % interval {interval.low:.6g} to {interval.high:.6g}"
    if not holds(end, limit):
        return f"{subject}, whose {which} end is not {requirement.comparison} {limit:g}"
    is_paired = requirement.of_difference or isinstance(bound, str)
    if is_paired and not found.is_distinguishable and not holds(0.0, limit):  # it requires a difference
        return f"{subject}, but McNemar's test cannot tell the two apart"
    return ""


def check_met(judgements: Sequence[Judgement]) -> None:
    """Raises RequirementError: some are not met."""
    fix = "if the measured value meets the bound, use more held-out rows; otherwise train on more or better rows"
    if problems := [
        Problem(Code.EVALUATE_REQUIREMENT, f"`{one.text}` is not met: {one.reason}", key=OPTION, fix=fix)
        for one in judgements
        if not one.met
    ]:
        raise RequirementError(problems)
