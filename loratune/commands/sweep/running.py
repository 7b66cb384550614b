"""A sweep from beginning to end: trials are claimed, trained and compared, and the best one is published."""

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.adapter import card
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.commands.sweep import grid as grids
from loratune.commands.sweep.grid import Grid, label
from loratune.commands.sweep.storage import TRIALS, check_kind, study_directory
from loratune.commands.sweep.study import Study, TrialRecord
from loratune.commands.sweep.trials import DIGEST, TrialProgress, TrialRunner, failure
from loratune.compare.losses import RowLosses
from loratune.config import RunConfig, keys, path_keys
from loratune.data.formats import KINDS
from loratune.errors import (
    AdapterError,
    ConfigError,
    LoratuneError,
    ModelError,
    NumericError,
    Problem,
    ResourceError,
    ResumeError,
)
from loratune.events import listener, listening, note
from loratune.lora import attach
from loratune.lora.adapter_files import RECORD_FILE
from loratune.model import load
from loratune.report.study import DONE, WORSE, StudyResults, TrialResult, rank
from loratune.system.files import is_directory, is_file, sha256
from loratune.system.launcher import host
from loratune.text import format_duration, plural
from loratune.training import auto
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.preflight import Run

_NOT_COMPARED = ("training.report_to", "training.ddp_timeout", "training.logging_steps", "training.save_steps")
"""Keys that two commands on one study may have at different values, besides paths, which differ from machine to
machine: what is there is known by its fingerprint."""
_ESTIMATE_ERROR = 2.0
"""The factor by which an estimate without any trial may be off, see `training.duration`."""


@dataclass
class Budget:
    """The time that is left, and how long trials take.

    Attributes:
        seconds: The budget; None without one.
        started: When it began, by `time.monotonic`.
        ratios: The seconds of each trial that ended here, over its estimate.
        begun: Trials that were begun here.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    ratios: list[float] = field(default_factory=list)
    begun: int = 0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def expected(self, estimate: float) -> float:
        """Seconds of a trial, by the slowest of those that ended here, relative to their estimates."""
        return estimate * max(self.ratios, default=1.0)

    def fits(self, estimate: float) -> bool:
        """Whether there is time for a trial. Raises ConfigError: not even the first one fits."""
        if self.begun or self.ratios or self.seconds is None:
            return self.expected(estimate) <= self.left
        if estimate > _ESTIMATE_ERROR * max(self.left, 0.0):
            gone = format_duration(self.seconds - self.left)
            what = f"{format_duration(self.seconds)} is shorter than one trial: {gone} have passed before it, and it "
            what += f"takes about {format_duration(estimate)} on this machine"
            fix = "raise it, or shorten the trials: training.max_steps, training.num_train_epochs"
            raise ConfigError(Problem(Code.CONFIG_BUDGET, what, key=grids.BUDGET, fix=fix))
        return True


@dataclass(frozen=True)
class Request:
    """What a sweep is to do.

    Attributes:
        grid: What is tried.
        runs: `grid.label` → config of each combination.
        run: The config itself, checked, with its rows and the directory of the best adapter.
        storage: The URL of the database of the study; None for a journal beside the adapter.
        most: Trials of the study, at most; None for any number.
        budget: How long it may take.
        halving: Whether trials may be stopped early.
    """

    grid: Grid
    runs: dict[str, RunConfig]
    run: Run
    storage: str | None
    most: int | None
    budget: Budget
    halving: bool

    def check(self) -> None:
        """Raises ConfigError, ModelError: an objective is for other rows, or an adapter does not fit the model, which
        is tried on a model without weights."""
        kind = KINDS[self.run.config.training.objective]
        others = {run.training.objective for run in self.runs.values()}
        if wrong := sorted(one for one in others if KINDS[one] != kind):
            what = f"cannot be {' or '.join(wrong)}, as the rows are {kind or 'neither pairs nor unpaired answers'}"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, grids.OPTION, "training.objective"))
        sections = {json.dumps(run.lora.model_dump(mode="json")): name for name, run in reversed(self.runs.items())}
        for name in reversed(sections.values()):
            model, lora = self.runs[name].model, auto.without_rows(self.runs[name].lora)
            try:
                attach.adapt(load.build_meta(load.load_config(model), model), lora, seed=0)
            except (ModelError, ConfigError) as error:
                problems = [replace(one, where=one.where or f"{grids.OPTION} {name}") for one in error.problems]
                raise type(error)(problems) from None

    def identity(self) -> dict[str, str]:
        """The settings that all trials of the study share, and the keys that they differ in."""
        places = (key.removesuffix(".path") for key in path_keys())
        skipped = (*_NOT_COMPARED, *places, *self.grid.keys)
        values = keys.flat(self.run.config.resolved())
        shared = {
            key: value
            for key, value in values.items()
            if not any(key == name or key.startswith(f"{name}.") for name in skipped)
        }
        drawn = "ranges" if self.grid.has_ranges else "values"
        return shared | {grids.OPTION: f"{drawn} of {', '.join(sorted(self.grid.keys))}"}


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        results: The trials.
        directory: The directory of the study.
        example_prompt: A prompt to try the adapter with, quoted for a shell.
        stop: The signal that ended it.
        notes: Lines on what is left to do.
    """

    results: StudyResults
    directory: Path
    example_prompt: str
    stop: KeyboardInterrupt | None = None
    notes: list[str] = field(default_factory=list)


