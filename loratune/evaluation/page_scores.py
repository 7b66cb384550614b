"""What an evaluation found, as the tables and rows of a report's page."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratune.evaluation import wording
from loratune.evaluation.results import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    LOSS,
    MAJORITY,
    Difference,
    EvaluatedRow,
    Evaluation,
)
from loratune.statistics import Interval
from loratune.training.preference_figures import LOG_PROBABILITY

MOST_ROWS = 50
"""Rows whose answers are shown."""
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
        rows: What the rows are, and how many.
        measured: What the loss and the rewards are, where answers are compared; else empty.
        remarks: Lines on what became of the rows.
    """

    verdict: tuple[str, str]
    header: list[str]
    models: list[tuple[str, list[tuple[str, str]]]]
    differences: dict[str, list[list[str]]]
    rows: str
    measured: str
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
        title: The end of its prompt, in a line, without special tokens and the lines that all prompts have.
        change: By how much the loss of the adapter is higher, for each token, pair or answer, as text.
        worse: Whether it is; None where the change does not show.
        prompt: The prompt; None where there is none.
        texts: What else the row holds, as titles and texts: the answer that is expected, or those that are compared.
        answers: Those of the models; none where answers are compared.
    """

    where: str
    copies: int
    title: str
    change: str
    worse: bool | None
    prompt: str | None
    texts: list[tuple[str, str]]
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class Answers:
    """The rows that are shown, out of how many, which models their change is between, and what it is.

    Attributes:
        are_judged: Whether answers are right or wrong, and the wrong ones of the adapter come first.
        item: What the rows are, in the singular.
        per: What the change is measured in, such as `nats per supervised token`.
    """

    rows: list[ShownRow]
    are_judged: bool
    total: int
    model: str
    other: str
    item: str
    per: str


def scores(evaluation: Evaluation, names: Sequence[str]) -> ScoreTables:
    """The figures of each model, and how they differ. names: of the adapters."""
    titles = _titles(names)
    figures = [*evaluation.scores[ADAPTER].figures]
    models = [
        (
            titles[model],
            [(wording.number(name, score.figure(name)), _ends(name, score.intervals.get(name))) for name in figures],
        )
        for model, score in evaluation.scores.items()
    ]
    differences = {
        titles[model]: [_difference(name, name, one, evaluation.item) for name, one in paired.items()]
        for model, paired in evaluation.paired().items()
    }
    if evaluation.forgetting is not None:
        differences[titles[BASE]].append(_difference("loss on unrelated text", LOSS, evaluation.forgetting))
    tone = "bad" if evaluation.collapsed else _TONES.get(evaluation.verdict or "", "")
    return ScoreTables(
        verdict=(f"{titles[ADAPTER]}: {wording.verdict(evaluation)}", tone),
        header=[wording.name(name) for name in figures],
        models=models,
        differences=differences,
        rows=wording.rows(evaluation),
        measured=wording.measured(evaluation),
        remarks=[*evaluation.remarks, *filter(None, [wording.majority(evaluation)])],
    )


def answers(evaluation: Evaluation, names: Sequence[str]) -> Answers:
    """The rows that the adapter answers wrongly, then others; in either part those first on which it does worst.

    names: of the adapters.
    """
    titles, other = _titles(names), evaluation.compared_with
    ranked = sorted(evaluation.rows, key=lambda row: (_is_right(row, ADAPTER) is not False, -_change(row, other)))
    ranked = ranked[:MOST_ROWS]
    prompts = _distinct_parts([row.prompt or row.expected or "" for row in ranked], evaluation.special_tokens)
    shown = [_row(row, prompt, titles, other) for row, prompt in zip(ranked, prompts, strict=True)]
    are_judged = any(_is_right(row, ADAPTER) is not None for row in ranked)
    per = "nats per supervised token" if evaluation.unit == "token" else f"the objective's loss per {evaluation.unit}"
    return Answers(shown, are_judged, len(evaluation.rows), titles[ADAPTER], titles[other], evaluation.item, per)


def _is_right(row: EvaluatedRow, model: str) -> bool | None:
    """Whether the answer of a model is the expected one; None where it gives none."""
    score = row.answers[model].scores.get(EXACT_MATCH)
    return None if score is None else score >= 1


def _distinct_parts(prompts: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """Prompts without special tokens, and without the first and last lines that are those of all of them."""
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
    lines = [[line for line in special.sub("\n", prompt).splitlines() if line.strip()] for prompt in prompts]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while len({*map(tuple, lines)}) > 1 < min(map(len, lines)) and len({one[end] for one in lines}) == 1:
            lines = [one[rest] for one in lines]
    return [" ".join(one) for one in lines]


def _titles(names: Sequence[str]) -> dict[str, str]:
    """What each model is called in the page."""
    return {BASE: BASE, MAJORITY: MAJORITY, **dict(zip((ADAPTER, AGAINST), names, strict=False))}


def _ends(name: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.12 to 0.15`; empty without an interval."""
    if interval is None:
        return ""
    return " to ".join(wording.number(name, end, signed=signed) for end in (interval.low, interval.high))


def _difference(title: str, figure: str, difference: Difference, item: str = "row") -> list[str]:
    unknown = f"too few {item}s for an interval" if difference.interval is None else "neither better nor worse"
    meaning = _MEANINGS.get(difference.verdict or "", unknown)
    return [
        wording.name(title),
        wording.number(figure, difference.value, signed=True),
        _ends(figure, difference.interval, signed=True),
        "" if difference.p is None else wording.p_value(difference.p),
        "; ".join(filter(None, (meaning, wording.outlook(difference, item)))),
    ]


def _change(row: EvaluatedRow, other: str) -> float:
    """By how many nats a supervised token the adapter does worse; inf where a loss is not finite."""
    change = row.worsening(ADAPTER, other)
    return change if math.isfinite(change) else math.inf


def _row(row: EvaluatedRow, prompt: str, titles: Mapping[str, str], other: str) -> ShownRow:
    shown = [
        ShownAnswer(titles[model], answer.text, f"{answer.loss / row.count:.4f}", _is_right(row, model))
        for model, answer in row.answers.items()
        if not row.compared
    ]
    change = _change(row, other)
    title = _end(" ".join(prompt.split()))
    texts = [] if row.expected is None else [("expected", row.expected)]
    texts += [(_side(row, side, titles), answer.text) for side, answer in row.compared.items()]
    text = "not finite" if not math.isfinite(change) else f"{change:+.3f}" if abs(change) >= 5e-4 else "0.000"
    is_worse = (change > 0) if text[0] in "+-" else None
    return ShownRow(row.where, row.copies, title, text, is_worse, row.prompt, texts, shown)


def _side(row: EvaluatedRow, side: str, titles: Mapping[str, str]) -> str:
    """The title of an answer that is compared: `chosen, 11 tokens, log-probability base -47.58, mine -36.67`."""
    figure = f"{side}_{LOG_PROBABILITY}"
    shown = (f"{titles[model]} {wording.number(figure, one.scores.get(figure))}" for model, one in row.answers.items())
    return f"{side}, {row.compared[side].tokens:,} tokens, log-probability {', '.join(shown)}"


def _end(line: str) -> str:
    """The last words of a line, in which prompts of one form differ."""
    if len(line) <= _LONGEST_TITLE:
        return line
    end = line[-_LONGEST_TITLE:]
    return "… " + (end.partition(" ")[2] or end)
