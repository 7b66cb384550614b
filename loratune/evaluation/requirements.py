"""What a user requires of an adapter, so that a pipeline stops where it is not met: `--require 'exact_match>=0.9'`.

A requirement is judged on the cautious end of the 95 % interval: `exact_match>=0.9` asks that the low end be at least
0.9, and `loss<base` that the high end of the paired difference be below 0. So what too few rows cannot show is not met.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loratune.codes import Code
from loratune.config.patterns import shorten
from loratune.data import DatasetSplit
from loratune.data.row_hashes import Overlap
from loratune.errors import ConfigError, DataError, Problem, RequirementError
from loratune.evaluation import comparison, metrics
from loratune.evaluation.metrics import Metric
from loratune.evaluation.results import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    LABEL_ACCURACY,
    LOSS,
    Evaluation,
    Judgement,
)
from loratune.statistics import Interval

OPTION = "--require"
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_FORM = re.compile(r"(?P<figure>.+)(?P<comparison><=|>=|<|>)(?P<bound>[^<>=]+)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_DIFFERENCE = "difference."
_PERPLEXITY, _FORGETTING, _INVALID_JSON = "perplexity", "forgetting", "invalid_json"
_UNBOUNDED = (LOSS, _PERPLEXITY, _FORGETTING)
"""Figures that are no shares of rows, nor means of scores between 0 and 1."""


@dataclass(frozen=True)
class Requirement:
    """One requirement.

    Attributes:
        text: As the user wrote it.
        figure: The name of the figure in an evaluation, or `forgetting`.
        comparison: `<`, `<=`, `>` or `>=`.
        bound: A number, or the model whose figure it is.
        of_difference: Whether it is about how the adapter differs from what it is compared with, in this figure.
    """

    text: str
    figure: str
    comparison: str
    bound: float | str
    of_difference: bool = False


# What is required


def parse(
    values: Sequence[str], asked: Sequence[Metric] = (), *, against: bool = False, forgetting: bool = False
) -> list[Requirement]:
    """The requirements that the option states, each once.

    Args:
        values: Of the option.
        asked: The metrics of the evaluation.
        against: Whether there is another adapter.
        forgetting: Whether it is measured.

    Raises:
        ConfigError: Some are none, or are about what the evaluation will not compute.
    """
    computed = [LOSS, _PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY, *(metric.figure for metric in asked)]
    computed += [_INVALID_JSON] if "json" in computed else []
    computed += [_FORGETTING] if forgetting else []
    requirements, problems = [], list[Problem]()
    for value in dict.fromkeys(values):
        try:
            requirements.append(_parse(value, computed, against=against))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return requirements


def _parse(text: str, computed: Sequence[str], *, against: bool) -> Requirement:
    if (match := _FORM.fullmatch(text.strip())) is None:
        what = f"`{shorten(text)}` is not a figure, one of < <= > >=, and a bound"
        raise _refusal(Code.USAGE_BAD_REQUIREMENT, what, "write it like 'exact_match>=0.9', 'loss<base'")
    name, comparison, bound = (match[part].strip() for part in ("figure", "comparison", "bound"))
    of_difference = name.startswith(_DIFFERENCE)
    figure = _figure(name.removeprefix(_DIFFERENCE), computed, of_difference=of_difference)
    if bound not in (BASE, AGAINST):
        return Requirement(text, figure, comparison, _number(bound, figure, text, of_difference), of_difference)
    if of_difference or figure == _FORGETTING:
        what = f"`{shorten(text)}` compares a difference with a model"
        raise _refusal(Code.USAGE_BAD_REQUIREMENT, what, "give a number")
    if bound == AGAINST and not against:
        what = f"`{shorten(text)}` is about another adapter"
        raise _refusal(Code.USAGE_NEEDS_OPTION, what, "name it with --against DIR")
    return Requirement(text, figure, comparison, bound)


def _figure(name: str, computed: Sequence[str], *, of_difference: bool) -> str:
    """A figure by the name that the user gives. Raises ConfigError: there is none, or it is not computed."""
    figure, is_metric = name, name == _INVALID_JSON
    try:
        figure, is_metric = metrics.parse([name])[0].figure, True
    except ConfigError as error:
        is_metric |= error.problems[0].code is not Code.USAGE_BAD_METRIC  # known, but a package is missing
    if not (of_difference and figure in (_PERPLEXITY, _FORGETTING)):
        if figure in computed:
            return figure
        if figure == _FORGETTING:
            what, fix = "`forgetting` is not measured", "name a text with --forgetting FILE"
            raise _refusal(Code.USAGE_NEEDS_OPTION, what, fix)
        if is_metric:
            fix = f"add {metrics.OPTION} '{'json' if figure == _INVALID_JSON else shorten(figure)}'"
            raise _refusal(Code.USAGE_NEEDS_OPTION, f"`{shorten(figure)}` is not computed", fix)
    near = difflib.get_close_matches(figure, (*computed, _FORGETTING), n=1, cutoff=0.5)
    fix = f"did you mean `{near[0]}`?" if near and near[0] != figure else f"take one of {', '.join(computed)}"
    prefix = _DIFFERENCE if of_difference else ""
    raise _refusal(Code.USAGE_BAD_REQUIREMENT, f"there is no figure `{prefix}{shorten(name)}`", fix)


def _number(bound: str, figure: str, text: str, of_difference: bool) -> float:
    """The number of a bound. Raises ConfigError: it is none, or one that the figure cannot pass."""
    if _NUMBER.fullmatch(bound) is None or not math.isfinite(value := float(bound)):
        what = f"the bound of `{shorten(text)}` is not a finite number"
        raise _refusal(Code.USAGE_BAD_REQUIREMENT, what, f"give one, or `{BASE}` or `{AGAINST}`")
    least = -1 if of_difference else 0
    if figure not in _UNBOUNDED and not least <= value <= 1:
        what = f"the bound of `{shorten(text)}` is not between {least} and 1, as {figure} is"
        raise _refusal(Code.USAGE_OUT_OF_RANGE, what, "90 % is 0.9")
    return value


def _refusal(code: Code, what: str, fix: str) -> ConfigError:
    return ConfigError(Problem(code, what, key=OPTION, fix=fix))


def check_rows(
    requirements: Sequence[Requirement], split: DatasetSplit, overlap: Overlap, *, allow_overlap: bool
) -> None:
    """Check, before a model is loaded, that rows can show what is required.

    Raises:
        DataError: Some are also in train, unless that is allowed; or a requirement is about answers to prompts, and
            no row has one.
    """
    answers = [one for one in requirements if one.figure not in _UNBOUNDED]
    if answers and split.formats == ["text"]:
        what = f"no row has a prompt, so there is no {answers[0].figure}"
        raise DataError(Problem(Code.EVALUATE_NO_PROMPT, what, split.source, OPTION, "give rows with prompts"))
    if overlap.found and not allow_overlap:
        fix = "take rows that it has not seen; or use --allow-overlap"
        raise DataError([Problem(Code.EVALUATE_OVERLAP, what, split.source, OPTION, fix) for what in overlap.remarks()])


# Whether it is met


def judged(evaluation: Evaluation, requirements: Sequence[Requirement]) -> Evaluation:
    """An evaluation with whether each requirement is met, in their order."""
    return replace(evaluation, requirements=[_judge(requirement, evaluation) for requirement in requirements])


def _judge(requirement: Requirement, evaluation: Evaluation) -> Judgement:
    is_model = isinstance(requirement.bound, str)
    value, interval, is_distinguishable = _measured(requirement, evaluation)

    def judgement(reason: str) -> Judgement:
        return Judgement(requirement.text, not reason, value, interval, reason)

    if value is None:
        return judgement("not computed, as no row has a prompt")
    if not math.isfinite(value):
        return judgement("NaN or inf")
    what = "the difference of the loss" if requirement.figure == _PERPLEXITY else "the difference"
    subject = f"{what} to {requirement.bound} is {value:.6g}" if is_model else f"{value:.6g}"
    if interval is None:
        return judgement(f"{subject}, without an interval, for which there are too few rows")
    bound = 0.0 if isinstance(requirement.bound, str) else requirement.bound
    holds, is_strict = _COMPARISONS[requirement.comparison], requirement.comparison in "<>"
    end, which = (interval.high, "high") if "<" in requirement.comparison else (interval.low, "low")
    subject += f", 95 % interval {interval.low:.6g} to {interval.high:.6g}"
    if not holds(end, bound):
        return judgement(f"{subject}, whose {which} end is not {requirement.comparison} {bound:g}")
    if is_model and is_strict and not is_distinguishable:
        return judgement(f"{subject}, but McNemar's test cannot tell the two apart")
    return judgement("")


def _measured(requirement: Requirement, evaluation: Evaluation) -> tuple[float | None, Interval | None, bool]:
    """What a requirement is about, its interval, and whether a difference between models is more than chance."""
    figure = requirement.figure
    if figure == _FORGETTING:
        assert evaluation.forgetting is not None
        return evaluation.forgetting.value, evaluation.forgetting.interval, True
    if not (requirement.of_difference or isinstance(requirement.bound, str)):
        score = evaluation.scores[ADAPTER]
        return score.figure(figure), score.intervals.get(figure), True
    if evaluation.scores[ADAPTER].figure(figure) is None:
        return None, None, True
    figure = LOSS if figure == _PERPLEXITY else figure  # of which it is a rising function
    other = requirement.bound if isinstance(requirement.bound, str) else evaluation.compared_with
    if other == evaluation.compared_with:
        difference = evaluation.differences[figure]
    else:
        difference = comparison.difference(evaluation.rows, figure, other)
    return difference.value, difference.interval, difference.verdict != "indistinguishable"


def check_met(judgements: Sequence[Judgement]) -> None:
    """Raises RequirementError: some are not met."""
    if problems := [
        Problem(Code.EVALUATE_REQUIREMENT, f"`{shorten(one.text)}` is not met: {one.reason}", key=OPTION)
        for one in judgements
        if not one.met
    ]:
        raise RequirementError(problems)
