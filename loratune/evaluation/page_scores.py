"""What an evaluation found, as the tables and rows of a report's page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratune.evaluation import wording
from loratune.evaluation.results import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    LOSS,
    Difference,
    EvaluatedRow,
    Evaluation,
)
from loratune.statistics import Interval

MOST_ROWS = 50
"""Rows whose answers are shown."""
LONGEST_TEXT = 2_000
"""Characters of a prompt or an answer that are shown; of a longer one, its beginning and its end."""
_LONGEST_TITLE = 96
_TONES = {"better": "good", "worse": "bad"}
_MEANINGS = {"better": "better", "worse": "worse", "indistinguishable": "not distinguishable"}


@dataclass(frozen=True)
class ScoreTables:
    """The figures of an evaluation.

    Attributes:
        verdict: A line, and `good`, `bad` or nothing.
        header: The names of the figures.
        models: Each model with its figures, each a value and its interval.
        differences: What the adapter is paired with → figure, value, interval, p and what it means, of each difference.
        rows: How many rows, and supervised tokens, there are.
        remarks: Lines on what became of the rows.
    """

    verdict: tuple[str, str]
    header: list[str]
    models: list[tuple[str, list[tuple[str, str]]]]
    differences: dict[str, list[list[str]]]
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
    """A row with the answers to it.

    Attributes:
        where: Its place in its file.
        copies: How many rows are this one.
        title: The end of its prompt, in a line.
        change: By how many nats a token the adapter does worse, as text.
        worse: Whether it does; None where the change does not show.
        prompt: The prompt; None where there is none.
        expected: The answer that is expected.
        answers: Those of the models.
    """

    where: str
    copies: int
    title: str
    change: str
    worse: bool | None
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
    figures = [*evaluation.scores[BASE].figures()]
    models = [
        (
            titles[model],
            [(wording.number(name, score.figure(name)), _ends(name, score.intervals.get(name))) for name in figures],
        )
        for model, score in evaluation.scores.items()
    ]
    differences = {
        titles[model]: [_difference(name, name, one) for name, one in paired.items()]
        for model, paired in evaluation.paired().items()
    }
    if evaluation.forgetting is not None:
        differences[titles[BASE]].append(_difference("loss on unrelated text", LOSS, evaluation.forgetting))
    adapter = evaluation.scores[ADAPTER]
    return ScoreTables(
        verdict=(f"{titles[ADAPTER]}: {wording.verdict(evaluation)}", _TONES.get(evaluation.verdict or "", "")),
        header=[wording.name(name) for name in figures],
        models=models,
        differences=differences,
        rows=f"{adapter.rows:,} rows, {adapter.tokens:,} supervised tokens",
        remarks=[*evaluation.remarks],
    )


def answers(evaluation: Evaluation, names: Sequence[str]) -> Answers:
    """The rows on which the adapter does worst, against what it is compared with. names: of the adapters."""
    titles, other = _titles(names), evaluation.compared_with
    ranked = sorted(evaluation.rows, key=lambda row: -_change(row, other))
    shown = [_row(row, titles, other) for row in ranked[:MOST_ROWS]]
    return Answers(shown, len(evaluation.rows), titles[ADAPTER], titles[other])


def _titles(names: Sequence[str]) -> dict[str, str]:
    """What each model is called in the page."""
    return {BASE: "base", **dict(zip((ADAPTER, AGAINST), names, strict=False))}


def _ends(name: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.12 to 0.15`; empty without an interval."""
    if interval is None:
        return ""
    return " to ".join(wording.number(name, end, signed=signed) for end in (interval.low, interval.high))


def _difference(title: str, figure: str, difference: Difference) -> list[str]:
    meaning = _MEANINGS.get(difference.verdict or "", "too few rows for an interval")
    return [
        wording.name(title),
        wording.number(figure, difference.value, signed=True),
        _ends(figure, difference.interval, signed=True),
        "" if difference.p is None else wording.p_value(difference.p),
        "; ".join(filter(None, (meaning, wording.outlook(difference)))),
    ]


def _change(row: EvaluatedRow, other: str) -> float:
    """By how many nats a supervised token the adapter does worse; inf where a loss is not finite."""
    change = row.worsening(ADAPTER, other)
    return change if math.isfinite(change) else math.inf


def _row(row: EvaluatedRow, titles: Mapping[str, str], other: str) -> ShownRow:
    shown = [
        ShownAnswer(
            titles[model],
            None if answer.text is None else shortened(answer.text),
            f"{answer.nats / row.tokens:.4f}",
            None if EXACT_MATCH not in answer.scores else answer.scores[EXACT_MATCH] >= 1,
        )
        for model, answer in row.answers.items()
    ]
    change, prompt = _change(row, other), None if row.prompt is None else shortened(row.prompt)
    title = _end(" ".join((row.prompt or row.expected or "").split()))
    expected = None if row.expected is None else shortened(row.expected)
    text = "not finite" if not math.isfinite(change) else f"{change:+.3f}" if abs(change) >= 5e-4 else "0.000"
    return ShownRow(
        row.where, row.copies, title, text, (change > 0) if text[0] in "+-" else None, prompt, expected, shown
    )


def _end(line: str) -> str:
    """The last words of a line, in which prompts of one form differ."""
    if len(line) <= _LONGEST_TITLE:
        return line
    end = line[-_LONGEST_TITLE:]
    return "… " + (end.partition(" ")[2] or end)


def shortened(text: str) -> str:
    """A text with the middle of a long one left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
