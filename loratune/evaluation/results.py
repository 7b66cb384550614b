"""What an evaluation came to: the figures of each model with their intervals, how they differ, and the rows behind."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from loratune.statistics import Interval, finite
from loratune.system.records import with_own_fields
from loratune.training.preference_figures import LOG_PROBABILITY, PREFERRED_LENGTH, REWARD_MARGIN, SIDES

if TYPE_CHECKING:
    from loratune.training.collapse import PromptSensitivity
    from loratune.training.objectives import Formula

BASE, ADAPTER, AGAINST, MAJORITY = "base", "adapter", "against", "majority"
"""The names of the models: the base, the adapter on it, the other adapter that it is compared with, and one that always
gives the most frequent of the expected answers, where these are labels."""

LOSS, PERPLEXITY, EXACT_MATCH, LABEL_ACCURACY = "loss", "perplexity", "exact_match", "label_accuracy"
"""The names of the figures of rows; the last two are None where no row has a prompt."""
LOWER_IS_BETTER = (LOSS, PERPLEXITY, "invalid_json")
"""Figures of which less is better."""


_WITHOUT_DIRECTION = (*(f"{side}_{LOG_PROBABILITY}" for side in SIDES), PREFERRED_LENGTH)


def has_direction(figure: str) -> bool:
    """Whether more of a figure is better, or less; else a difference has no verdict."""
    return figure not in _WITHOUT_DIRECTION


def is_bounded(figure: str) -> bool:
    """Whether a figure is a share of rows, or a mean of scores between 0 and 1."""
    return figure not in (LOSS, PERPLEXITY, REWARD_MARGIN, *_WITHOUT_DIRECTION)


Verdict = Literal["better", "worse", "indistinguishable"]


@dataclass(frozen=True)
class ModelAnswer:
    """What one model does on one row.

    Attributes:
        loss: Summed over the supervised tokens of the row; of answers that are compared, that of the pair or answer.
        text: The greedy answer, without the token that ends it; None where the row has no prompt, or has answers that
            are compared.
        scores: Figure → what the row adds to it; empty where there is no prompt to answer.
    """

    loss: float
    text: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ComparedAnswer:
    """An answer that stands in a row, to be compared with another one, or judged: its text, and its tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class EvaluatedRow:
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

    def at_places(self, fields: Mapping[str, Mapping[str, Any]]) -> Iterator["EvaluatedRow"]:
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
            scores = {figure: finite(value) for figure, value in answer.scores.items()}
            values[name] = said | {"loss": finite(answer.loss / self.count)} | scores
        return with_own_fields(self.fields, values)


@dataclass(frozen=True)
class Score:
    """How well one model does on the rows.

    Attributes:
        figures: Figure → its value: the loss, which is a mean over supervised tokens, or over pairs or answers that are
            compared; e to the power of a loss per token as `perplexity`, inf where that is beyond a float; the share of
            rows whose greedy completion is the expected text and then ends as `exact_match`, and of those whose
            completion begins with it, whatever follows, as `label_accuracy`, both None where no row has a prompt;
            further metrics; and those of `preference_figures`.
        rows: How many rows there are.
        tokens: Supervised tokens.
        intervals: Figure → its 95 % interval, None where there are too few rows for one.
    """

    figures: Mapping[str, float | None]
    rows: int
    tokens: int
    intervals: Mapping[str, Interval | None] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """A figure by its name; None where it was not computed."""
        return self.figures.get(name)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Figures that are not finite are null, as JSON has no word for them."""
        figures = {name: finite(value) for name, value in self.figures.items()}
        intervals = {
            name: [finite(interval.low), finite(interval.high)] if interval else None
            for name, interval in self.intervals.items()
        }
        return figures | {"rows": self.rows, "tokens": self.tokens, "intervals": intervals}


@dataclass(frozen=True)
class Difference:
    """A figure of the adapter less that of what it is compared with, on the same rows.

    For a difference between shares of rows, the verdict needs both: McNemar's p below 0.05, and an interval without 0.

    Attributes:
        value: The difference.
        interval: Its paired 95 % interval; None where there are too few rows.
        p: The exact p of McNemar's test over distinct rows, for figures that are shares of rows; None for others.
        verdict: What it means for the adapter; None where there is no interval, or where neither more nor less of the
            figure is better.
        rows_needed: About how many distinct rows would tell the two apart, where these do not; None if not known, as
            where the difference is 0.
    """

    value: float
    interval: Interval | None
    p: float | None = None
    verdict: Verdict | None = None
    rows_needed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, `low` and `high` among them, and `rows_needed` where rows do not tell the two apart."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        values: dict[str, Any] = {"value": finite(self.value), "low": low, "high": high}
        values |= {"p": self.p} if self.p is not None else {}
        return values | ({"rows_needed": self.rows_needed} if self.verdict == "indistinguishable" else {})


@dataclass(frozen=True)
class Judgement:
    """Whether a requirement is met; see `requirements`.

    Attributes:
        text: The requirement, as the user wrote it.
        met: Whether it is met.
        value: What it is about: the figure, or the difference to a model; None where it was not computed.
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


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task.

    Attributes:
        values: Model → the figure as the harness computes it.
        intervals: Model → its 95 % interval. None where there are too few documents, or the figure is none that comes
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
        """Plain values; figures that are not finite are null."""
        plain: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        plain["intervals"] = {name: interval and interval.as_json() for name, interval in self.intervals.items()}
        plain |= {"stderr": dict(self.errors)} if self.errors else {}
        return plain | {"difference": self.difference.as_json(), "verdict": self.difference.verdict, "rows": self.rows}


