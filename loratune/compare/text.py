"""Formats a comparison as text: tables of metrics with intervals, the verdict as a sentence, and rows as blocks."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratune.compare import metrics
from loratune.compare import verdict as verdicts
from loratune.compare.abstention import Abstention
from loratune.compare.answers import ComparedRow
from loratune.compare.classification import Classification
from loratune.compare.losses import LossComparison
from loratune.compare.metrics import Difference
from loratune.compare.requirements import Judgement
from loratune.compare.tasks import TaskResults
from loratune.statistics import Interval
from loratune.text import plural

if TYPE_CHECKING:
    from loratune.compare.comparison import Comparison

_FAR = 0.05
"""How much less often the most probable label may be right than what is written, if its probability is to mean much."""
_EXAMPLE = 60
"""The shown characters at the end of a prompt that is confused."""
_CALL_ERRORS = dict(zip(metrics.CALL_ERRORS, (
    "the call cannot be read", "it does not call", "the function is wrong", "an argument is wrong",
    "it calls although no function fits",
), strict=True))  # fmt: skip
_NAME = 24
"""The maximum shown characters of an expression, or of the most frequent answer."""
_WIDTH = 300
"""The maximum shown characters of a prompt or an answer."""


def name(metric: str) -> str:
    """The display name of a metric: `exact match`, `invalid JSON`; expressions are only shortened."""
    if ":" in metric:
        return metric if len(metric) <= _NAME else f"{metric[: _NAME - 3]}..."
    if metric == metrics.ACCURACY:
        return "most probable label"
    words = metric.replace("log_probability", "log-probability").replace("_", " ")
    return words.replace("json", "JSON").replace("rouge l", "ROUGE-L")


def rows(comparison: "Comparison") -> str:
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


def objective_line(comparison: "Comparison") -> str:
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


def _left_out(comparison: "Comparison") -> set[str]:
    """Metrics that tables leave out: they have their own lines, or others say the same. JSON has all of them."""
    scores = [one.metrics for one in comparison.scores.values()]
    is_same = all(one.get(metrics.LABEL_ACCURACY) == one.get(metrics.EXACT_MATCH) for one in scores)
    labels = {metrics.LOG_LOSS, metrics.BRIER, *([metrics.LABEL_ACCURACY] if is_same else ())}
    others = {metrics.PERPLEXITY} if metrics.EXACT_MATCH in comparison.differences else set()
    return {*metrics.CALL_ERRORS, *labels, *others}


def scores_table(comparison: "Comparison") -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each metric of these rows that says more than others, a column per model."""
    models = {name: one for name, one in comparison.scores.items() if name != metrics.PROMPTED}  # has its own line
    known = [
        metric
        for metric in models[metrics.ADAPTER].metrics
        if any(one.metrics.get(metric) is not None for one in models.values()) and metric not in _left_out(comparison)
    ]

    def cells(metric: str) -> Iterator[str]:
        return (with_interval(metric, one.metrics.get(metric), one.intervals.get(metric)) for one in models.values())

    return ["", *models], [[name(metric), *cells(metric)] for metric in known]


def differences_table(comparison: "Comparison") -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per metric, two columns per model that the adapter is compared with."""
    paired = {name: one for name, one in comparison.paired.items() if name != metrics.PROMPTED}
    header = [cell for model in paired for cell in (f"{metrics.ADAPTER} - {model}", "p (McNemar)")]
    rows = [
        [name(metric), *(cell for one in paired.values() for cell in _difference(metric, one.get(metric)))]
        for metric in comparison.differences
        if metric not in _left_out(comparison)
    ]
    return ["difference", *header], rows


def prompted(comparison: "Comparison") -> Iterator[tuple[str, str]]:
    """A line on what the base answers if a prompt tells it the task."""
    if (found := comparison.over_prompted) is None:
        return
    metric, share, over = found
    better = {"better": "the adapter is better", "worse": "the adapter is worse"}.get(
        over.verdict or "", "no difference to see"
    )
    difference = with_interval(metric, over.value, over.interval, signed=True)
    yield "a prompt?", f"the base, told by {comparison.prompt}: {100 * share:.0f} % right; {better} ({difference})"


def classified(comparison: "Comparison") -> Iterator[tuple[str, str]]:
    """Lines on how sure the labels are, and which are confused."""
    if (found := comparison.classification) is None:
        return
    written = comparison.scores[metrics.ADAPTER].metrics.get(metrics.EXACT_MATCH)
    if written is not None and found.accuracy < written - _FAR:
        rates = f"the most probable label is right in {100 * found.accuracy:.0f} % of rows, what it writes in"
        yield (
            "how sure?",
            f"not to be told: {rates} {100 * written:.0f} %, so its probabilities are not to be relied on",
        )
        return
    surest = (found.coverage(share) for share in (0.8, 0.5))
    parts = [f"of the surest {100 * one.share:.0f} % of rows {100 * one.accuracy:.0f} % are right" for one in surest]
    yield "how sure?", ", ".join(parts)
    value, interval = found.overconfidence
    if interval is not None and not interval.low <= 0 <= interval.high:
        how = "surer than it is right" if value > 0 else "right more often than it is sure"
        ends = f"{100 * interval.low:+.0f} to {100 * interval.high:+.0f}"
        yield "", f"it is {how}: its probabilities differ from its accuracy by {100 * value:+.0f} points ({ends})"
    shown = dict(zip(found.prompts, distinct_parts(found.prompts, comparison.special_tokens), strict=True))
    for one in found.confusions:
        example = shown[one.example]
        yield (
            "confused",
            f'"{one.expected.strip()}" given as "{one.given.strip()}" in {plural(one.rows, "row")}: '
            f'"{example if len(example) <= _EXAMPLE else "… " + example[-_EXAMPLE:]}"',
        )


def abstention(found: Abstention) -> tuple[str, str]:
    """A line on the threshold from which on answers are right as often as asked for."""
    goal = f"at least {100 * found.accuracy:g} % of the answers are right"
    rows = f"{100 * found.right:.1f} % of {found.answered * found.rows:,.0f} of {plural(found.rows, 'row')}"
    if found.threshold is not None:
        how = f"--abstain-below {found.threshold:.6g}" if found.threshold else "every answer given"
        return "abstain", f"with {how}, {goal} (95 % confidence); here {rows}"
    more = f"; about {found.rows_needed:,} rows like these would" if found.rows_needed is not None else ""
    return "abstain", f"these rows do not show a threshold with which {goal}: of the surest, {rows} are{more}"


def tool_calls(comparison: "Comparison") -> Iterator[tuple[str, str]]:
    """A line on the adapter's calls: how many are right, and what is wrong with the others."""
    if (found := comparison.tool_calls.get(metrics.ADAPTER)) is None:
        return
    parts = [f"right in {found.right:,} of {found.rows:,}"]
    for kind, count in sorted(found.errors.items(), key=lambda one: -one[1]):
        if count:
            of = found.calls if kind in metrics.CALL_ERRORS[:-1] else found.rows - found.calls
            parts.append(f"in {count:,} of {of:,} {_CALL_ERRORS[kind]}")
            parts[-1] += f" ({', '.join(found.arguments)})" if kind == "wrong_argument" else ""
    yield "tool calls", shorten("; ".join(parts))


