"""The page of a study: its trials in a table, and the held-out loss by each setting. `page` says what it promises."""

from collections.abc import Sequence

from loratune import __version__
from loratune.console import format_duration
from loratune.evaluation.charts import Point, point_chart
from loratune.evaluation.page import template
from loratune.evaluation.page_tables import Tile
from loratune.evaluation.study_results import BEST, DONE, LIKE_BEST, StudyResults, TrialResult


def render(results: StudyResults, commands: Sequence[str]) -> str:
    """The page. commands: what to type to go on, or to use the winner."""
    return template("study.html.jinja").render(
        version=__version__,
        results=results,
        tiles=[*_tiles(results)],
        header=results.header(),
        rows=[(results.cells(trial), trial) for trial in results.trials],
        like_best=(BEST, LIKE_BEST),
        charts=[(key, _chart(number, key, results)) for number, key in enumerate(results.keys)],
        commands=commands,
    )


def _tiles(results: StudyResults) -> list[Tile]:
    """The most important figures."""
    winner = results.winner
    of = f" of {results.total:,}" if results.rows < results.total else ""
    seconds = sum(trial.seconds or 0.0 for trial in results.trials)
    found = [Tile("lowest held-out loss", "none", "no trial has an adapter", "bad")]
    if winner is not None and winner.loss is not None:
        note = f"95 % {winner.interval[0]:.4f} to {winner.interval[1]:.4f}" if winner.interval else ""
        found = [
            Tile("lowest held-out loss", f"{winner.loss:.4f}", note, "good"),
            Tile("best", f"trial {winner.number}", f"of {results.count(DONE):,} with an adapter"),
        ]
        found.append(Tile("not told apart from it", f"{len(results.ties):,}", f"trials, on these {results.item}s"))
    others = len(results.trials) - results.count(DONE)
    return [
        *found,
        Tile("trials", f"{len(results.trials):,}", f"{others or 'none'} without an adapter"),
        Tile(f"held-out {results.item}s", f"{results.rows:,}", f"distinct{of}, the same for all trials"),
        Tile("time", format_duration(seconds), "of all trials together"),
    ]


def _chart(number: int, key: str, results: StudyResults) -> str | None:
    """The loss by a setting; None where no trial has one."""
    done = [trial for trial in results.trials if trial.loss is not None]
    points = [_point(trial, key) for trial in done]
    order = [*dict.fromkeys(trial.settings.get(key, "") for trial in sorted(done, key=lambda one: one.number))]
    order = [*dict.fromkeys([*order, *(point.x for point in points)])]
    title = f"Held-out loss by {key}, with its 95 % interval"
    return point_chart(f"by-{number}", title, points, key, order) if points else None


def _point(trial: TrialResult, key: str) -> Point:
    assert trial.loss is not None
    return Point(trial.used(key), trial.loss, trial.interval, int(trial.verdict == BEST))
