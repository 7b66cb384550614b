"""The metrics of a comparison: their names, losses of rows, differences between two models, and scores of answers.

Comparisons of two models are paired, on the same rows. Every distinct row counts as one row of the sample, weighted by
its number of copies, as copies add no information. So intervals of proportions use Kish's effective sample size, see
`statistics.effective_rows`. Without copies that is the number of rows.

`--metric contains`, `rouge_l`, `json` and `regex:PATTERN` compare answers with the expected text, and `tool_call` their
calls, see `tool_calls`. `exact_match` and `label` compare tokens and beginnings, see `answers`; they are always
computed.
"""

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from loratune import statistics
from loratune.codes import Code
from loratune.config.expressions import BadPatternError, Pattern, TimeLimit, compile_pattern
from loratune.errors import ConfigError, Problem, missing_package
from loratune.statistics import Interval, finite, loss_interval, mean_ratio

BASE, ADAPTER, AGAINST, MAJORITY, PROMPTED = "base", "adapter", "against", "majority", "prompted"
"""The names of the models: the base, the adapter, another adapter to compare with, a baseline that always gives the
most frequent expected answer, if answers are labels, and the base with a prompt that tells it the task."""
BASELINES = (MAJORITY, PROMPTED)
"""Models of which only answers are known, and no losses."""

LOSS, PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY = "loss", "perplexity", "exact_match", "label_accuracy"
"""The names of the metrics of rows; the last two are None if no row has a prompt."""
ACCURACY, LOG_LOSS, BRIER = "accuracy", "log_loss", "brier"
"""Metrics of labels: whether the most probable one is the expected one, and how probable that is."""
FORGETTING, REASONS, INVALID_JSON = "forgetting", "reasons", "invalid_json"
TOOL_CALL = "tool_call"
CALL_ERRORS = ("invalid_call", "missing_call", "wrong_function", "wrong_argument", "needless_call")
"""What may be wrong with the calls of an answer. The last is a share of the rows that expect none, the others of those
that expect one."""
REWARD_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY = "reward_accuracy", "reward_margin", "ranking_accuracy"
LOG_PROBABILITY, PREFERRED_LENGTH = "log_probability", "preferred_length"
SIDES = ("chosen", "rejected", "desirable", "undesirable")
LOWER_IS_BETTER = (LOSS, PERPLEXITY, INVALID_JSON, LOG_LOSS, BRIER, *CALL_ERRORS)
"""Metrics for which lower is better."""
MEANS = ("rouge_l",)
"""Bounded metrics whose row scores are fractions; the scores of other bounded metrics are 0 or 1."""
_WITHOUT_DIRECTION = (*(f"{side}_{LOG_PROBABILITY}" for side in SIDES), PREFERRED_LENGTH)
_UNBOUNDED = (LOSS, PERPLEXITY, FORGETTING, LOG_LOSS, BRIER, REWARD_MARGIN, *_WITHOUT_DIRECTION)

OPTION = "metrics"
_ALWAYS = {"exact_match": EXACT_MATCH, "label": LABEL_ACCURACY}
_NAMES = "exact_match, label, contains, rouge_l, json, tool_call, regex:PATTERN"
_WORD = re.compile(r"[^\W_]+")


def has_direction(metric: str) -> bool:
    """Whether higher or lower values of a metric are better; if not, its difference has no verdict."""
    return metric not in _WITHOUT_DIRECTION


def is_bounded(metric: str) -> bool:
    """Whether a metric is a proportion of rows, or a mean of scores between 0 and 1."""
    return metric not in _UNBOUNDED


def sides(*, paired: bool) -> tuple[str, str]:
    """The names of the better and the worse answers, for pairs or unpaired preferences."""
    return SIDES[:2] if paired else SIDES[2:]


def metrics_of(*, paired: bool) -> tuple[str, ...]:
    """The names of the metrics for pairs or unpaired preferences."""
    own = [f"{side}_{LOG_PROBABILITY}" for side in sides(paired=paired)]
    return REWARD_ACCURACY, REWARD_MARGIN, *((RANKING_ACCURACY, *own, PREFERRED_LENGTH) if paired else own)


# Losses of rows, and differences between two models

