"""The results of a sweep: its trials, the best one, and how the others compare with it on the same held-out rows."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from uuid import uuid4

from pydantic import Field
from pydantic.dataclasses import dataclass

from loratune.codes import Code
from loratune.compare import metrics
from loratune.compare.metrics import RowLosses, Values, loss_difference
from loratune.compare.verdict import Answers, Outcome, about
from loratune.errors import Problem, ResourceError, ResumeError, is_disk_full
from loratune.statistics import finite
from loratune.system.files import read_text
from loratune.text import format_duration, format_size, plural

FILE, TRIALS = "results.json", "trials"
"""Names in the directory of a study, see `study_directory`."""
VERSION = 1
DONE, INTERRUPTED = "done", "interrupted"
BEST: Final = "best"
LIKE_BEST: Final = "indistinguishable"
WORSE: Final = "worse"
BETTER: Final = "better"
NOT_JUDGED: Final = "not judged"
Count = Annotated[int, Field(ge=0, le=10**15)]
Metric = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
Verdict = Literal["best", "indistinguishable", "worse", "better", "not judged", ""]
MAX_MINUTES, MAX_STEPS = "training.max_minutes", "training.max_steps"
_NOT_TRIED = ("waiting", "running", INTERRUPTED, "invalid")


@dataclass(frozen=True)
class TrialResult:
    """A trial, and how it compares with the best one.

    Attributes:
        number: The number of the trial.
        settings: Key → value as requested.
        values: Key → value that the run chose, as with `auto`; the number of steps if it had a time budget.
        state: `done`, `running`, `interrupted`, `waiting`, or why there is no adapter: `diverged`, `worse than base`,
            `learned nothing`, `out of memory`, `invalid`, `failed`.
        loss: Held-out loss, see `StudyResults.unit`; None without an adapter.
        interval: Its 95 % interval; None for too few rows.
        seconds: How long the trial took; None if it has not ended.
        steps: Optimizer steps that it took.
        adapter_bytes: The size of its file of weights.
        unrelated: By how many nats per token its loss on unrelated text is higher than the base's; None if not known.
        difference: Its loss less that of the best trial, on the same rows.
        difference_interval: The 95 % interval of that.
        verdict: `best`; `indistinguishable` from it or `worse`, by that interval; `not judged` without one; else empty.
            Where parts of the rows are tried, the trial on all of them counts as the best, and others may be `better`.
        adapter: Where its adapter is; None if it is not kept.
        note: Why it has none.
        headline: The verdict on its adapter beside the base, in words; empty without an adapter.
        outcome: Whether that verdict is good.
    """

    number: Count
    settings: dict[str, str]
    values: dict[str, str]
    state: str
    loss: Metric | None = None
    interval: tuple[Metric, Metric] | None = None
    seconds: Metric | None = None
    steps: Count | None = None
    adapter_bytes: Count | None = None
    unrelated: Metric | None = None
    difference: Metric | None = None
    difference_interval: tuple[Metric, Metric] | None = None
    verdict: Verdict = ""
    adapter: str | None = None
    note: str = ""
    headline: str = ""
    outcome: Outcome = ""

    def shown(self, key: str) -> str:
        """A setting, and the value that the run chose for it."""
        asked = self.settings.get(key, "")
        if key == MAX_MINUTES and MAX_STEPS in self.values:
            return f"{asked} → {self.values[MAX_STEPS]} steps"
        return f"{asked} → {self.used(key)}" if asked != self.used(key) else asked

    def used(self, key: str) -> str:
        """A setting; for `auto` the value that the run chose."""
        asked = self.settings.get(key, "")
        return self.values.get(key, asked) if asked == "auto" else asked


@dataclass(frozen=True)
class RowsPoint:
    """A trial on a part of the training rows. value: its share of right answers, or its loss; see `RowsCurve`."""

    trial: Count
    rows: Count
    value: Metric
    interval: tuple[Metric, Metric] | None


@dataclass(frozen=True)
class RowsCurve:
    """What more training rows bring, on the same held-out rows.

    Attributes:
        metric: `exact_match` where the answers of the held-out rows are short, else `loss`.
        points: The trials, the fewest rows first.
        gained_from: Training rows of the trial with which that on all rows is compared: of those tried, the number
            nearest to half of them; None if there is no other trial.
        gain: How much better all rows are than these, paired row by row: more right answers, or less loss.
        gain_interval: The 95 % interval of that; None for too few rows.
        verdict: `better`, `worse` or `indistinguishable`, by that interval.
        rows_needed: About how many held-out rows would show a gain of this size, if it is indistinguishable.
        loss_falls: Whether all rows have significantly less loss than these.
    """

    metric: Literal["exact_match", "loss"]
    points: list[RowsPoint]
    gained_from: Count | None = None
    gain: Metric | None = None
    gain_interval: tuple[Metric, Metric] | None = None
    verdict: Literal["better", "worse", "indistinguishable"] | None = None
    rows_needed: Count | None = None
    loss_falls: bool = False

    @classmethod
    def of(cls, counts: Mapping[int, int], losses: Mapping[int, RowLosses], right: Mapping[int, Values] | None) -> Self:
        """Create it from trials by their numbers.

        Args:
            counts: How many training rows each has.
            losses: The losses on the held-out rows of each.
            right: For each held-out row 1 if the answer is right, else 0, (rows,); None where answers are not short.
        """
        order = sorted(counts, key=lambda number: counts[number])
        last, halves = order[-1], {number: abs(math.log(2 * counts[number] / counts[order[-1]])) for number in order}
        half = min(order[:-1], key=lambda number: halves[number], default=last)

        def answers(number: int) -> Answers:
            assert right is not None
            return Answers.of(right[half], right[number], losses[number].copies)

        points = []
        for number in order:
            value, interval = losses[number].loss, losses[number].interval
            if right is not None:
                value, interval = answers(number).right, answers(number).interval
            points.append(RowsPoint(number, counts[number], value, finite(interval)))
        name: Literal["exact_match", "loss"] = "loss" if right is None else "exact_match"
        if half == last:
            return cls(name, points)
        of_loss = loss_difference(losses[half], losses[last])
        falls = of_loss.verdict == "better"
        if right is not None:
            found = answers(last).over_base
            ends, gain = finite(found.interval), found.value
        else:
            found, gain = of_loss, -of_loss.value
            ends = found.interval and (-found.interval.high, -found.interval.low)
        return cls(name, points, counts[half], gain, ends, found.verdict, found.rows_needed, falls)

    def sentence(self, held_out: str) -> str:
        """What the last doubling gained. held_out: the held-out rows in words."""
        start, last = self.gained_from, self.points[-1].rows
        if start is None or self.gain is None:
            return f"trained on all {last:,} rows; no smaller part has an adapter to compare with"
        how = "doubling" if abs(last - 2 * start) <= 1 else "going"
        what, scale, digits = "in the held-out loss", 1, 3
        if self.metric == metrics.EXACT_MATCH:
            what, scale, digits = "points of right answers", 100, 1
        low, high = self.gain_interval or (math.nan, math.nan)
        ends = f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]" if self.gain_interval else ""
        verb = "gained" if self.gain >= 0 else "lost"
        text = f"{how} from {start:,} to {last:,} rows {verb} {abs(scale * self.gain):.{digits}f} {what}{ends}"
        match self.verdict:
            case "better":
                return f"{text}; more rows are likely to help"
            case "worse":
                return f"{text}; more rows did not help"
            case None:
                return f"{text}; {held_out} are too few to tell"
        needed = f"; {about(self.rows_needed)} would tell" if self.rows_needed else ""
        if self.loss_falls:
            return f"{text}: on {held_out}, a gain is to be seen only in the loss, so more rows may help{needed}"
        return f"{text}: a gain is not to be seen on {held_out}{needed}"


@dataclass(frozen=True)
class StudyResults:
    """A study.

    Attributes:
        name: The name of the directory of the best adapter.
        base: The base model.
        keys: The keys that are varied.
        rows: Distinct held-out rows on which trials are compared.
        total: All held-out rows.
        trials: The best first, then those that cannot be compared.
        published: Where the best adapter was published; None if it was not.
        unit: What losses are a mean over: `token`, or `pair` or `answer` for preferences.
        measured_by: The objective whose loss that is, for preferences; else empty.
        curve: What more training rows bring, where parts of them are tried and all of them have an adapter.
    """

    name: str
    base: str
    keys: list[str]
    rows: Count
    total: Count
    trials: list[TrialResult]
    published: str | None = None
    unit: Literal["token", "pair", "answer"] = "token"
    measured_by: str = ""
    curve: RowsCurve | None = None

    @property
    def item(self) -> str:
        """What the held-out rows are, in the singular."""
        return "row" if self.unit == "token" else self.unit

    @property
    def measure(self) -> str:
        """What losses are, in a few words."""
        return f"loss per {self.unit} of {self.measured_by}" if self.measured_by else "nats per supervised token"

    @property
    def names(self) -> list[str]:
        """The keys as a table has them: without their sections, where that is enough."""
        if self.curve is not None:
            return ["training rows"]
        last = [key.rpartition(".")[2] for key in self.keys]
        return [name if last.count(name) == 1 else key for key, name in zip(self.keys, last, strict=True)]

    @property
    def winner(self) -> TrialResult | None:
        """The trial with the lowest held-out loss; where parts of the rows are tried, that on all of them."""
        return self.trials[0] if self.trials and self.trials[0].verdict == BEST else None

    def count(self, *states: str) -> int:
        """How many trials are in one of some states."""
        return sum(trial.state in states for trial in self.trials)

    @property
    def ties(self) -> list[TrialResult]:
        """The trials that are not significantly different from the best one."""
        return [trial for trial in self.trials if trial.verdict == LIKE_BEST]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        winner = self.winner.number if self.winner else None
        return {"version": VERSION, **asdict(self), "winner": winner}

    def write(self, directory: Path) -> None:
        """Write them into the directory of a study, whole or not at all.

        Raises:
            ResumeError: They cannot be written.
            ResourceError: The disk is full.
        """
        unfinished = directory / f"{FILE}.{uuid4().hex}"  # as other processes may be writing them too
        try:
            unfinished.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            unfinished.replace(directory / FILE)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            kind, code = (
                (ResourceError, Code.SYSTEM_DISK_FULL) if is_disk_full(error) else (ResumeError, Code.SWEEP_STUDY)
            )
            fix = "repair that, then rerun the same command to resume"
            raise kind(Problem(code, f"cannot be written: {error.strerror}", str(directory / FILE), fix=fix)) from None

    @classmethod
    def read(cls, directory: Path) -> "StudyResults | None":
        """The results that `write` wrote; None if the directory has none that this release can read."""
        try:
            values = json.loads(read_text(directory / FILE))
            version, winner = values.pop("version"), values.pop("winner")
            results = cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        is_known = (version, winner) == (VERSION, results.winner.number if results.winner else None)
        return results if is_known else None

    def header(self) -> list[str]:
        """The columns of the table."""
        loss = "held-out loss" if self.unit == "token" else f"loss per {self.unit}"
        right = ["right answers", "95 % interval"] if self._points else []
        best = "the best" if self.curve is None else "all rows"
        return [
            "trial", *self.names, *right, loss, "95 % interval", "unrelated text", "time", "adapter",
            f"compared with {best}",
        ]  # fmt: skip

    @property
    def _points(self) -> dict[int, RowsPoint]:
        """Number of a trial → its share of right answers, where these are counted."""
        is_counted = self.curve is not None and self.curve.metric == metrics.EXACT_MATCH
        return {point.trial: point for point in self.curve.points} if self.curve is not None and is_counted else {}

    def cells(self, trial: TrialResult) -> list[str]:
        """A trial's row of the table."""
        return [
            str(trial.number),
            *(trial.shown(key) for key in self.keys),
            *self._right_cells(trial),
            f"{trial.loss:.4f}" if trial.loss is not None else trial.state,
            f"{trial.interval[0]:.4f} to {trial.interval[1]:.4f}" if trial.interval else "",
            f"{trial.unrelated:+.3f}" if trial.unrelated is not None else "",
            format_duration(trial.seconds) if trial.seconds is not None else "",
            format_size(trial.adapter_bytes) if trial.adapter_bytes else "",
            "" if self.curve is not None and trial.verdict == BEST else compared(trial),
        ]

    def _right_cells(self, trial: TrialResult) -> list[str]:
        """The share of right answers and its interval, where these are counted."""
        if not (points := self._points):
            return []
        if (point := points.get(trial.number)) is None:
            return ["", ""]
        ends = [f"{100 * end:.1f}" for end in point.interval or ()]
        return [f"{100 * point.value:.1f} %", " to ".join(ends)]

    def summary(self) -> str:
        """How many trials there are, and on what they were compared."""
        parts = [f"{plural(len(self.trials), 'trial')}, {self.count(DONE):,} with an adapter"]
        others = dict.fromkeys(trial.state for trial in self.trials if trial.state != DONE)
        parts += [f"{self.count(state):,} {state}" for state in others]
        of = f" of {self.total:,}" if self.rows < self.total else ""
        rows = f"{self.rows:,}{of} held-out {self.item}{'' if self.total == 1 else 's'}"
        return f"{', '.join(parts)}; compared on {rows}{f', by the {self.measure}' if self.measured_by else ''}"

    def conclusion(self) -> str:
        """Which trial is best, and which are not significantly different from it."""
        if (winner := self.winner) is None:
            return "no trial has an adapter"
        if self.curve is not None:
            return self.curve.sentence(plural(self.rows, f"held-out {self.item}"))
        text = f"trial {winner.number}, " + ", ".join(f"{key}={winner.shown(key)}" for key in self.keys)
        others = [trial for trial in self.trials if trial.difference is not None]
        if not others:
            return text
        if self.ties:
            numbers = ", ".join(str(trial.number) for trial in self.ties)
            trials = f"trial{'s' if len(self.ties) > 1 else ''} {numbers}"
            text += f"; not significantly different from {trials} on these {self.item}s"
        elif all(trial.verdict == WORSE for trial in others):
            text += f"; better than all others that were tried, on these {self.item}s"
        return f"{text}; chosen by these {self.item}s, so its loss is optimistic"

    def remarks(self) -> list[str]:
        """Limits of the comparison: better values may lie beyond those tried, and losses may favour some trials."""
        found = []
        for key in self.keys if self.winner and self.curve is None else []:
            used = (_number(trial.used(key)) for trial in self.trials if trial.state not in _NOT_TRIED)
            tried = {number for number in used if number is not None}
            best = _number(self.winner.used(key)) if self.winner else None
            if key != "training.seed" and len(tried) > 1 and best in (max(tried), min(tried)):
                end, further = ("highest", "higher") if best == max(tried) else ("lowest", "lower")
                found.append(f"{key}: the best value is the {end} that was tried; {further} ones may be better")
        if len({trial.used("training.objective") for trial in self.trials}) > 1:
            text = f"trials are compared by the {self.measure}, which favours those that were trained to lower it"
            found.append(text)
        return found


