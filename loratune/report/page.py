"""The page of `loratune report`: one HTML file about adapters and their runs.

The page loads nothing and runs nothing: it has no scripts, and its content security policy forbids both. Text from
data, files and models is shortened and escaped twice: for HTML, and for characters that would hide or reorder it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loratune import __version__
from loratune.compare import text as wording
from loratune.compare.answers import ComparedRow
from loratune.compare.classification import Classification
from loratune.compare.comparison import Comparison
from loratune.compare.metrics import ADAPTER, AGAINST, BASE, EXACT_MATCH, LOSS, MAJORITY, PROMPTED, SIDES, Difference
from loratune.events import progress
from loratune.lora.module_names import number_of, pattern, shortest
from loratune.lora.stats import TABLE_HEADER, Update, by_pattern, table_row
from loratune.report import facts
from loratune.report.charts import (
    LONGEST_TEXT,
    NARROW,
    WIDE,
    Line,
    Point,
    heat_map,
    histogram,
    label,
    line_chart,
    point_chart,
)
from loratune.report.facts import RunRecord
from loratune.report.study import BEST, StudyResults
from loratune.statistics import Interval, finite
from loratune.text import printable

_PLOTS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens a second"}
_OPTIONAL_PLOTS = {
    "divergence": "KL to the model before training, on texts that it wrote",
    "reward_accuracy": "Reward accuracy",
    "reward_margin": "Reward margin",
    **{f"{side}_log_probability": f"Log-probability of {side} answers, in nats" for side in SIDES},
}
_MAPS = {"norm": "Norm of ΔW", "effective_rank": "Effective rank of ΔW"}
_MOST_LAYERS = 1_000
"""Layers from the first to the last up to which those without a module are shown as gaps."""
_MOST_ROWS = 50
"""Rows whose answers are shown."""
_LONGEST_TITLE = 96
_MOST_CLASSES = 20
"""The most frequent classes whose confusions are drawn."""
_SHARES = range(40, 101, 10)
_MEANINGS = {"better": "better", "worse": "worse", "indistinguishable": "not distinguishable"}


@dataclass(frozen=True)
class Subject:
    """An adapter that the page is about.

    Attributes:
        name: Its name in the page.
        base: What its configuration calls the base.
        objective: The training objective, unless that is the likelihood of the rows.
        adapter: What its files say, by name.
        record: What its run recorded.
        updates: ΔW of each module.
        settings: Keys of its config and their values; empty without a run.yaml.
        config: That config as text.
        max_length: Where rows were cut, if that is known.
        notes: Lines on what could not be verified or measured, or was edited.
    """

    name: str
    base: str
    objective: str
    adapter: Mapping[str, str]
    record: RunRecord
    updates: Sequence[Update]
    settings: Mapping[str, str]
    config: str
    max_length: int | None
    notes: Sequence[str]


@progress("drawing the page")
def render(
    subjects: Sequence[Subject],
    evaluation: Comparison | None,
    data: str | None,
    commands: Sequence[str],
    by_scale: Mapping[float, Comparison] | None = None,
    sweep: StudyResults | None = None,
) -> str:
    """The page of adapters.

    Args:
        subjects: The adapter, and perhaps the one that it is compared with.
        evaluation: How both do on rows, if there are any.
        data: The name of these rows.
        commands: What to type to repeat all this.
        by_scale: Scale of the adapter → its comparison with the base on these rows, if any.
        sweep: The trials of the sweep that published the adapter, if any.
    """
    records = [subject.record for subject in subjects]
    return _render(
        title=f"{' and '.join(subject.name for subject in subjects)}: report",
        eyebrow="loratune report",
        subjects=subjects,
        evaluation=evaluation,
        data=data,
        titles={
            BASE: BASE,
            MAJORITY: MAJORITY,
            PROMPTED: f"base, told the task by {evaluation.prompt}" if evaluation else "",
            **dict(zip((ADAPTER, AGAINST), (one.name for one in subjects), strict=False)),
        },
        answers=answers(evaluation) if evaluation else [],
        scale_charts=_scale_charts(by_scale or {}),
        label_charts=_label_charts(evaluation.classification) if evaluation and evaluation.classification else {},
        sweep=sweep,
        trial_chart=_trial_chart(sweep) if sweep else "",
        tiles=[
            facts.tiles(one.record, one.adapter, keeps_last=one.settings.get("training.keep") == "last")
            for one in subjects
        ],
        losses=_losses(subjects),
        plots=_plots(subjects),
        lengths=[_histograms(number, subject) for number, subject in enumerate(subjects)],
        modules=[_modules(number, subject) for number, subject in enumerate(subjects)],
        tables=facts.tables(records, [subject.adapter for subject in subjects]),
        differing=facts.differing([subject.settings for subject in subjects]),
        commands=commands,
    )


def _render(**content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("loratune.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: block(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["label"] = label
    environment.globals |= {"version": __version__, "wording": wording, "ends": ends, "meaning": meaning}
    return environment.get_template("page.html.jinja").render(content)


def block(value: str) -> str:
    """A text of several lines as the page shows it, before it is escaped for HTML."""
    if len(value) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        left_out = f"\n[... {len(value) - 2 * half:,} characters left out ...]\n"
        value = f"{value[:half]}{left_out}{value[-half:]}"
    return printable(value)


@dataclass(frozen=True)
class Plot:
    """Metrics over the steps.

    Attributes:
        title: What they are.
        shown: Numbers of the adapters that have a line.
        narrow: The chart for a phone, or a part of a desktop page, if anything is recorded.
        wide: The chart for a desktop, if that is another one.
        has_held_out: Whether there are points of held-out rows.
    """

    title: str
    shown: Sequence[int]
    narrow: str | None
    wide: str | None = None
    has_held_out: bool = False


def _losses(subjects: Sequence[Subject]) -> list[Plot]:
    """The losses, with a chart for each objective, as those of two cannot be compared."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, subject in enumerate(subjects):
        groups.setdefault((subject.objective, subject.record.unit), []).append(number)
    made = []
    for place, ((objective, unit), shown) in enumerate(groups.items()):
        name, lines = f"loss-{place}" if place else "loss", _lines(subjects, "loss", shown)
        title = "Loss, in nats per supervised token" if unit == "token" else f"Loss of the objective, per {unit}"
        title += f": {objective}" if objective and len(groups) > 1 else ""
        what = f"{title}, of {' and of '.join(subjects[number].name for number in shown)}, by step"
        narrow, wide = (
            line_chart(f"{name}{end}", what, lines, size) if lines else None
            for end, size in (("-n", NARROW), ("", WIDE))
        )
        made.append(Plot(title, shown, narrow, wide, any(line.marked for line in lines)))
    return made


