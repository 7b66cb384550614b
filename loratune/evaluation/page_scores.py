"""What an evaluation found, as the tables and rows of a report's page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratune.evaluation.results import ADAPTER, AGAINST, BASE, Difference, EvaluatedRow, Evaluation, Score

MOST_ROWS = 50
"""Rows whose answers are shown."""
LONGEST_TEXT = 2_000
"""Characters of a prompt or an answer that are shown; of a longer one, its beginning and its end."""
_SHARES = ("exact_match", "label_accuracy")


@dataclass(frozen=True)
class ScoreTables:
    """The figures of an evaluation.

    Attributes:
        verdict: A sentence, and `good`, `bad` or nothing.
        header: The names of the figures.
        models: Each model with its figures, each a value and its interval.
        differences: Figure, value, interval, p and what it means, for each difference.
        rows: How many rows, and supervised tokens, there are.
        remarks: Lines on what became of the rows.
    """

    verdict: tuple[str, str]
    header: list[str]
    models: list[tuple[str, list[tuple[str, str]]]]
    differences: list[list[str]]
    rows: str
    remarks: list[str]


@dataclass(frozen=True)
class ShownAnswer:
    """What one model answers to a row: its name, its text, its loss, and whether the text is the expected one."""

    model: str
    text: str | None
    loss: str
    matches: bool | None


@dataclass(frozen=True)
class ShownRow:
    """A row with the answers to it. title: its prompt in a line. change: in nats a token, as text."""

    number: int
    copies: int
    title: str
    change: str
    worse: bool
    prompt: str | None
    expected: str | None
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class Answers:
    """The rows that are shown, out of how many, and which models their change is between."""

    rows: list[ShownRow]
    total: int
    model: str
    other: str


def scores(evaluation: Evaluation, names: Sequence[str]) -> ScoreTables:
    """The figures of each model, and how they differ. names: of the adapters."""
    titles = _titles(names)
    header = ["loss", "perplexity", *_SHARES, *dict.fromkeys(_further(evaluation))]
    models = [
        (titles[model], [(_value(name, score.figure(name)), _interval(name, score)) for name in header])
        for model, score in evaluation.scores.items()
    ]
    differences = [_difference(name, one) for name, one in evaluation.differences.items()]
    if evaluation.forgetting is not None:
        differences.append(_difference("forgetting", evaluation.forgetting))
    adapter = evaluation.scores[ADAPTER]
    rows = f"{adapter.rows:,} rows, {adapter.tokens:,} supervised tokens"
    header = [name.replace("_", " ") for name in header]
    return ScoreTables(_verdict(evaluation, titles), header, models, differences, rows, [*evaluation.remarks])


def answers(evaluation: Evaluation, names: Sequence[str]) -> Answers:
    """The rows on which the adapter does worst, against what it is compared with. names: of the adapters."""
    titles, other = _titles(names), evaluation.compared_with
    ranked = sorted(evaluation.rows, key=lambda row: -_change(row, other))
    shown = [_row(row, titles, other) for row in ranked[:MOST_ROWS]]
    return Answers(shown, len(evaluation.rows), titles[ADAPTER], titles[other])


def _titles(names: Sequence[str]) -> dict[str, str]:
    """What each model is called in the page."""
    return {BASE: "base", **dict(zip((ADAPTER, AGAINST), names, strict=False))}


def _further(evaluation: Evaluation) -> Iterator[str]:
    for score in evaluation.scores.values():
        yield from score.metrics


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name in _SHARES else f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _interval(name: str, score: Score) -> str:
    interval = score.intervals.get(name)
    return "" if interval is None else f"{_value(name, interval.low)} to {_value(name, interval.high)}"


def _difference(name: str, difference: Difference) -> list[str]:
    interval = difference.interval
    points = name in _SHARES
    value, low, high = (
        "" if number is None else f"{number:+.1%}" if points else f"{number:+.4f}"
        for number in (difference.value, interval and interval.low, interval and interval.high)
    )
    meaning: str = difference.verdict or "too few rows for an interval"
    if difference.rows_needed is not None:
        meaning += f"; about {difference.rows_needed:,} rows would tell"
    p = "" if difference.p is None else f"{difference.p:.3g}"
    return [name.replace("_", " "), value, f"{low} to {high}" if low else "", p, meaning]


def _verdict(evaluation: Evaluation, titles: Mapping[str, str]) -> tuple[str, str]:
    model, other = titles[ADAPTER], titles[evaluation.compared_with]
    metric = evaluation.metric.replace("_", " ")
    match evaluation.verdict:
        case "better":
            return f"{model} is better than {other}, by its {metric}", "good"
        case "worse":
            return f"{model} is worse than {other}, by its {metric}", "bad"
        case "indistinguishable":
            return f"{model} and {other} cannot be told apart on these rows, by their {metric}", ""
    return f"Too few rows to tell {model} and {other} apart", ""


def _change(row: EvaluatedRow, other: str) -> float:
    """By how many nats a supervised token the adapter does worse; inf where a loss is not finite."""
    change = (row.answers[ADAPTER].nats - row.answers[other].nats) / max(row.tokens, 1)
    return change if math.isfinite(change) else math.inf


def _row(row: EvaluatedRow, titles: Mapping[str, str], other: str) -> ShownRow:
    shown = [
        ShownAnswer(
            titles[model],
            None if answer.text is None else shortened(answer.text),
            f"{answer.nats / max(row.tokens, 1):.4f}",
            None if "exact_match" not in answer.scores else answer.scores["exact_match"] >= 1,
        )
        for model, answer in row.answers.items()
    ]
    change, prompt = _change(row, other), None if row.prompt is None else shortened(row.prompt)
    title = " ".join((row.prompt or row.expected or "").split())[-120:]
    expected = None if row.expected is None else shortened(row.expected)
    text = f"{change:+.3f}" if math.isfinite(change) else "not finite"
    return ShownRow(row.number, row.copies, title, text, change > 0, prompt, expected, shown)


def shortened(text: str) -> str:
    """A text with the middle of a long one left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