def classes_table(found: Classification) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per class, and their mean."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        [one.label.strip(), share(one.precision), share(one.recall), share(one.f1), f"{one.rows:,}"]
        for one in found.classes
    ]
    return ["class", "precision", "recall", "F1", "rows"], [*rows, ["all (mean)", "", "", share(found.macro_f1), ""]]


def _difference(metric: str, one: Difference | None) -> tuple[str, str]:
    if one is None:
        return "-", ""
    text = with_interval(metric, one.value, one.interval, signed=True)
    return text, "" if one.p is None else p_value(one.p)


def verdict(comparison: "Comparison") -> str:
    """The verdict of the comparison as a line: in words beside the base, by `metric` beside another adapter."""
    if comparison.collapsed:
        return f"collapsed: the adapter {comparison.collapsed}"
    if comparison.compared_with == metrics.BASE:
        losses, answers = comparison.gain, comparison.answers
        return verdicts.headline(verdicts.decide_verdict(losses, answers), losses, answers)
    metric, other = comparison.decisive, comparison.compared_with
    one = comparison.differences[metric]
    mine, its = (number(metric, comparison.scores[model].metrics.get(metric)) for model in (metrics.ADAPTER, other))
    difference = with_interval(metric, one.value, one.interval, signed=True)
    p = "" if one.p is None else f", p {p_value(one.p)}"
    numbers = f"{name(metric)} {mine} instead of {its}, {difference}{p}"
    if (judged := comparison.judged_by) != metric and judged in comparison.differences:
        numbers += f"; no difference to see in {name(judged)}"
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
    too few."""
    if difference.verdict != "indistinguishable":
        return ""
    if difference.value == 0:
        return f"they do not differ on these {item}s, which do not say how many would tell"
    if difference.rows_needed is None:
        return ""
    return f"{verdicts.about(difference.rows_needed)} {item}s would tell"


def forgetting(losses: LossComparison) -> str:
    """The line on unrelated text."""
    difference = losses.difference
    text = with_interval(metrics.LOSS, difference.value, difference.interval, signed=True)
    is_unsure = difference.interval is None and math.isfinite(difference.value)
    too_few = ", of too few rows for an interval" if is_unsure else ""
    by_kind = ", ".join(f"{kind} {number(metrics.LOSS, one.value, signed=True)}" for kind, one in losses.kinds.items())
    by_kind = f": {by_kind}" if by_kind else ""
    return f"{text} nats per token on unrelated text{too_few}, {metrics.ADAPTER} - {metrics.BASE}{by_kind}"


def required(judgements: Sequence[Judgement]) -> list[tuple[str, str]]:
    """A line for each requirement, as name and value."""
    return [("required", f"{one.text}: {'met' if one.met else 'not met'}") for one in judgements]


def worst(comparison: "Comparison", count: int) -> list[ComparedRow]:
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


def distinct_parts(prompts: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """Prompts without special tokens, and without the first and last lines that all of them share."""
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
    lines = [[line for line in special.sub("\n", prompt).splitlines() if line.strip()] for prompt in prompts]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while len({*map(tuple, lines)}) > 1 < min(map(len, lines)) and len({one[end] for one in lines}) == 1:
            lines = [one[rest] for one in lines]
    return [" ".join(" ".join(one).split()) for one in lines]


def shorten(text: str, width: int = _WIDTH) -> str:
    """A text on one line, with the middle of a long text left out."""
    line = _one_line(text)
    return line if len(line) <= width else f"{line[: width // 2]} [...] {line[-width // 2 :]}"


def shorten_apart(one: str, other: str, width: int) -> tuple[str, str]:
    """Two texts on one line each; long ones are cut such that the first place where they differ is shown."""
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