def _scale_charts(by_scale: Mapping[float, Comparison]) -> dict[str, str]:
    """Title → a chart of what an adapter gains, or loses, by its scale."""
    series: dict[str, list[Point]] = {}
    for scale, found in by_scale.items():
        score, lost, changed = found.scores[ADAPTER], found.forgetting, found.behavior
        values = {f"{name} on these rows": (score.metrics.get(name), score.intervals.get(name)) for name in (LOSS,)}
        if lost is not None:
            values["change of the loss on unrelated text"] = lost.difference.value, lost.difference.interval
        if changed is not None and not changed.unknown:
            values["median KL to the base on its own answers"] = changed.median, changed.median_interval
        for title, (value, interval) in values.items():
            if value is not None and math.isfinite(value):
                series.setdefault(title, []).append(Point(f"{scale:g}", value, finite(interval), 0))
    return {
        title: point_chart(f"scale-{number}", title, points, "adapter scale", [point.x for point in points])
        for number, (title, points) in enumerate(series.items())
    }


def _label_charts(found: Classification) -> dict[str, str]:
    """Title → a chart of the labels that an adapter gives: which are confused, and how many are wrong by coverage."""
    frequent = sorted(found.classes, key=lambda one: -one.rows)[:_MOST_CLASSES]
    numbers = [found.labels.index(one.label) for one in frequent]
    names = [found.labels[number].strip() for number in numbers]
    confused = "Given labels (columns) by expected ones (rows)"
    wrong, points = "Wrong answers in %, of the surest rows", list[Point]()
    for share in _SHARES:
        one = found.coverage(share / 100)
        interval = 100 * (1 - one.interval.high), 100 * (1 - one.interval.low)
        points.append(Point(str(share), 100 * (1 - one.accuracy), interval))
    setting = "rows that are answered, in %"
    return {
        confused: heat_map(
            "confusions", confused, found.table(numbers).tolist(), names, names, 0, ("given label", "rows")
        ),
        wrong: point_chart("coverage", wrong, points, setting, [point.x for point in points]),
    }


def _plots(subjects: Sequence[Subject]) -> list[Plot]:
    """The other metrics of the curve; those that every run has also if they are not recorded."""
    made = []
    for name, title in (_PLOTS | _OPTIONAL_PLOTS).items():
        lines = _lines(subjects, name, range(len(subjects)))
        chart = line_chart(name, f"{title}, by step", lines, log=name != "learning_rate") if lines else None
        if lines or name in _PLOTS:
            made.append(Plot(title, sorted({line.series for line in lines}), chart))
    return made


def _lines(subjects: Sequence[Subject], name: str, numbers: Iterable[int]) -> list[Line]:
    """A metric of some of the runs, and the same of their held-out rows."""
    lines = [
        Line(*subjects[number].record.series(f"{'eval_' if marked else ''}{name}"), number, marked)
        for number in numbers
        for marked in (False, True)
    ]
    return [line for line in lines if line.x]


