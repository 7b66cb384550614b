"""What a comparison consists of: models, metrics with intervals, rows, and what each model does on them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratune.compare.preferences import LOG_PROBABILITY, PREFERRED_LENGTH, REWARD_MARGIN, SIDES
from loratune.statistics import Interval, finite
from loratune.system.records import with_own_fields

BASE, ADAPTER, AGAINST, MAJORITY = "base", "adapter", "against", "majority"
"""The names of the models: the base, the adapter on it, the other adapter that it is compared with, and one that always
gives the most frequent of the expected answers, where these are labels."""

LOSS, PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY = "loss", "perplexity", "exact_match", "label_accuracy"
"""The names of the metrics of rows; the last two are None where no row has a prompt."""
LOWER_IS_BETTER = (LOSS, PERPLEXITY, "invalid_json")
"""Metrics of which less is better."""
_WITHOUT_DIRECTION = (*(f"{side}_{LOG_PROBABILITY}" for side in SIDES), PREFERRED_LENGTH)


def has_direction(metric: str) -> bool:
    """Whether more of a metric is better, or less; else a difference has no verdict."""
    return metric not in _WITHOUT_DIRECTION


def is_bounded(metric: str) -> bool:
    """Whether a metric is a share of rows, or a mean of scores between 0 and 1."""
    return metric not in (LOSS, PERPLEXITY, REWARD_MARGIN, *_WITHOUT_DIRECTION)


@dataclass(frozen=True)
class ModelAnswer:
    """What one model does on one row.

    Attributes:
        loss: Summed over the supervised tokens of the row; of answers that are compared, that of the pair or answer.
        text: The greedy answer, without the token that ends it; None where the row has no prompt, or has answers that
            are compared.
        scores: Metric → what the row adds to it; empty where there is no prompt to answer.
    """

    loss: float
    text: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ComparedAnswer:
    """An answer of a preference row: its text and its number of tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class ComparedRow:
    """One distinct row, or pair of answers, and what each model does on it.

    Attributes:
        number: Its number among the rows that were not dropped, from 0; of copies, that of the first.
        where: Its place in its file.
        copies: How many rows are this one, itself included.
        prompt: The prompt as text, as the model reads it; None where the row has none.
        expected: The text that is expected as the answer; None where the row has no prompt, or compares answers.
        tokens: Supervised tokens.
        answers: Model → what it does; `base`, `adapter`, and `against` if there is one.
        compared: `chosen` and `rejected`, or one of `desirable` and `undesirable` → the answer that is compared; empty
            for other rows.
        elsewhere: The places of its copies, without its own.
        fields: The row's own fields as plain values; empty where they are not asked for.
    """

    number: int
    where: str
    copies: int
    prompt: str | None
    expected: str | None
    tokens: int
    answers: Mapping[str, ModelAnswer] = field(default_factory=dict)
    compared: Mapping[str, ComparedAnswer] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def at_places(self, fields: Mapping[str, Mapping[str, Any]]) -> Iterator["ComparedRow"]:
        """The row, and then its copies, each at its own place and with its own fields. fields: place → fields."""
        for place in (self.where, *self.elsewhere):
            yield replace(self, where=place, fields=fields[place])

    @property
    def item(self) -> str:
        """What it is: `row`, or `pair` or `answer` where answers are compared."""
        return ("row", "answer", "pair")[len(self.compared)]

    @property
    def unit(self) -> str:
        """What the loss is a mean over: `token`, `pair` or `answer`."""
        return self.item if self.compared else "token"

    @property
    def count(self) -> int:
        """Over how many of these the loss of the row is summed."""
        return 1 if self.compared else self.tokens

    def worsening(self, model: str, compared_with: str) -> float:
        """By how much the loss of a model is higher on the row than that of another one, for each `unit`."""
        return (self.answers[model].loss - self.answers[compared_with].loss) / self.count

    def as_json(self) -> dict[str, Any]:
        """Plain values, behind the row's own fields: see `with_own_fields`. A number that is not finite is null."""
        values: dict[str, Any] = {
            "number": self.number, "where": self.where, "copies": self.copies, "prompt": self.prompt,
        }  # fmt: skip
        values |= {side: one.text for side, one in self.compared.items()}
        values |= {} if self.compared else {"expected": self.expected}
        values |= {"tokens": self.tokens, **{f"{side}_tokens": one.tokens for side, one in self.compared.items()}}
        for name, answer in self.answers.items():
            said = {} if self.compared else {"answer": answer.text}
            scores = {metric: finite(value) for metric, value in answer.scores.items()}
            values[name] = said | {"loss": finite(answer.loss / self.count)} | scores
        return with_own_fields(self.fields, values)


@dataclass(frozen=True)
class Score:
    """How well one model does on the rows.

    Attributes:
        metrics: Metric → its value: the loss, which is a mean over supervised tokens, or over pairs or answers that are
            compared; e to the power of a loss per token as `perplexity`, inf where that is beyond a float; the share of
            rows whose greedy completion is the expected text and then ends as `exact_match`, and of those whose
            completion begins with it, whatever follows, as `label_accuracy`, both None where no row has a prompt;
            further metrics; and those of `preference_figures`.
        rows: How many rows there are.
        tokens: Supervised tokens.
        intervals: Metric → its 95 % interval, None where there are too few rows for one.
    """

    metrics: Mapping[str, float | None]
    rows: int
    tokens: int
    intervals: Mapping[str, Interval | None] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """A metric by its name; None where it was not computed."""
        return self.metrics.get(name)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Metrics that are not finite are null, as JSON has no word for them."""
        metrics = {name: finite(value) for name, value in self.metrics.items()}
        intervals = {
            name: [finite(interval.low), finite(interval.high)] if interval else None
            for name, interval in self.intervals.items()
        }
        return metrics | {"rows": self.rows, "tokens": self.tokens, "intervals": intervals}


@dataclass(frozen=True)
class Judgement:
    """Whether a requirement is met; see `requirements`.

    Attributes:
        text: The requirement, as the user wrote it.
        met: Whether it is met.
        value: What it is about: the metric, or the difference to a model; None where it was not computed.
        interval: The 95 % interval of that, whose cautious end decides.
        reason: Why it is not met; empty if it is.
    """

    text: str
    met: bool
    value: float | None
    interval: Interval | None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, but for the reason, which the others say."""
        ends = (self.interval.low, self.interval.high) if self.interval else (None, None)
        numbers = dict(zip(("value", "low", "high"), (self.value, *ends), strict=True))
        return {"text": self.text, "met": self.met, **{name: finite(one) for name, one in numbers.items()}}