Values = NDArray[np.float64]
Sample = tuple[Values, Values]
"""Totals and counts of rows; the ratio of their sums is a mean."""
Verdict = Literal["better", "worse", "indistinguishable"]

SIGNIFICANT = 0.05
"""The p-value of McNemar's test below which two proportions differ significantly."""
_MOST_BYTES = 1 << 22
"""The maximum bytes of unpacked row losses."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """The losses of one model on some rows, or on preference pairs or answers; arrays (rows,).

    Attributes:
        nats: The loss of each row, summed over its supervised tokens; for preferences, the loss of the objective.
        tokens: Supervised tokens of each row; 1 for preferences.
        copies: How often each row counts: its copies, which have the same loss, or its weight.
    """

    nats: Values
    tokens: Values
    copies: Values

    @classmethod
    def of(cls, nats: Sequence[float], tokens: Sequence[float], copies: Sequence[float] | None = None) -> Self:
        """Create it from plain numbers. copies: by default 1 for each row."""
        times = np.ones(len(nats)) if copies is None else copies
        return cls(*(np.asarray(one, np.float64) for one in (nats, tokens, times)))

    def __len__(self) -> int:
        return len(self.nats)

    @property
    def totals(self) -> Values:
        """(rows,), nats times copies."""
        return self.copies * self.nats

    @property
    def counts(self) -> Values:
        """(rows,), tokens times copies."""
        return self.copies * self.tokens

    @property
    def loss(self) -> float:
        """The mean over all tokens, pairs or answers; independent of the order of the rows."""
        return mean_ratio(self.totals, self.counts)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the loss; None for too few rows."""
        return loss_interval(self.totals, self.counts)

    def take(self, order: Sequence[int]) -> "RowLosses":
        """The losses of some rows, in this order."""
        return RowLosses(self.nats[order], self.tokens[order], self.copies[order])

    def of_rows(self, owners: NDArray[np.int64]) -> "RowLosses":
        """The losses of rows, from the losses of their blocks. owners: (blocks,), increasing numbers of their rows."""
        _, rows = np.unique(owners, return_inverse=True)
        copies = np.bincount(rows, self.copies) / np.bincount(rows)
        return RowLosses(np.bincount(rows, self.totals) / copies, np.bincount(rows, self.counts) / copies, copies)

    def packed(self) -> str:
        """The losses as text of about five bytes per row, with the precision of float32."""
        raw = np.stack([self.nats, self.tokens, self.copies]).astype(np.float32).tobytes()
        return base64.b85encode(zlib.compress(raw)).decode()

    @classmethod
    def unpacked(cls, text: str) -> "RowLosses":
        """The losses from text written by `packed`. Raises ValueError: the text is not valid."""
        try:
            raw = zlib.decompressobj().decompress(base64.b85decode(text), _MOST_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        made = cls(*np.frombuffer(raw, dtype=np.float32).reshape(3, -1).astype(np.float64))
        if not (len(made.nats) and made.is_finite and (made.tokens > 0).all() and (made.copies > 0).all()):
            raise ValueError("these are not losses of rows")
        return made

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite, also in float32, as `packed` writes them."""
        with np.errstate(over="ignore"):
            return all(np.isfinite(one.astype(np.float32)).all() for one in (self.nats, self.tokens, self.copies))

    def has_rows_of(self, other: "RowLosses") -> bool:
        """Whether other losses are of the same rows, judged by tokens and copies."""
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(self.copies, other.copies)


@dataclass(frozen=True)
class Difference:
    """The paired difference of a metric on the same rows: adapter minus the model it is compared with.

    A difference between proportions is significant only if McNemar's p is below 0.05 and the interval excludes 0.

    Attributes:
        value: The difference.
        interval: Its paired 95 % interval; None if there are too few rows.
        p: The exact p-value of McNemar's test over distinct rows, for metrics that are proportions; None for others.
        verdict: The verdict on the adapter; None without an interval, or if neither higher nor lower values are better.
        rows_needed: The estimated number of distinct rows for a significant difference, if it is not significant; None
            if unknown, for example if the difference is 0.
    """

    value: float
    interval: Interval | None
    p: float | None = None
    verdict: Verdict | None = None
    rows_needed: int | None = None

    @property
    def is_distinguishable(self) -> bool:
        """Whether the difference is significant. The metric of a task may have a p-value without a verdict."""
        return self.verdict != "indistinguishable" and (self.p or 0.0) < SIGNIFICANT

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with `low` and `high`, and with `rows_needed` if the difference is not significant."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        values: dict[str, Any] = {"value": finite(self.value), "low": low, "high": high}
        values |= {"p": self.p} if self.p is not None else {}
        return values | ({"rows_needed": self.rows_needed} if self.verdict == "indistinguishable" else {})


def loss_difference(base: RowLosses, adapter: RowLosses) -> Difference:
    """The paired difference of losses on the same rows: adapter minus base, or another model."""
    return mean_difference([(adapter.totals - base.totals, adapter.counts)], lower_is_better=True)


def mean_difference(samples: Sequence[Sample], *, lower_is_better: bool) -> Difference:
    """A difference that is a ratio of two sums over rows; for several groups of rows, a sum of such ratios.

    samples: for each group, the difference of a metric on each row, (rows,), and counts above 0.
    """
    value = sum(mean_ratio(*sample) for sample in samples)
    return difference_with_verdict(value, sum_interval(samples), samples, lower_is_better)


def sum_interval(samples: Sequence[Sample]) -> Interval | None:
    """The interval of a ratio of two sums over rows; for several groups of rows, of the sum of their ratios."""
    of_one = len(samples) == 1
    return statistics.mean_ratio_interval(*samples[0]) if of_one else statistics.sum_of_ratios_interval(samples)


def score_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """The difference of two means of scores: second minus first. first, second: (rows,), 0 to 1. weights: copies."""
    sample = weights * (second - first), weights
    interval = statistics.bounded_difference_interval(second - first, weights)
    return difference_with_verdict(mean_ratio(*sample), interval, [sample], lower_is_better)


def share_difference(first: Values, second: Values, weights: Values, *, lower_is_better: bool) -> Difference:
    """The difference of two proportions: second minus first. first, second: (rows,), 0 or 1. weights: their copies."""
    rows = statistics.effective_rows(weights)
    shares = [float(weights[one > other].sum() / weights.sum()) for one, other in ((first, second), (second, first))]
    first_only, second_only = (share * rows for share in shares)
    interval = statistics.share_difference_interval(first_only, second_only, rows)
    lost, won = int((first > second).sum()), int((second > first).sum())
    p, value = statistics.mcnemar(lost, won), shares[1] - shares[0]
    agree = (won - lost) * value > 0  # p counts distinct rows, value counts copies: their signs may differ
    verdict = _verdict(value, interval, lower_is_better) if p < SIGNIFICANT and agree else "indistinguishable"
    needed = None
    if verdict == "indistinguishable":
        needed = _rows_needed(value, statistics.share_difference_error(first_only, second_only, rows), round(rows))
    return Difference(value, interval, p, verdict, needed)


def difference_with_verdict(
    value: float, interval: Interval | None, samples: Sequence[Sample], lower_is_better: bool
) -> Difference:
    """A difference with its verdict. samples: totals and counts of rows; their ratios have the same standard error."""
    verdict = _verdict(value, interval, lower_is_better)
    needed = None
    if verdict == "indistinguishable":
        error = math.hypot(*(statistics.mean_ratio_error(*sample) for sample in samples))
        needed = _rows_needed(value, error, sum(len(totals) for totals, _ in samples))
    return Difference(value, interval, None, verdict, needed)


def _verdict(value: float, interval: Interval | None, lower_is_better: bool) -> Verdict | None:
    if interval is None:
        return None
    if interval.low <= 0 <= interval.high:
        return "indistinguishable"
    return "better" if (value < 0) == lower_is_better else "worse"


def _rows_needed(value: float, error: float, rows: int) -> int | None:
    """The estimated number of rows for a significant difference, more than `rows`."""
    needed = statistics.rows_needed(value, error, rows)
    return needed and max(needed, rows + 1)


def exp(value: float) -> float:
    """e to the power of a value; inf on overflow."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


# Scores of answers


class ExpectedTextError(ValueError):
    """An expected text for which a metric is undefined; the message says why."""


@dataclass(frozen=True)
class Metric:
    """A metric of answers.

    Attributes:
        name: The name of its mean over rows, and of its score on a row.
        scores: Function of the expected text and the answer that returns metric → score, including the metric itself.
            Raises `ExpectedTextError`, and `BadPatternError` on timeout. None for metrics that are always computed, and
            for `TOOL_CALL`.
    """

    name: str
    scores: Callable[[str, str], Mapping[str, float]] | None


def parse_metrics(values: Sequence[str]) -> list[Metric]:
    """The metrics named by an option, without duplicates.

    Raises:
        ConfigError: A name is unknown; an expression is not valid; a package is missing.
    """
    return [_parse(value) for value in dict.fromkeys(values)]


def _parse(value: str) -> Metric:
    if value in _ALWAYS:
        return Metric(_ALWAYS[value], None)
    if value == TOOL_CALL:
        return Metric(value, None)
    if value in ("contains", "json"):
        return Metric(value, _contains_scores if value == "contains" else _json_scores)
    if value == "rouge_l":
        return Metric(value, _rouge_l())
    name, _, text = value.partition(":")
    if name != "regex" or not text:
        what, fix = f"`{value}` is not a metric", f"take one of {_NAMES}"
        if value in ("accuracy", "acc", "f1"):
            fix = "did you mean `label`, for answers that are classes, or `exact_match`?"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key=OPTION, fix=fix))
    try:
        return Metric(value, partial(_regex_scores, value, compile_pattern(text)))
    except BadPatternError as error:
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"`{text}` {error}", key=OPTION)) from None