def _histograms(number: int, subject: Subject) -> dict[str, str]:
    """Split → a chart of the lengths of its rows."""
    return {
        name: histogram(
            f"lengths-{number}-{place}", f"Lengths of the {name} rows of {subject.name}", split.lengths,
            subject.max_length, number,
        )
        for place, (name, split) in enumerate(subject.record.splits.items())
        if split.lengths
    }  # fmt: skip


@dataclass(frozen=True)
class ModuleCharts:
    """How much an adapter changes its modules.

    Attributes:
        maps: Title → the heat maps for a desktop page and for a phone, each on a scale of its own.
        header: The names of the columns of the table.
        rows: The table, a row for each kind of module.
        several: Whether a cell of a heat map is about several modules, such as experts.
    """

    maps: Mapping[str, tuple[str, str]]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    several: bool


def _modules(number: int, subject: Subject) -> ModuleCharts:
    groups = by_pattern(subject.updates)
    names = dict(zip(groups, map(label, shortest([*groups])), strict=True))
    cells: dict[tuple[str, int], list[Update]] = {}
    for update in subject.updates:
        if (layer := number_of(update.module)) is not None:
            cells.setdefault((pattern(update.module), layer), []).append(update)
    norms = {key: math.hypot(*(one.norm for one in group)) for key, group in cells.items()}
    ranks = {key: math.fsum(one.effective_rank for one in group) / len(group) for key, group in cells.items()}
    numbers = sorted({layer for _, layer in cells})
    is_dense = bool(cells) and numbers[-1] - numbers[0] < _MOST_LAYERS  # no model has more layers than that
    layers = range(numbers[0], numbers[-1] + 1) if is_dense else numbers
    kinds = [kind for kind in names if any(key[0] == kind for key in cells)]
    rows, columns = [names[kind] for kind in kinds], [str(layer) for layer in layers]
    maps = {}
    for values, quantity, lowest in (
        (norms, "norm", 0.0), (ranks, "effective_rank", min(ranks.values(), default=0.0)),
    ) if cells else ():  # fmt: skip
        table = [[values.get((kind, layer)) for layer in layers] for kind in kinds]
        turned, unit = [*map(list, zip(*table, strict=True))], quantity.replace("_", " ")
        chart, title = f"{quantity}-{number}", f"{_MAPS[quantity]} of {subject.name}, by layer and module"
        wide = heat_map(chart, title, table, rows, columns, lowest, ("layer", unit))
        maps[_MAPS[quantity]] = wide, heat_map(f"{chart}-n", title, turned, columns, rows, lowest, ("", unit))
    table_rows = [[names[kind], *table_row(group)] for kind, group in groups.items()]
    return ModuleCharts(maps, TABLE_HEADER, table_rows, any(len(group) > 1 for group in cells.values()))


def _trial_chart(sweep: StudyResults) -> str:
    """The held-out loss of the trials of a sweep, by the setting that was varied, or by all of them; where parts of the
    rows were tried, its curve."""
    if (curve := sweep.curve) is not None:
        what = "Right held-out answers" if curve.metric == EXACT_MATCH else "Held-out loss"
        title, last = f"{what} by training rows, with the 95 % interval", curve.points[-1]
        points = [Point(str(one.rows), one.value, one.interval, int(one is last)) for one in curve.points]
        return point_chart("trials", title, points, "training rows", [])
    trials = [trial for trial in sorted(sweep.trials, key=lambda one: one.number) if trial.loss is not None]
    texts = [", ".join(trial.used(key) for key in sweep.keys) for trial in trials]
    points = [
        Point(text, trial.loss, trial.interval, int(trial.verdict == BEST))
        for text, trial in zip(texts, trials, strict=True)
        if trial.loss is not None
    ]
    title = "Held-out loss of the trials, with its 95 % interval"
    return point_chart("trials", title, points, ", ".join(sweep.names), [*dict.fromkeys(texts)])


# The evaluation: the rows on which the adapter does worst, and what differences mean


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


def ends(metric: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`0.12 to 0.15`, or nothing."""
    return " to ".join(wording.number(metric, end, signed=signed) for end in finite(interval) or ())


def meaning(difference: Difference, item: str = "row") -> str:
    """The meaning of a difference for the adapter, and how many rows would settle it."""
    unknown = f"too few {item}s for an interval" if difference.interval is None else "neither better nor worse"
    known = _MEANINGS.get(difference.verdict or "", unknown)
    return "; ".join(filter(None, (known, wording.outlook(difference, item))))


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
    shown = wording.distinct_parts(prompts, evaluation.special_tokens)
    return [ShownRow(one.row, _end(title), one.change, one.right) for one, title in zip(found, shown, strict=True)]


def _end(line: str) -> str:
    """The last words of a line, in which prompts of one form differ."""
    if len(line) <= _LONGEST_TITLE:
        return line
    end = line[-_LONGEST_TITLE:]
    return "… " + (end.partition(" ")[2] or end)
