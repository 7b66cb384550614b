"""The results of a study: its trials, the best one, and how the others compare with it on the same held-out rows."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from loratune.codes import Code
from loratune.compare.metrics import RowLosses, compare
from loratune.errors import ConfigError, Problem, ResourceError, ResumeError, is_disk_full
from loratune.statistics import finite
from loratune.system.files import read_text
from loratune.text import format_duration, plural, short_size

FILE = "results.json"
VERSION = 1
DONE = "done"
BEST: Final = "best"
LIKE_BEST: Final = "indistinguishable"
WORSE: Final = "worse"
NOT_JUDGED: Final = "not judged"
Count = Annotated[int, Field(ge=0, le=10**15)]
Metric = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
Verdict = Literal["best", "indistinguishable", "worse", "not judged", ""]
MAX_MINUTES, MAX_STEPS = "training.max_minutes", "training.max_steps"
_NOT_TRIED = ("waiting", "running", "invalid")


@dataclass(frozen=True)
class TrialResult:
    """A trial, and how it compares with the best one.

    Attributes:
        number: The number of the trial.
        settings: Key → value as requested.
        values: Key → value that the run chose, as with `auto`; the number of steps if it had a time budget.
        state: `done`, `running`, `waiting`, or why there is no adapter: `diverged`, `worse than base`,
            `learned nothing`, `out of memory`, `stopped early`, `invalid`, `failed`.
        loss: Held-out loss, see `StudyResults.unit`; None without an adapter.
        interval: Its 95 % interval; None for too few rows.
        seconds: How long the trial took; None if it has not ended.
        steps: Optimizer steps that it took.
        adapter_bytes: The size of its file of weights.
        unrelated: By how many nats per token its loss on unrelated text is higher than the base's; None if not known.
        difference: Its loss less that of the best trial, on the same rows.
        difference_interval: The 95 % interval of that.
        verdict: `best`; `indistinguishable` from it or `worse`, by that interval; `not judged` without one; else empty.
        adapter: Where its adapter is; None if it is not kept.
        note: Why it has none.
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
        last = [key.rpartition(".")[2] for key in self.keys]
        return [name if last.count(name) == 1 else key for key, name in zip(self.keys, last, strict=True)]

    @property
    def winner(self) -> TrialResult | None:
        """The trial with the lowest held-out loss."""
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
        unfinished = directory / f"{FILE}.unfinished"
        try:
            unfinished.unlink(missing_ok=True)  # never through a link, or into a pipe
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
    def read(cls, directory: Path, option: str = "") -> "StudyResults":
        """The results that `write` wrote. Raises ConfigError: the directory, which `option` names, has none."""
        path = directory / FILE
        try:
            values = json.loads(read_text(path))
            version, winner = values.pop("version"), values.pop("winner")
            results = cls(**values)
            if (version, winner) != (VERSION, results.winner.number if results.winner else None):
                raise ValueError("of another version, or with another winner than that of the trials")
            return results
        except FileNotFoundError:
            what, fix = f"there is no {FILE} in it", "name the directory OUTPUT_DIR.study of a sweep"
            raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(directory), option, fix)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = "is not what a sweep of this release writes"
            raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(path), option, "move it away")) from None

    def header(self) -> list[str]:
        """The columns of the table."""
        loss = "held-out loss" if self.unit == "token" else f"loss per {self.unit}"
        return [
            "trial", *self.names, loss, "95 % interval", "unrelated text", "time", "adapter", "compared with the best",
        ]  # fmt: skip

    def cells(self, trial: TrialResult) -> list[str]:
        """A trial's row of the table."""
        return [
            str(trial.number),
            *(trial.shown(key) for key in self.keys),
            f"{trial.loss:.4f}" if trial.loss is not None else trial.state,
            f"{trial.interval[0]:.4f} to {trial.interval[1]:.4f}" if trial.interval else "",
            f"{trial.unrelated:+.3f}" if trial.unrelated is not None else "",
            format_duration(trial.seconds) if trial.seconds is not None else "",
            short_size(trial.adapter_bytes) if trial.adapter_bytes else "",
            compared(trial),
        ]

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
        for key in self.keys if self.winner else []:
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


def rank(trials: Sequence[TrialResult], losses: Mapping[int, RowLosses]) -> list[TrialResult]:
    """Trials in the order of their losses, each compared with the best one row by row.

    Args:
        trials: The trials in any order.
        losses: Number → losses on the held-out rows, of those that have an adapter. All are of the same rows.
    """
    done = sorted((trial for trial in trials if trial.number in losses), key=lambda one: losses[one.number].loss)
    others = sorted((trial for trial in trials if trial.number not in losses), key=lambda one: one.number)
    return [*(_compared(trial, losses[trial.number], losses[done[0].number]) for trial in done), *others]


def _compared(trial: TrialResult, own: RowLosses, best: RowLosses) -> TrialResult:
    trial = replace(trial, loss=own.loss, interval=finite(own.interval))
    if own is best:
        return replace(trial, verdict=BEST)
    found = compare(best, own)
    ends = finite(found.interval)
    verdict: Verdict = NOT_JUDGED if ends is None else WORSE if ends[0] > 0 else LIKE_BEST
    return replace(trial, difference=found.value, difference_interval=ends, verdict=verdict)