def _rouge_l() -> Callable[[str, str], Mapping[str, float]]:
    """ROUGE-L as an F1 score over words (C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004), by
    Google's package, without stemming. Words may be of any script; the package's tokenizer keeps only letters a to z.
    """
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
    """Whether the answer contains the expected text. Raises ExpectedTextError: the expected text is empty."""
    if not (text := expected.strip()):
        raise ExpectedTextError("the expected text is empty")
    return {"contains": float(text in answer)}


def _json_scores(expected: str, answer: str) -> Mapping[str, float]:
    """Whether both texts are JSON with the same value, regardless of whitespace and key order; and whether the answer
    is not JSON."""
    try:
        value, _ = read_json(expected)
    except ValueError as error:
        raise ExpectedTextError("the expected text is not JSON") from error
    try:
        return {"json": float(read_json(answer)[0] == value), INVALID_JSON: 0.0}
    except ValueError:
        return {"json": 0.0, INVALID_JSON: 1.0}


def read_json(text: str, place: int | None = None) -> tuple[Any, int]:
    """The value of a JSON text, or of the one that begins at a place in a text, and where it ends.

    Values are such that == follows JSON: true differs from 1, and 1 equals 1.0. Of several members of one name, the
    last counts. Raises ValueError.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def tagged(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tagged(member) for key, member in value.items()}
        if isinstance(value, list):
            return [tagged(member) for member in value]
        return (value,) if isinstance(value, bool) else value

    decoder = json.JSONDecoder(parse_constant=refuse, parse_int=Decimal, parse_float=Decimal)
    try:
        value, end = (decoder.decode(text), len(text)) if place is None else decoder.raw_decode(text, place)
        return tagged(value), end
    except InvalidOperation:
        raise ValueError("it has a number beyond 1e999999999999999999") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _regex_scores(metric: str, pattern: Pattern, expected: str, answer: str) -> Mapping[str, float]:
    """Whether an expression extracts the same text from both."""
    value = _found(pattern, expected)
    if value is None:
        raise ExpectedTextError("the expression finds nothing in the expected text")
    return {metric: float(_found(pattern, answer) == value)}


def _found(pattern: Pattern, text: str) -> str | None:
    """The first non-empty group of the first match, or else the whole match; None if there is no match or it is empty,
    as for `[0-9]*`, which matches at the beginning of any text.

    lm-evaluation-harness's filter `regex` does the same (lm_eval/filters/extraction.py).
    """
    match = TimeLimit()(pattern.search, text)
    return None if match is None else next(filter(None, match.groups()), match.group()).strip() or None
