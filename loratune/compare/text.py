"""Formats a comparison as text: tables of metrics with intervals, the verdict as a sentence, and rows as blocks."""

import math
from collections.abc import Iterator, Mapping, Sequence

from loratune.compare import metrics
from loratune.compare import verdict as verdicts
from loratune.compare.answers import ComparedRow
from loratune.compare.comparison import Comparison
from loratune.compare.metrics import Difference
from loratune.compare.requirements import Judgement
from loratune.compare.tasks import TaskResults
from loratune.statistics import Interval
from loratune.text import plural

_NAME = 24
"""The maximum shown characters of an expression, or of the most frequent answer."""
_WIDTH = 300
"""The maximum shown characters of a prompt or an answer."""


def name(metric: str) -> str:
    """The display name of a metric: `exact match`, `invalid JSON`; expressions are only shortened."""
    if ":" in metric:
        return metric if len(metric) <= _NAME else f"{metric[: _NAME - 3]}..."
    words = metric.replace("log_probability", "log-probability").replace("_", " ")
    return words.replace("json", "JSON").replace("rouge l", "ROUGE-L")


def rows(comparison: Comparison) -> str:
    """A summary of the rows: `48 rows, 900 supervised tokens`; for preferences, with their mean tokens."""
    score = comparison.scores[metrics.ADAPTER]
    count = plural(score.rows, comparison.item)
    sides = dict.fromkeys(side for row in comparison.rows for side in row.compared)
    if not sides:
        return f"{count}, {score.tokens:,} supervised tokens"
    means = []
    for side in sides:
        own = [(row.copies, row.compared[side].tokens) for row in comparison.rows if side in row.compared]
        means.append(f"{side} {sum(map(math.prod, own)) / sum(copies for copies, _ in own):.1f}")
    return f"{count} (mean tokens: {', '.join(means)})"


def measured(comparison: Comparison) -> str:
    """A line on the objective of the loss and the rewards of preferences; empty for other rows."""
    if comparison.objective is None:
        return ""
    return f"loss and rewards of {comparison.objective.compared_with('the base')}"


def number(metric: str, value: float | None, *, signed: bool = False) -> str:
    """The value of a metric as text: `0.1070`, `18.27`, `93.5%`; or of a difference: `-2.7980`, `+93.5 pp`."""
    if value is None or math.isnan(value):
        return "-"
    sign = "+" if signed else ""
    if metric == metrics.PERPLEXITY:
        return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"
    if not metrics.has_direction(metric):  # log-probabilities of whole answers, and lengths
        return f"{value:{sign}.2f}"
    if not metrics.is_bounded(metric) or metric in metrics.MEANS:
        return f"{value:{sign}.4f}"
    return f"{100 * value:+.1f} pp" if signed else f"{value:.1%}"


