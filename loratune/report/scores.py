"""An evaluation as a report shows it: the rows on which the adapter does worst, and what differences mean."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratune.compare import text as wording
from loratune.compare.answers import ComparedRow
from loratune.compare.comparison import Comparison
from loratune.compare.losses import Difference
from loratune.compare.metrics import (
    ADAPTER,
    AGAINST,
    BASE,
    EXACT_MATCH,
    MAJORITY,
)
from loratune.statistics import Interval

_MOST_ROWS = 50
"""Rows whose answers are shown."""
_LONGEST_TITLE = 96
_MEANINGS = {"better": "better", "worse": "worse", "indistinguishable": "not distinguishable"}


@dataclass(frozen=True)
class ShownRow:
    """A row with the answers to it.

    Attributes:
        row: The row.
        title: The end of its prompt, in a line, without special tokens and the lines that all prompts share.
        change: By how much the adapter's loss is higher, per token, pair or answer; inf if that is not finite.
        right: Model → whether its answer is the expected one, where it gives one.
    """

    row: ComparedRow
    title: str
    change: float
    right: Mapping[str, bool]

    @property
    def shown_change(self) -> str:
        """The change as text, with a sign unless it rounds to 0."""
        change = self.change
        return "not finite" if math.isinf(change) else f"{change:+.3f}" if abs(change) >= 5e-4 else "0.000"


def titles(names: Sequence[str]) -> dict[str, str]:
    """Model → what it is called in the page. names: those of the adapters."""
    return {BASE: BASE, MAJORITY: MAJORITY, **dict(zip((ADAPTER, AGAINST), names, strict=False))}


def ends(metric: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.12 to 0.15`, or nothing."""
    both = (interval.low, interval.high) if interval else ()
    return " to ".join(wording.number(metric, end, signed=signed) for end in both)


def meaning(difference: Difference, item: str = "row") -> str:
    """What a difference means for the adapter, and how many rows would tell."""
    unknown = f"too few {item}s for an interval" if difference.interval is None else "neither better nor worse"
    known = _MEANINGS.get(difference.verdict or "", unknown)
    return "; ".join(filter(None, (known, wording.outlook(difference, item))))


def tone(evaluation: Comparison) -> str:
    """`good`, `bad` or nothing."""
    return "bad" if evaluation.collapsed else {"better": "good", "worse": "bad"}.get(evaluation.verdict or "", "")


def answers(evaluation: Comparison) -> list[ShownRow]:
    """The rows that the adapter answers wrongly, then others; in either part those first on which it does worst."""
    found = []
    for row in evaluation.rows:
        scores = {model: answer.scores.get(EXACT_MATCH) for model, answer in row.answers.items()}
        right = {model: score >= 1 for model, score in scores.items() if score is not None}
        change = row.worsening(ADAPTER, evaluation.compared_with)
        found.append(ShownRow(row, "", change if math.isfinite(change) else math.inf, right))
    found = sorted(found, key=lambda one: (one.right.get(ADAPTER, True), -one.change))[:_MOST_ROWS]
    prompts = [one.row.prompt or one.row.expected or "" for one in found]
    shown = _distinct_parts(prompts, evaluation.special_tokens)
    return [ShownRow(one.row, _end(title), one.change, one.right) for one, title in zip(found, shown, strict=True)]


def _distinct_parts(prompts: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """Prompts without special tokens, and without the first and last lines that all of them share."""
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
    lines = [[line for line in special.sub("\n", prompt).splitlines() if line.strip()] for prompt in prompts]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while len({*map(tuple, lines)}) > 1 < min(map(len, lines)) and len({one[end] for one in lines}) == 1:
            lines = [one[rest] for one in lines]
    return [" ".join(" ".join(one).split()) for one in lines]


def _end(line: str) -> str:
    """The last words of a line, in which prompts of one form differ."""
    if len(line) <= _LONGEST_TITLE:
        return line
    end = line[-_LONGEST_TITLE:]
    return "… " + (end.partition(" ")[2] or end)
