"""What the trials of a study came to: which is best, and which cannot be told from it on the same held-out rows."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from loratune.codes import Code
from loratune.console import format_duration, format_size, plural
from loratune.errors import ConfigError, Problem, ResumeError, is_disk_full
from loratune.statistics import loss_interval, mean_ratio, mean_ratio_interval
from loratune.system.files import read_text

FILE = "results.json"
VERSION = 1
DONE = "done"
BEST: Final = "best"
LIKE_BEST: Final = "indistinguishable"
WORSE: Final = "worse"
NOT_JUDGED: Final = "not judged"
Count = Annotated[int, Field(ge=0, le=10**15)]
Figure = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
Verdict = Literal["best", "indistinguishable", "worse", "not judged", ""]
MAX_MINUTES, MAX_STEPS = "training.max_minutes", "training.max_steps"
_AUTO = "auto"
_OBJECTIVE, _SEED = "training.objective", "training.seed"
_NOT_TRIED = ("waiting", "running", "invalid")
_MOST_BYTES = 1 << 22
"""Bytes of the losses of a trial, unpacked, at most."""


@dataclass(frozen=True)
class RowLosses:
    """The losses of one adapter on the held-out rows, or pairs of answers; arrays (rows,).

    Attributes:
        nats: Of each distinct row, summed over its tokens; where answers are compared, the objective's.
        tokens: Its supervised tokens; 1 where answers are compared.
        copies: How often it occurs.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]
    copies: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """The mean over all tokens, pairs or answers, and their copies."""
        return mean_ratio(self.copies * self.nats, self.copies * self.tokens)

    def packed(self) -> str:
        """As text of about five bytes a row, with eight digits of each loss."""
        raw = np.stack([self.nats, self.tokens, self.copies]).astype(np.float32).tobytes()
        return base64.b85encode(zlib.compress(raw)).decode()

    @classmethod
    def unpacked(cls, text: str) -> "RowLosses":
        """What `packed` made. Raises ValueError: it did not make this."""
        try:
            raw = zlib.decompressobj().decompress(base64.b85decode(text), _MOST_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        made = cls(*np.frombuffer(raw, dtype=np.float32).reshape(3, -1).astype(np.float64))
        if not (len(made.nats) and made.is_finite and (made.tokens > 0).all() and (made.copies > 0).all()):
            raise ValueError("these are no losses of rows")
        return made

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite, and stay so as `packed` has them."""
        with np.errstate(over="ignore"):
            return all(np.isfinite(one.astype(np.float32)).all() for one in (self.nats, self.tokens, self.copies))

    def is_of_rows_of(self, other: "RowLosses") -> bool:
        """Whether the rows are those of other losses, as far as their tokens and copies tell."""
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(self.copies, other.copies)


@dataclass(frozen=True)
class TrialResult:
    """A trial, and how it compares with the best one.

    Attributes:
        number: Of the trial.
        settings: Key → value as it was asked for.
        values: Key → value that the run worked with, where that is another one, as with `auto`; in the place of a time
            budget, the steps that were fixed from it.
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
    loss: Figure | None = None
    interval: tuple[Figure, Figure] | None = None
    seconds: Figure | None = None
    steps: Count | None = None
    adapter_bytes: Count | None = None
    unrelated: Figure | None = None
    difference: Figure | None = None
    difference_interval: tuple[Figure, Figure] | None = None
    verdict: Verdict = ""
    adapter: str | None = None
    note: str = ""

    def shown(self, key: str) -> str:
        """A setting, and what the run made of it where it chose for itself."""
        asked = self.settings.get(key, "")
        if key == MAX_MINUTES and MAX_STEPS in self.values:
            return f"{asked} → {self.values[MAX_STEPS]} steps"
        return f"{asked} → {self.used(key)}" if asked != self.used(key) else asked

    def used(self, key: str) -> str:
        """A setting, or in the place of `auto` what the run chose."""
        asked = self.settings.get(key, "")
        return self.values.get(key, asked) if asked == _AUTO else asked


@dataclass(frozen=True)
class StudyResults:
    """A study.

    Attributes:
        name: Of the directory of its winner.
        base: The base model.
        keys: What is varied.
        rows: Distinct held-out rows on which trials are compared.
        total: All held-out rows.
        trials: The best first, then those that cannot be compared.
        published: Where the winner's adapter is; None if that is not there.
        unit: What losses are a mean over: `token`, or `pair` or `answer` where answers are compared.
        measured_by: The objective whose loss that is, where answers are compared; else empty.
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
        """The trials that cannot be told from the best one."""
        return [trial for trial in self.trials if trial.verdict == LIKE_BEST]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        winner = self.winner.number if self.winner else None
        return {"version": VERSION, **asdict(self), "winner": winner}

    def write(self, directory: Path) -> None:
        """Write them into the directory of a study, whole or not at all.

        Raises:
            ResumeError: They cannot be written, for another reason than a full disk.
            OSError: The disk is full.
        """
        unfinished = directory / f"{FILE}.unfinished"
        try:
            unfinished.unlink(missing_ok=True)
            with unfinished.open("x", encoding="utf-8") as file:  # never through a link, or into a pipe
                file.write(json.dumps(self.as_json(), indent=2) + "\n")
            unfinished.replace(directory / FILE)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            if is_disk_full(error):
                raise
            what, fix = f"cannot be written: {error.strerror}", "make room for it, and the same command goes on"
            raise ResumeError(Problem(Code.SWEEP_STORAGE, what, str(directory / FILE), fix=fix)) from None

    @classmethod
    def read(cls, directory: Path) -> "StudyResults":
        """What `write` wrote. Raises ConfigError: there is no such thing."""
        path = directory / FILE
        try:
            values = json.loads(read_text(path))
            if values.pop("version") != VERSION:
                raise ValueError("of another version")
            winner = values.pop("winner")
            results = _results_type().validate_python(values)
            if winner != (results.winner.number if results.winner else None):
                raise ValueError("another winner than that of the trials")
            return results
        except FileNotFoundError:
            what, fix = f"there is no {FILE} in it", "name the directory OUTPUT_DIR.study of a sweep"
            raise ConfigError(Problem(Code.SWEEP_NO_STUDY, what, str(directory), "--study", fix)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = "is not what a sweep of this release writes"
            raise ConfigError(Problem(Code.SWEEP_NO_STUDY, what, str(path), "--study")) from None

    def header(self) -> list[str]:
        """The columns of the table."""
        loss = "held-out loss" if self.unit == "token" else f"loss per {self.unit}"
        return [
            "trial", *self.names, loss, "95 % interval", "unrelated text", "time", "adapter", "compared with the best",
        ]  # fmt: skip

    def cells(self, trial: TrialResult) -> list[str]:
        """A trial's row of the table."""
        interval = f"{trial.interval[0]:.4f} to {trial.interval[1]:.4f}" if trial.interval else ""
        time = format_duration(trial.seconds) if trial.seconds is not None else ""
        size = format_size(trial.adapter_bytes).partition("(")[2].rstrip(")") if trial.adapter_bytes else ""
        size = size or (format_size(trial.adapter_bytes) if trial.adapter_bytes else "")
        loss = f"{trial.loss:.4f}" if trial.loss is not None else trial.state
        unrelated = f"{trial.unrelated:+.3f}" if trial.unrelated is not None else ""
        settings = [trial.shown(key) for key in self.keys]
        return [str(trial.number), *settings, loss, interval, unrelated, time, size, compared(trial)]

    def summary(self) -> str:
        """How many trials there are, and on what they were compared."""
        parts = [f"{plural(len(self.trials), 'trial')}, {self.count(DONE):,} with an adapter"]
        others = dict.fromkeys(trial.state for trial in self.trials if trial.state != DONE)
        parts += [f"{self.count(state):,} {state}" for state in others]
        of = f" of {self.total:,}" if self.rows < self.total else ""
        rows = f"{self.rows:,}{of} held-out {self.item}{'' if self.total == 1 else 's'}"
        return f"{', '.join(parts)}; compared on {rows}{f', by the {self.measure}' if self.measured_by else ''}"

    def conclusion(self) -> str:
        """Which trial is best, and what cannot be told from it."""
        if (winner := self.winner) is None:
            return "no trial has an adapter"
        text = f"trial {winner.number}, " + ", ".join(f"{key}={winner.shown(key)}" for key in self.keys)
        judged = [trial for trial in self.trials if trial.difference is not None]
        if not judged:
            return text
        numbers = ", ".join(str(trial.number) for trial in self.ties)
        if self.ties:
            text += f"; these {self.item}s do not tell it from trial{'s' if len(self.ties) > 1 else ''} {numbers}"
        elif all(trial.verdict == WORSE for trial in judged):
            text += f"; better than all others that were tried, on these {self.item}s"
        return f"{text}; chosen by these {self.item}s, so its loss is optimistic"

    def remarks(self) -> list[str]:
        """What the comparison leaves open: whether the best values lie beyond those tried, and what losses mean."""
        found = []
        for key in self.keys if self.winner else []:
            used = (_number(trial.used(key)) for trial in self.trials if trial.state not in _NOT_TRIED)
            tried = {number for number in used if number is not None}
            best = _number(self.winner.used(key)) if self.winner else None
            if len(tried) > 1 and best in (max(tried), min(tried)) and key != _SEED:
                end, further = ("highest", "higher") if best == max(tried) else ("lowest", "lower")
                found.append(f"{key}: the best value is the {end} that was tried; {further} ones may be better")
        if len({trial.used(_OBJECTIVE) for trial in self.trials}) > 1:
            found.append(
                f"trials are compared by the {self.measure}, which favours those that were trained to lower it"
            )
        return found


def is_ours(directory: Path) -> bool:
    """Whether the file of results in a directory is one that a sweep of any release wrote."""
    try:
        values = json.loads(read_text(directory / FILE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"version", "trials", "winner"} <= values.keys()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@cache
def _results_type() -> TypeAdapter[StudyResults]:
    return TypeAdapter(StudyResults)  # which takes longer than to validate a value


@cache
def _trial_type() -> TypeAdapter[TrialResult]:
    return TypeAdapter(TrialResult)


def trial_result(**values: Any) -> TrialResult:
    """A trial of values that a storage has. Raises ValueError: they are none of a trial."""
    return _trial_type().validate_python(values)


def compared(trial: TrialResult) -> str:
    """`+0.0123 (0.0100 to 0.0150), worse`."""
    if trial.difference is None:
        return trial.verdict
    interval = ""
    if trial.difference_interval is not None:
        interval = f" ({trial.difference_interval[0]:+.4f} to {trial.difference_interval[1]:+.4f})"
    return f"{trial.difference:+.4f}{interval}, {trial.verdict}"


def rank(trials: Sequence[TrialResult], losses: Mapping[int, RowLosses]) -> list[TrialResult]:
    """Trials in the order of their losses, each compared with the best one in pairs of rows.

    Args:
        trials: With state and figures, in any order.
        losses: Number → losses on the held-out rows, of those that have an adapter. All are of the same rows.
    """
    done = sorted((trial for trial in trials if trial.number in losses), key=lambda one: losses[one.number].loss)
    others = sorted((trial for trial in trials if trial.number not in losses), key=lambda one: one.number)
    ranked = []
    for trial in done:
        own, best = losses[trial.number], losses[done[0].number]
        weight = own.copies * own.tokens
        interval = loss_interval(own.copies * own.nats, weight)
        trial = replace(trial, loss=own.loss, interval=(interval.low, interval.high) if interval else None)
        ranked.append(_against(trial, own, best, weight) if trial.number != done[0].number else _best(trial))
    return [*ranked, *others]


def _best(trial: TrialResult) -> TrialResult:
    return replace(trial, verdict=BEST, difference=None, difference_interval=None)


def _against(trial: TrialResult, own: RowLosses, best: RowLosses, weight: NDArray[np.float64]) -> TrialResult:
    more = own.copies * (own.nats - best.nats)
    interval = mean_ratio_interval(more, weight)
    ends = (interval.low, interval.high) if interval else None
    verdict: Verdict = NOT_JUDGED if ends is None else WORSE if ends[0] > 0 else LIKE_BEST
    return replace(trial, difference=mean_ratio(more, weight), difference_interval=ends, verdict=verdict)