def with_interval(metric: str, value: float | None, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.1070 [0.0810, 0.1400]`; without brackets if there is no interval."""
    text = number(metric, value, signed=signed)
    if interval is None:
        return text
    low, high = (number(metric, end, signed=signed).rstrip("% p") for end in (interval.low, interval.high))
    return f"{text} [{low}, {high}]"


def p_value(p: float) -> str:
    """`0.032`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def scores_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per metric that these rows have, one column per model."""
    models = comparison.scores
    known = [
        metric
        for metric in models[metrics.ADAPTER].metrics
        if any(one.metrics.get(metric) is not None for one in models.values())
    ]

    def cells(metric: str) -> Iterator[str]:
        return (with_interval(metric, one.metrics.get(metric), one.intervals.get(metric)) for one in models.values())

    return ["", *models], [[name(metric), *cells(metric)] for metric in known]


def differences_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per metric, two columns per model that the adapter is compared with."""
    paired = comparison.paired
    header = [cell for model in paired for cell in (f"{metrics.ADAPTER} - {model}", "p (McNemar)")]
    rows = [
        [name(metric), *(cell for one in paired.values() for cell in _difference(metric, one.get(metric)))]
        for metric in comparison.differences
    ]
    return ["difference", *header], rows


def _difference(metric: str, one: Difference | None) -> tuple[str, str]:
    if one is None:
        return "-", ""
    text = with_interval(metric, one.value, one.interval, signed=True)
    return text, "" if one.p is None else p_value(one.p)


def verdict(comparison: Comparison) -> str:
    """The verdict of the comparison as a line: in words beside the base, by `metric` beside another adapter."""
    if comparison.collapsed:
        return f"collapsed: the adapter {comparison.collapsed}"
    if comparison.compared_with == metrics.BASE:
        gain, answers = comparison.gain, comparison.answers
        return verdicts.headline(verdicts.decide(gain, answers), gain, answers)
    metric, other = comparison.metric, comparison.compared_with
    one = comparison.differences[metric]
    mine, its = (number(metric, comparison.scores[model].metrics.get(metric)) for model in (metrics.ADAPTER, other))
    difference = with_interval(metric, one.value, one.interval, signed=True)
    p = "" if one.p is None else f", p {p_value(one.p)}"
    numbers = f"{name(metric)} {mine} instead of {its}, {difference}{p}"
    if comparison.verdict is None:
        too_few = f"there are too few {comparison.item}s"
        return f"none, as {too_few if math.isfinite(one.value) else 'a loss is not finite'}: {numbers}"
    if comparison.verdict != "indistinguishable":
        return f"{comparison.verdict} than the other adapter: {numbers}"
    count = plural(sum(row.copies for row in comparison.rows), comparison.item)
    needed = outlook(one, comparison.item)
    return f"not distinguishable from the other adapter at {count}: {numbers}{'; ' if needed else ''}{needed}"


def outlook(difference: Difference, item: str = "row") -> str:
    """How many rows a significant difference would need, or why that is unknown; empty if it is significant or rows are
    too few.

    The number is rounded up to two significant digits, as it is an estimate.
    """
    if difference.verdict != "indistinguishable":
        return ""
    if difference.value == 0:
        return f"they do not differ on these {item}s, which do not say how many would tell"
    if difference.rows_needed is None:
        return ""
    step: int = 10 ** max(0, len(str(difference.rows_needed)) - 2)
    return f"about {math.ceil(difference.rows_needed / step) * step:,} {item}s would tell"


def forgetting(difference: Difference, kinds: Mapping[str, Difference]) -> str:
    """The line on unrelated text. kinds: its kinds → the same for each."""
    text = with_interval(metrics.LOSS, difference.value, difference.interval, signed=True)
    is_unsure = difference.interval is None and math.isfinite(difference.value)
    too_few = ", of too few rows for an interval" if is_unsure else ""
    by_kind = ", ".join(f"{kind} {number(metrics.LOSS, one.value, signed=True)}" for kind, one in kinds.items())
    by_kind = f": {by_kind}" if kinds else ""
    return f"{text} nats per token on unrelated text{too_few}, {metrics.ADAPTER} - {metrics.BASE}{by_kind}"


def required(judgements: Sequence[Judgement]) -> list[tuple[str, str]]:
    """A line for each requirement, as name and value."""
    return [("required", f"{one.text}: {'met' if one.met else 'not met'}") for one in judgements]


def worst(comparison: Comparison, count: int) -> list[ComparedRow]:
    """The rows on which the adapter is worse than the model compared with, by nats per token, the worst first."""
    other = comparison.compared_with
    worse = [row for row in comparison.rows if row.worsening(metrics.ADAPTER, other) > 0]
    return sorted(worse, key=lambda row: -row.worsening(metrics.ADAPTER, other))[:count]


def row_lines(row: ComparedRow, other: str) -> Iterator[tuple[str, str]]:
    """The lines of a block for a row, as names and values."""
    losses = {model: f"{answer.loss / row.count:.3f}" for model, answer in row.answers.items()}
    on = "" if row.compared else f", on {row.tokens:,} tokens"
    yield "loss", f"{losses[metrics.ADAPTER]} instead of {losses[other]}{on}"
    if row.prompt is not None:
        yield "prompt", shorten(row.prompt)
    for side, answer in row.compared.items():
        metric = f"{side}_{metrics.LOG_PROBABILITY}"
        shown = (f"{model} {number(metric, one.scores.get(metric))}" for model, one in row.answers.items())
        yield side, f"{shorten(answer.text)} ({answer.tokens:,} tokens; log-probability {', '.join(shown)})"
    if row.prompt is not None and row.expected is not None:
        yield "expected", shorten(row.expected)
        for model, said in row.answers.items():
            yield model, shorten(said.text or "")


def shorten(text: str, width: int = _WIDTH) -> str:
    """A text on one line, with the middle of a long text left out."""
    line = _one_line(text)
    return line if len(line) <= width else f"{line[: width // 2]} [...] {line[-width // 2 :]}"


def shorten_apart(one: str, other: str, width: int) -> tuple[str, str]:
    """Two texts on one line each, of which a long one is cut such that the first place where they differ is shown."""
    first, second = _one_line(one), _one_line(other)
    same = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    start = first.rfind(" ", 0, max(0, same - width // 3)) + 1 if max(len(first), len(second)) > width else 0

    def cut(line: str) -> str:
        return (
            f"{'[...] ' if start else ''}{line[start : start + width]}{' [...]' if start + width < len(line) else ''}"
        )

    return cut(first), cut(second)


def _one_line(text: str) -> str:
    return " ↵ ".join(part.strip() for part in text.strip().splitlines() if part.strip())


def tasks_table(results: TaskResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows for tasks of the harness: one row per metric."""
    rows = []
    for metric, one in results.metrics().items():
        cells = [
            _plain_with_interval(one.values[model], one.intervals[model]) for model in (metrics.BASE, metrics.ADAPTER)
        ]
        difference = one.difference
        cells.append(_plain_with_interval(difference.value, difference.interval, signed=True))
        cells.append("" if difference.p is None else p_value(difference.p))
        meaning = ", ".join(filter(None, (difference.verdict or "-", outlook(difference))))
        rows.append([metric, f"{one.rows:,}", *cells, meaning])
    return ["", "rows", metrics.BASE, metrics.ADAPTER, "difference", "p (McNemar)", "verdict"], rows


def _plain_with_interval(value: float, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.4500 [0.3000, 0.6000]`, without a unit, as the units of task metrics are unknown."""
    if math.isnan(value):
        return "-"
    ends = (interval.low, interval.high) if interval else ()
    text, *others = (f"{one:{'+' if signed else ''}.{'4f' if abs(one) < 1e4 else '3g'}}" for one in (value, *ends))
    return f"{text} [{', '.join(others)}]" if others else text