@dataclass(frozen=True)
class TaskResults:
    """What the harness found.

    Attributes:
        tasks: Task, or group of tasks → metric → figure. A metric of a filter other than `none` is `metric,filter`.
        limit: How many documents of each task were taken at most; None for all.
        chat: Whether prompts went through the chat template.
        version: Of the harness.
        remarks: Lines for the user.
        requirements: Whether what the user requires is met, where nothing but tasks was run.
    """

    tasks: Mapping[str, Mapping[str, TaskFigure]]
    limit: int | None
    chat: bool
    version: str
    remarks: Sequence[str] = ()
    requirements: Sequence[Judgement] = ()

    def figures(self) -> dict[str, TaskFigure]:
        """`TASK.METRIC` → figure."""
        return {f"{task}.{name}": figure for task, metrics in self.tasks.items() for name, figure in metrics.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain values, in keys of their own beside those of an evaluation on rows."""
        tasks = {
            task: {name: figure.as_json() for name, figure in metrics.items()} for task, metrics in self.tasks.items()
        }
        values = {"tasks": tasks, "limit": self.limit, "chat_template": self.chat, "lm_eval": self.version}
        required = [one.as_json() for one in self.requirements]
        return values | ({"requirements": required} if required else {})


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation found.

    Attributes:
        scores: Model → how well it does: `base`, `adapter`, and `against` and `majority` if there are such.
        differences: Figure → how the adapter differs from what it is compared with.
        compared_with: What that is: `base`, or `against` where another adapter is given.
        metric: The figure that the verdict is about.
        verdict: Of the adapter; None where there are too few rows for one.
        rows: The distinct rows, in the order of the split.
        forgetting: Loss of the adapter less that of the base on unrelated text, in nats per token; None if not asked.
        remarks: Lines for the user: rows that were cut or dropped, too few rows for an interval, rows also in train.
        others: Model → figure → how the adapter differs from that model, for those that it is not compared with.
        majority: The most frequent of the expected answers; None where these are not labels.
        tasks: What tasks of the lm-evaluation-harness came to; None if not asked.
        overlap: How many rows there are, as read, and how many of them are also in train; None if that is not known.
        requirements: Whether what the user requires is met.
        objective: That whose the loss and the rewards of compared answers are; None for other rows.
        sensitivity: Whether the predictions of the adapter depend on its prompts; None where that was not measured.
        collapsed: Why the adapter is not a result of training, whatever its metrics are, as the rest of a sentence on
            it; empty if it is one.
        special_tokens: Those that may stand in prompts, as text.
        computed_by: How losses were computed: dtype, layers and batches; see `losses.computed_by`.
    """

    scores: Mapping[str, Score]
    differences: Mapping[str, Difference]
    compared_with: str
    metric: str
    verdict: Verdict | None
    rows: Sequence[EvaluatedRow]
    forgetting: Difference | None = None
    remarks: Sequence[str] = ()
    others: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    majority: str | None = None
    tasks: TaskResults | None = None
    overlap: Mapping[str, int] | None = None
    requirements: Sequence[Judgement] = ()
    objective: "Formula | None" = None
    sensitivity: "PromptSensitivity | None" = None
    collapsed: str = ""
    special_tokens: Sequence[str] = ()
    computed_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the loss is a mean over, see `EvaluatedRow`."""
        return self.rows[0].unit

    @property
    def item(self) -> str:
        """What the rows are, see `EvaluatedRow`."""
        return self.rows[0].item

    def paired(self) -> dict[str, Mapping[str, Difference]]:
        """Model → figure → how the adapter differs from that model; what it is compared with comes first."""
        return {self.compared_with: self.differences, **self.others}

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the rows."""
        values: dict[str, Any] = {name: score.as_json() for name, score in self.scores.items()}
        if self.majority is not None:
            values[MAJORITY]["answer"] = self.majority
        for model, differences in self.paired().items():
            key = "difference" if model == self.compared_with else f"difference_from_{model}"
            values[key] = {name: difference.as_json() for name, difference in differences.items()}
        if self.forgetting is not None:
            values["forgetting"] = self.forgetting.as_json()
        verdict = "collapsed" if self.collapsed else self.verdict
        values |= {"metric": self.metric, "verdict": verdict, "overlap": self.overlap}
        values |= {"computed_by": dict(self.computed_by)}
        values |= {"prompt_sensitivity": self.sensitivity and self.sensitivity.as_json()}
        values |= {"objective": self.objective.numbers()} if self.objective else {}
        required = [one.as_json() for one in self.requirements]
        values |= {"requirements": required} if required else {}
        return values | (self.tasks.as_json() if self.tasks is not None else {})