def sweep(request: Request) -> SweepResult:
    """Train what is to be tried, compare it, and publish the best.

    Raises:
        LoratuneError: As `train.train`, but for a trial that diverges or needs too much memory, which is a result.
        ConfigError: The study is of something else; a budget is shorter than one trial.
        ResumeError: The study is damaged.
        LockedError, LostError: The database of the study is locked, or cannot be reached.
        NumericError: No trial has an adapter.
    """
    return _Sweep(request).run()


class _Sweep:
    """A sweep in this process.

    Attributes:
        wanted: The labels of what is tried; None where values are drawn.
        untried: The number of combinations beyond the most trials.
    """

    def __init__(self, request: Request):
        self.request = request
        output = request.run.directory.output
        self.name, self.directory = output.name, study_directory(output)
        request.check()
        seed = request.run.config.training.seed
        self.study = Study(self.directory, self.name, request.storage, halving=request.halving, seed=seed)
        self.study.check(request.identity(), record=False)
        self.runner = TrialRunner(request.run)
        for run in request.runs.values():
            self.runner.prepare_rows(run)
        if request.budget.seconds is not None and not self.study.records():  # before anything is recorded
            request.budget.fits(self.runner.estimate(next(iter(request.runs.values()))))
        self.study.check(request.identity() | self.runner.fingerprints, record=True)
        self.notes, self.untried, self.wanted = list[str](), 0, None
        if not request.grid.has_ranges:
            combinations = request.grid.spread_out()
            self.untried = len(combinations[request.most :]) if request.most else 0
            self.study.enqueue(combinations[: request.most])
            self.wanted = {label(settings) for settings in combinations[: request.most]}

    def run(self) -> SweepResult:
        """Work on trials until none is left."""
        stop: KeyboardInterrupt | None = None
        try:
            while self._work():
                pass
        except KeyboardInterrupt as interruption:
            stop = interruption
        except LoratuneError:
            with suppress(LoratuneError, OSError), self.study.locked():
                self._results().write(self.directory)
            raise
        with self.study.locked():
            return self._finish(stop)

    def _work(self) -> bool:
        """Work on the next trial. Returns whether there was one, and time for it."""
        budget, request = self.request.budget, self.request
        with self.study.claim(self.wanted, request.grid.axes, request.most) as record:
            if record is None:
                return False
            try:
                run = request.runs.get(label(record.settings)) or request.grid.run(record.settings)
            except ConfigError as error:  # of a number that was drawn between the ends of a range, which are valid
                self._fail(record, "invalid", error.problems[0].what)
                return True
            estimate = self.runner.estimate(run) if budget.seconds is not None else 0.0
            if not budget.fits(estimate):
                expected, left = format_duration(budget.expected(estimate)), format_duration(max(0.0, budget.left))
                self.notes.append(f"the next trial takes about {expected}, and {left} of the budget are left")
                return False
            note(f"trial {record.number}: {label(record.settings)}")
            self._try(record, run, estimate)
        with self.study.locked():
            results = self._results()
            results.write(self.directory)
            for trial in results.trials:  # so that a study keeps the adapters that could be chosen
                if trial.verdict == WORSE and trial.adapter is not None:
                    self._remove(trial.number)
        return True

    def _try(self, record: TrialRecord, run: RunConfig, estimate: float) -> None:
        """Train a trial and record its result."""
        budget, output = self.request.budget, self._adapter(record.number)
        halving, brief = self.request.halving, budget.begun > 0
        progress = TrialProgress(listener(), self.study, record, halving=halving, brief=brief)
        budget.begun += 1
        try:
            with listening(progress):
                outcome = self.runner.train(run, output)
        except Exception as error:
            if (failed := failure(error)) is None:
                raise
            self._fail(record, *failed)
        else:
            if not outcome.is_resumed and estimate > 0:
                budget.ratios.append(outcome.seconds / estimate)
            self.study.finish(record, outcome.record(run, self.request.grid.keys), outcome.losses.loss)
        finally:
            self.runner.remove_adapter()

    def _fail(self, record: TrialRecord, state: str, why: str) -> None:
        """Record a trial that has no adapter, and remove what it left."""
        note(f"trial {record.number}: {state}: {why}")
        self._remove(record.number)
        self.study.finish(record, {"note": why}, None, state)

    def _adapter(self, number: int) -> Path:
        """Where the adapter of a trial is: under the name of `output_dir`, which its card mentions. Raises ConfigError:
        a link leads there, so adapters would be replaced and removed outside the study."""
        output = self.directory / TRIALS / f"{number:04}" / self.name
        for path in (*reversed(output.parents[:3]), output):
            check_kind(path)
        return output

    def _remove(self, number: int) -> None:
        """Remove what a trial wrote, and nothing else."""
        output = self._adapter(number)
        with suppress(OSError):
            for path in RunDirectory(output, output.with_name(f"{output.name}.partial"), str(output)).remove_all():
                note(f"{path} is kept: no trial wrote it")
            output.parent.rmdir()

    def _results(self) -> StudyResults:
        """The trials as the storage has them, compared. Raises ResumeError: no sweep has written that."""
        runner, records = self.runner, self.study.records()
        try:
            losses = {one.number: RowLosses.unpacked(one.result["rows"]) for one in records if one.state == DONE}
            first = next(iter(losses.values()), None)
            if any(len(one.nats) != runner.rows or not first or not one.has_rows_of(first) for one in losses.values()):
                raise ValueError("other rows than those of the sweep")
            trials = rank([self._trial(record) for record in records], losses)
        except (KeyError, ValueError, TypeError):
            what, fix = "the study holds what no sweep has written", "move the study away, and start again"
            raise ResumeError(Problem(Code.SWEEP_STUDY, what, self.study.where, fix=fix)) from None
        base, keys = Path(self.request.run.config.model.name_or_path).name, self.request.grid.keys
        measured: dict[str, Any] = {"unit": runner.objective.unit, "measured_by": runner.described}
        return StudyResults(self.name, base, keys, runner.rows, runner.total, trials, **measured)

    def _trial(self, record: TrialRecord) -> TrialResult:
        adapter, shown = self._adapter(record.number), ("seconds", "steps", "adapter_bytes", "unrelated", "note")
        known: dict[str, Any] = {name: record.result[name] for name in shown if name in record.result}
        kept = str(adapter) if is_directory(adapter) and record.state == DONE else None
        values = record.result.get("values", {})
        return TrialResult(record.number, record.settings, values, record.state, adapter=kept, **known)

    def _finish(self, stop: KeyboardInterrupt | None) -> SweepResult:
        """Publish the best adapter, unless there is more to come."""
        results, notes = self._results(), self.notes
        if stop is not None:
            notes.append("nothing is published yet; rerun the same command to resume")
        elif running := results.count("running"):
            notes.append(f"{running} of the trials run in other processes; the last of these publishes the best")
        elif results.winner is not None:
            if self._publish(results.winner):
                results = replace(results, published=str(self.request.run.directory.output))
            self._note_untried(results)
        elif results.count("waiting"):
            notes.append("nothing is published, as no trial has an adapter yet; rerun the same command to resume")
        results.write(self.directory)
        if stop is None and results.count("running", "waiting", DONE) == 0:
            raise _nothing(results)
        split = self.request.run.rows
        prompt = card.example_prompt(split.train) if split is not None else "PROMPT"
        return SweepResult(results, self.directory, prompt, stop, notes)

    def _note_untried(self, results: StudyResults) -> None:
        waiting = [label(trial.settings) for trial in results.trials if trial.state == "waiting"]
        own = len(waiting) if self.wanted is None else len(self.wanted.intersection(waiting))
        if own:
            self.notes.append(f"{plural(own, 'trial')} left; the same command with --overwrite continues")
        if self.untried:
            left = plural(self.untried, "combination")
            self.notes.append(f"{left} of the grid not tried, as --trials is {self.request.most}")
        if others := len(waiting) - own:
            self.notes.append(f"{plural(others, 'trial')} of other values left, for the command that named them")

    def _publish(self, winner: TrialResult) -> bool:
        """Copy the best adapter to the output directory, whole or not at all.

        Returns:
            Whether it is there; it may be on another machine.

        Raises:
            AdapterError: It is missing or damaged.
        """
        source, directory, records = self._adapter(winner.number), self.request.run.directory, self.study.records()
        best = next(one for one in records if one.number == winner.number)
        if best.host != host() and not is_directory(source):
            where = f"the adapter of trial {winner.number}, the best, is on {best.host}, in {best.place}"
            self.notes.append(f"{where}; the same command publishes it there, if it has not done so")
            return False
        present = directory.output / RECORD_FILE
        if is_file(present) and (found := sha256(present)) in {one.result.get(DIGEST) for one in records}:
            if found == best.result.get(DIGEST):
                return True  # another process of the study was faster
            directory = replace(directory, overwrite=True)  # it published what was best then
        self._check_adapter(source, best)
        with directory.locked():
            directory.prepare(resume=False)
            directory.create_staging()
            shutil.copytree(source, directory.staging, dirs_exist_ok=True)
            for path in directory.publish():
                note(f"{path} is kept: this run did not write it")
        return True

    def _check_adapter(self, source: Path, best: TrialRecord) -> None:
        """Raises AdapterError: the adapter of the best trial is missing, damaged, or not the one that was recorded."""
        try:
            AdapterDirectory.open(source)
            if sha256(source / RECORD_FILE) != best.result.get(DIGEST):
                raise AdapterError(Problem(Code.SWEEP_STUDY, "it is not the one that the trial made", str(source)))
        except AdapterError as error:
            what = f"the adapter of trial {best.number}, the best, cannot be used: {error.problems[0].what}"
            is_elsewhere = best.place not in ("", self.study.place)
            fix = f"it was made in {best.place}: put it back; or " if is_elsewhere else ""
            fix += "move the study away, and start again"
            raise AdapterError(Problem(Code.SWEEP_STUDY, what, str(source), fix=fix)) from None


def _nothing(results: StudyResults) -> LoratuneError:
    """The error of a study without an adapter."""
    states = [*dict.fromkeys(trial.state for trial in results.trials)]
    counts = ", ".join(f"{results.count(state)} {state}" for state in states) or "none was run"
    first = next((f"; the first: {trial.note}" for trial in results.trials if trial.note), "")
    fix = "try other values, such as lower learning rates or smaller batches; those that failed are not tried again"
    problem = Problem(Code.SWEEP_ALL_FAILED, f"no trial has an adapter: {counts}{first}", grids.OPTION, fix=fix)
    return ResourceError(problem) if states == ["out of memory"] else NumericError(problem)
