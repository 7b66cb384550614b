"""The page of `loratune report`: one HTML file that shows a run, what it made, and how well that does.

The page loads nothing and runs nothing: it has no scripts, and its policy forbids both. What comes from data, files and
models is escaped twice, for HTML and, by `page_text`, for characters that would hide or reorder text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from loratune import __version__
from loratune.console import progress
from loratune.evaluation import module_charts, page_scores, page_tables, page_text
from loratune.evaluation.charts import NARROW, WIDE, Line, histogram, line_chart
from loratune.evaluation.results import Evaluation
from loratune.evaluation.run_record import RecordedSplit, RunRecord
from loratune.lora.stats import Update
from loratune.training.preference_figures import LOG_PROBABILITY, REWARD_ACCURACY, REWARD_MARGIN, SIDES

_PLOTS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens a second"}
_OF_COMPARED = {
    REWARD_ACCURACY: "Reward accuracy",
    REWARD_MARGIN: "Reward margin",
    **{f"{side}_{LOG_PROBABILITY}": f"Log-probability of {side} answers, in nats" for side in SIDES},
}
"""Figures of the curve of a run that compared answers, of the last batch before each report and of held-out rows."""


@dataclass(frozen=True)
class Subject:
    """An adapter that the page is about.

    Attributes:
        name: What it is called in the page.
        base: What its configuration calls the base.
        objective: What was lowered, where answers were compared; else empty.
        adapter: What its files say of it, by name.
        record: What its run recorded.
        updates: ΔW of each module.
        settings: Keys of its config and their values; empty if there is no run.yaml.
        config: That config as text.
        max_length: Where rows were cut; None if not known.
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
    subjects: Sequence[Subject], evaluation: Evaluation | None, data: str | None, commands: Sequence[str]
) -> str:
    """The page.

    Args:
        subjects: The adapter, and perhaps the one that it is compared with.
        evaluation: What both do on rows; None where no rows were given.
        data: What these rows are called.
        commands: What to type to repeat all this.
    """
    names = [subject.name for subject in subjects]
    return template("report.html.jinja").render(
        version=__version__,
        subjects=subjects,
        data=data,
        tiles=[
            page_tables.tiles(
                subject.record, subject.adapter, keeps_last=subject.settings.get("training.keep") == "last"
            )
            for subject in subjects
        ],
        scores=page_scores.scores(evaluation, names) if evaluation else None,
        answers=page_scores.answers(evaluation, names) if evaluation else None,
        losses=_losses(subjects),
        plots=_plots(subjects),
        splits=[_splits(number, subject) for number, subject in enumerate(subjects)],
        modules=[
            module_charts.module_charts(number, subject.name, subject.updates)
            for number, subject in enumerate(subjects)
        ],
        tables=page_tables.tables([subject.record for subject in subjects], [subject.adapter for subject in subjects]),
        differing=page_tables.differing([subject.settings for subject in subjects]),
        commands=commands,
    )


def template(name: str) -> Template:
    """A template of this package, which escapes whatever is put into it."""
    environment = Environment(
        loader=PackageLoader("loratune.evaluation", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters["label"] = page_text.label
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """A value as it is put into the page, before it is escaped for HTML."""
    return page_text.block(value) if type(value) is str else value  # what is marked as safe has a type of its own


@dataclass(frozen=True)
class Plot:
    """A figure over the steps.

    Attributes:
        title: What it is.
        shown: Numbers of the adapters of which there is a line.
        narrow: The chart for a phone, or a part of a desktop page; None where nothing is recorded.
        wide: The chart for a desktop, where there is one of its own.
        has_held_out: Whether there are points of held-out rows.
    """

    title: str
    shown: list[int]
    narrow: str | None
    wide: str | None = None
    has_held_out: bool = False


def _losses(subjects: Sequence[Subject]) -> list[Plot]:
    """The losses, with a chart for each objective, as those of two mean different things."""
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
            line_chart(f"{name}{end}", what, lines, size, smooth=True) if lines else None
            for end, size in (("-n", NARROW), ("", WIDE))
        )
        made.append(Plot(title, shown, narrow, wide, any(line.marked for line in lines)))
    return made


def _plots(subjects: Sequence[Subject]) -> list[Plot]:
    """The further figures of the curve; also where they are not recorded, though every run has them."""
    made = []
    for name, title in (_PLOTS | _OF_COMPARED).items():
        lines = _lines(subjects, name, range(len(subjects)))
        noisy = name != "learning_rate"
        chart = line_chart(name, f"{title}, by step", lines, smooth=noisy, log=noisy) if lines else None
        if lines or name in _PLOTS:
            made.append(Plot(title, sorted({line.series for line in lines}), chart))
    return made


def _lines(subjects: Sequence[Subject], name: str, numbers: Iterable[int]) -> list[Line]:
    """A figure of the steps of some of the runs, and of their held-out rows."""
    series = [
        (number, marked, *subjects[number].record.series(f"{'eval_' if marked else ''}{name}"))
        for number in numbers
        for marked in (False, True)
    ]
    return [Line(steps, values, number, marked) for number, marked, steps, values in series if steps]


def _splits(number: int, subject: Subject) -> list[dict[str, Any]]:
    """What became of the rows of each split of a run, with a chart of their lengths."""
    return [
        {
            "name": name,
            "cells": page_tables.split_cells(split),
            "reasons": sorted(split.reasons.items(), key=lambda item: -item[1]),
            "chart": _histogram(number, place, name, split, subject) if split.lengths else None,
        }
        for place, (name, split) in enumerate(subject.record.splits.items())
    ]


def _histogram(number: int, place: int, name: str, split: RecordedSplit, subject: Subject) -> str:
    title = f"Lengths of the {name} rows of {subject.name}"
    return histogram(f"lengths-{number}-{place}", title, split.lengths, subject.max_length, number)