def study_directory(output: Path) -> Path:
    """The directory of the study of an output directory."""
    return output.with_name(f"{output.name}.study")


def trial_directory(study: Path, number: int) -> Path:
    """The directory in which a trial of a study works."""
    return study / TRIALS / f"{number:04}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def compared(trial: TrialResult) -> str:
    """`+0.0123 (0.0100 to 0.0150), worse`."""
    if trial.difference is None:
        return trial.verdict
    interval = ""
    if trial.difference_interval is not None:
        interval = f" ({trial.difference_interval[0]:+.4f} to {trial.difference_interval[1]:+.4f})"
    return f"{trial.difference:+.4f}{interval}, {trial.verdict}"


def rank(
    trials: Sequence[TrialResult], losses: Mapping[int, RowLosses], reference: int | None = None
) -> list[TrialResult]:
    """Trials in the order of their losses, each compared with the best one row by row.

    Args:
        trials: The trials in any order.
        losses: Number → losses on the held-out rows, of those that have an adapter. All are of the same rows.
        reference: The number of the trial that counts as the best, whatever its loss is; by default the lowest loss.
    """

    def place(trial: TrialResult) -> tuple[bool, float]:
        return trial.number != reference, losses[trial.number].loss

    done = sorted((trial for trial in trials if trial.number in losses), key=place)
    others = sorted((trial for trial in trials if trial.number not in losses), key=lambda one: one.number)
    return [*(_compared(trial, losses[trial.number], losses[done[0].number]) for trial in done), *others]


def _compared(trial: TrialResult, own: RowLosses, best: RowLosses) -> TrialResult:
    trial = replace(trial, loss=own.loss, interval=finite(own.interval))
    if own is best:
        return replace(trial, verdict=BEST)
    found = loss_difference(best, own)
    ends = finite(found.interval)
    verdict: Verdict = NOT_JUDGED
    if ends is not None:
        verdict = WORSE if ends[0] > 0 else BETTER if ends[1] < 0 else LIKE_BEST
    return replace(trial, difference=found.value, difference_interval=ends, verdict=verdict)
