"""The names of models and metrics, and the metrics that compare an answer with the expected text.

The latter are `--metric contains`, `rouge_l`, `json` and `regex:PATTERN`. `exact_match` and `label` compare tokens and
beginnings, see `answers`; they are always computed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, Pattern, TimeLimit, compile_pattern
from loratune.errors import ConfigError, Problem, missing_package

BASE, ADAPTER, AGAINST, MAJORITY = "base", "adapter", "against", "majority"
"""The names of the models: the base, the adapter on it, the other adapter that it is compared with, and one that always
gives the most frequent of the expected answers, where these are labels."""

LOSS, PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY = "loss", "perplexity", "exact_match", "label_accuracy"
"""The names of the metrics of rows; the last two are None where no row has a prompt."""
FORGETTING, INVALID_JSON = "forgetting", "invalid_json"
REWARD_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY = "reward_accuracy", "reward_margin", "ranking_accuracy"
LOG_PROBABILITY, PREFERRED_LENGTH = "log_probability", "preferred_length"
SIDES = ("chosen", "rejected", "desirable", "undesirable")
LOWER_IS_BETTER = (LOSS, PERPLEXITY, INVALID_JSON)
"""Metrics of which less is better."""
MEANS = ("rouge_l",)
"""Metrics whose scores are fractions; all others are 0 or 1 on a row."""
_WITHOUT_DIRECTION = (*(f"{side}_{LOG_PROBABILITY}" for side in SIDES), PREFERRED_LENGTH)
_UNBOUNDED = (LOSS, PERPLEXITY, FORGETTING, REWARD_MARGIN, *_WITHOUT_DIRECTION)

OPTION = "--metric"
_ALWAYS = {"exact_match": EXACT_MATCH, "label": LABEL_ACCURACY}
_NAMES = "exact_match, label, contains, rouge_l, json, regex:PATTERN"
_WORD = re.compile(r"[^\W_]+")


def has_direction(metric: str) -> bool:
    """Whether more of a metric is better, or less; else a difference has no verdict."""
    return metric not in _WITHOUT_DIRECTION


def is_bounded(metric: str) -> bool:
    """Whether a metric is a share of rows, or a mean of scores between 0 and 1."""
    return metric not in _UNBOUNDED


def sides(*, paired: bool) -> tuple[str, str]:
    """What the better and the worse answers are called: of pairs, or of unpaired preferences."""
    return SIDES[:2] if paired else SIDES[2:]


def metrics_of(*, paired: bool) -> tuple[str, ...]:
    """The names of the metrics of pairs, or of unpaired preferences."""
    own = [f"{side}_{LOG_PROBABILITY}" for side in sides(paired=paired)]
    return REWARD_ACCURACY, REWARD_MARGIN, *((RANKING_ACCURACY, *own, PREFERRED_LENGTH) if paired else own)


class ExpectedTextError(ValueError):
    """A metric says nothing about rows with such an expected text; the message says why."""


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        name: Of its mean over rows, and of its score on a row.
        scores: From the expected text and the answer to metric → score, the metric's own among them. It raises
            `ExpectedTextError`, and `BadPatternError` if it takes too long. None for those that every evaluation has.
    """

    name: str
    scores: Callable[[str, str], Mapping[str, float]] | None


def parse(values: Sequence[str]) -> list[Metric]:
    """The metrics that an option names, each once.

    Raises:
        ConfigError: A name is unknown; an expression is not valid; a package is missing.
    """
    return [_parse(value) for value in dict.fromkeys(values)]


def _parse(value: str) -> Metric:
    if value in _ALWAYS:
        return Metric(_ALWAYS[value], None)
    if value in ("contains", "json"):
        return Metric(value, _contains_scores if value == "contains" else _json_scores)
    if value == "rouge_l":
        return Metric(value, _rouge_l())
    name, _, text = value.partition(":")
    if name != "regex" or not text:
        what, fix = f"`{value}` is not a metric", f"take one of {_NAMES}"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key=OPTION, fix=fix))
    try:
        return Metric(value, partial(_regex_scores, value, compile_pattern(text)))
    except BadPatternError as error:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"`{text}` {error}", key=OPTION)) from None


def _rouge_l() -> Callable[[str, str], Mapping[str, float]]:
    """ROUGE-L as an F1 score over words (C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004), by
    Google's package, without stemming. Its own tokenizer drops all letters but a to z; here words are of any script."""
    if find_spec("rouge_score") is None:
        code, purpose = Code.SYSTEM_MISSING_PACKAGE, "computes rouge_l"
        raise ConfigError(missing_package(code, "rouge-score", purpose, "eval", key=OPTION))
    words = SimpleNamespace(tokenize=lambda text: _WORD.findall(text.lower()))
    scorer = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=words)

    def scores(expected: str, answer: str) -> Mapping[str, float]:
        if _WORD.search(expected) is None:
            raise ExpectedTextError("the expected text has no words")
        return {"rouge_l": float(scorer.score(expected, answer)["rougeL"].fmeasure)}

    return scores


def _contains_scores(expected: str, answer: str) -> Mapping[str, float]:
    """Whether the answer contains the expected text. Any answer contains an empty text, which says nothing."""
    if not (text := expected.strip()):
        raise ExpectedTextError("the expected text is empty")
    return {"contains": float(text in answer)}


def _json_scores(expected: str, answer: str) -> Mapping[str, float]:
    """Whether both are JSON with the same value, whatever its spaces and the order of its keys; and whether the answer
    is not JSON."""
    try:
        value = _json_value(expected)
    except ValueError as error:
        raise ExpectedTextError("the expected text is not JSON") from error
    try:
        return {"json": float(_json_value(answer) == value), INVALID_JSON: 0.0}
    except ValueError:
        return {"json": 0.0, INVALID_JSON: 1.0}


def _json_value(text: str) -> Any:
    """The value of a JSON text, such that == compares as JSON does: true is not 1, and 1 is 1.0. Numbers of any size
    and precision are themselves. Raises ValueError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def tagged(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tagged(member) for key, member in value.items()}
        if isinstance(value, list):
            return [tagged(member) for member in value]
        return (value,) if isinstance(value, bool) else value

    try:
        return tagged(json.loads(text, parse_constant=refuse, parse_int=Decimal, parse_float=Decimal))
    except InvalidOperation:
        raise ValueError("it has a number beyond 1e999999999999999999") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _regex_scores(metric: str, pattern: Pattern, expected: str, answer: str) -> Mapping[str, float]:
    """Whether an expression finds the same in both."""
    value = _found(pattern, expected)
    if value is None:
        raise ExpectedTextError("the expression finds nothing in the expected text")
    return {metric: float(_found(pattern, answer) == value)}


def _found(pattern: Pattern, text: str) -> str | None:
    """What the first match has in its first group that is not empty, or else the whole match; None without a match, and
    where it is empty, as `[0-9]*` matches the beginning of any text.

    lm-evaluation-harness's filter `regex` does the same (lm_eval/filters/extraction.py).
    """
    match = TimeLimit()(pattern.search, text)
    return None if match is None else next(filter(None, match.groups()), match.group()).strip() or None
