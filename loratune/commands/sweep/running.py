"""A sweep from beginning to end: trials are claimed, trained and compared, and the best one is published."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.commands.sweep import grid as grids
from loratune.commands.sweep.bench import Bench
from loratune.commands.sweep.grid import label
from loratune.commands.sweep.request import Request, check_adapters, check_objectives
from loratune.commands.sweep.storage import TRIALS, check_directory
from loratune.commands.sweep.study import Claim, Study, TrialRecord
from loratune.commands.sweep.trial import DIGEST, Watched, failure, recorded
from loratune.commands.train import Reporter
from loratune.config import RunConfig, keys, path_keys
from loratune.console import format_duration, plural
from loratune.errors import (
    AdapterError,
    ConfigError,
    LoratuneError,
    NumericError,
    Problem,
    ResourceError,
    ResumeError,
)
from loratune.evaluation.study_results import (
    DONE,
    WORSE,
    RowLosses,
    StudyResults,
    TrialResult,
    rank,
    trial_result,
)
from loratune.lora.adapter_files import RECORD_FILE
from loratune.system.files import explain_full_disk, is_directory, is_file, sha256
from loratune.system.launcher import host
from loratune.training import run_dir
from loratune.training.run_dir import RunDirectory

_NOT_COMPARED = ("training.report_to", "training.ddp_timeout", "training.logging_steps", "training.save_steps")
"""Keys that two commands on one study may have at other values, beside places, which differ from machine to machine:
what is there is known by its fingerprint."""


@dataclass(frozen=True)
class Swept:
    """What a sweep came to.

    Attributes:
        results: The trials.
        directory: That of the study.
        example_prompt: A prompt to try the adapter with, quoted for a shell.
        stop: The signal that ended it.
        notes: Lines on what is left to do.
    """

    results: StudyResults
    directory: Path
    example_prompt: str
    stop: KeyboardInterrupt | None = None
    notes: list[str] = field(default_factory=list)


def sweep(request: Request, reporter: Reporter) -> Swept:
    """Train what is to be tried, compare it, and publish the best.

    Raises:
        LoratuneError: As `train.train`, but for a trial that diverges or needs too much memory, which is a result.
        ConfigError: The study is of something else; a budget is shorter than one trial.
        ResumeError: The study is damaged.
        LockedError, LostError: The database of the study is locked, or cannot be reached.
        NumericError: No trial has an adapter.
    """
    return _Sweep(request, reporter).run()


class _Sweep:
    """A sweep in this process."""

    def __init__(self, request: Request, reporter: Reporter):
        self.request, self.reporter, self.log = request, reporter, reporter.log
        self.name = request.run.directory.output.name
        check_objectives(request)
        check_adapters(request)
        seed = request.run.config.training.seed
        arguments: dict[str, Any] = {"halving": request.halving, "seed": seed}
        with explain_full_disk("the study", 4096, request.run.directory.output.parent, "make room"):
            self.study = Study(request.directory, self.name, request.storage, **arguments)
        self.study.check(self._settings(), record=False)
        self.bench = Bench(request.run, reporter.watch, self.log)
        for run in request.runs.values():
            self.bench.prepare_rows(run)
        if request.budget.seconds is not None and not self.study.records():  # before anything is recorded
            request.budget.fits(self.bench.estimate(next(iter(request.runs.values()))))
        self.study.check(self._settings() | self.bench.fingerprints, record=True)
        self.is_first, self.notes = True, list[str]()
        self.untried = 0  # combinations beyond the most trials
        self.wanted: set[str] | None = None  # the labels of what is tried; None where values are drawn

    def _settings(self) -> dict[str, str]:
        """Of the study, all that trials share, and what they differ in."""
        places = (key.removesuffix(".path") for key in path_keys())
        skipped = (*_NOT_COMPARED, *places, *self.request.grid.keys)
        values = keys.flat(self.request.run.config.resolved())
        shared = {
            key: value
            for key, value in values.items()
            if not any(key == name or key.startswith(f"{name}.") for name in skipped)
        }
        drawn = "ranges" if self.request.grid.has_ranges else "values"
        return shared | {grids.OPTION: f"{drawn} of {', '.join(sorted(self.request.grid.keys))}"}

    def run(self) -> Swept:
        """Work on trials until none is left."""
        request = self.request
        if not request.grid.has_ranges:
            combinations = request.grid.spread_out()
            self.untried = len(combinations[request.most :]) if request.most else 0
            combinations = combinations[: request.most]
            self.study.enqueue(combinations)
            self.wanted = {label(settings) for settings in combinations}
        stop: KeyboardInterrupt | None = None
        try:
            while (claim := self.study.claim(self.wanted, request.grid.axes, request.most)) is not None:
                if not self._work(claim):
                    break
        except KeyboardInterrupt as interruption:
            stop = interruption
        except LoratuneError:
            with suppress(LoratuneError, OSError), self.study.choosing():
                self._results().write(request.directory)
            raise
        with self.study.choosing(), explain_full_disk("the results", 100_000, request.directory, "make room"):
            return self._end(stop)

    def _work(self, claim: Claim) -> bool:
        """Work on a trial. Returns whether to go on: the budget may have no room for it."""
        budget = self.request.budget
        try:
            try:
                run = self.request.runs.get(label(claim.settings)) or self.request.grid.run(claim.settings)
            except ConfigError as error:  # of a number that was drawn between the ends of a range, which are valid
                self._fail(claim, "invalid", error.problems[0].what)
                return True
            estimate = self.bench.estimate(run) if budget.seconds is not None else 0.0
            if not budget.fits(estimate):
                self.study.give_back(claim)
                expected = format_duration(budget.expected(estimate))
                left = format_duration(max(0.0, budget.left))
                self.notes.append(f"the next trial takes about {expected}, and {left} of the budget are left")
                return False
            self.log(f"trial {claim.number}: {label(claim.settings)}")
            self._try(claim, run, estimate)
        except (KeyboardInterrupt, LoratuneError):
            with suppress(LoratuneError):
                self.study.give_back(claim)
            raise
        return True

    def _try(self, claim: Claim, run: RunConfig, estimate: float) -> None:
        """Train a trial and record what it came to."""
        output = self._adapter(claim.number)
        self.request.budget.begin()
        reporter = replace(
            self.reporter, progress=Watched(self.reporter.progress, self.study, claim, self.request.halving)
        )
        if not self.is_first:
            reporter = replace(reporter, plan=lambda plan: self.log(str(plan.count)))
        self.is_first = False
        try:
            outcome = self.bench.train(run, output, reporter)
        except Exception as error:
            if (failed := failure(error)) is None:
                raise
            self._fail(claim, *failed)
        else:
            if not outcome.is_resumed:
                self.request.budget.add(estimate, outcome.seconds)
            self.study.finish(claim, recorded(outcome, run, self.request.grid.keys), outcome.losses.loss)
        finally:
            self.bench.take_off()
        directory = self.request.directory
        with self.study.choosing(), explain_full_disk("the results", 100_000, directory, "make room"):
            results = self._results()
            results.write(directory)
            self._remove_worse(results)

    def _fail(self, claim: Claim, outcome: str, why: str) -> None:
        """Record a trial that has no adapter, and remove what it left."""
        self.log(f"trial {claim.number}: {outcome}: {why}")
        self._remove(claim.number)
        self.study.finish(claim, {"note": why}, None, outcome)

    def _adapter(self, number: int) -> Path:
        """Where the adapter of a trial is: under the name that its winner will have, which the card mentions.

        Raises:
            ConfigError: A link leads there, and adapters would be replaced and removed outside the study.
        """
        output = self.request.directory / TRIALS / f"{number:04}" / self.name
        for path in (*reversed(output.parents[:3]), output):
            check_directory(path)
        return output

    def _results(self) -> StudyResults:
        """What the study came to so far. Raises ResumeError: the storage holds what no sweep has written."""
        rows, total = self.bench.compared_rows
        found, losses = [], dict[int, RowLosses]()
        try:
            for record in self.study.records():
                found.append(self._trial(record))
                if record.state == DONE:
                    losses[record.number] = RowLosses.unpacked(record.result["rows"])
            first = next(iter(losses.values()), None)
            if any(len(one.nats) != rows or not first or not one.is_of_rows_of(first) for one in losses.values()):
                raise ValueError("other rows than those of the sweep")
        except (KeyError, ValueError, TypeError):
            what, fix = "the study holds what no sweep has written", "move the study away, and start again"
            raise ResumeError(Problem(Code.SWEEP_STORAGE, what, self.study.where, fix=fix)) from None
        base = Path(self.request.run.config.model.name_or_path).name
        measured: dict[str, Any] = {"unit": self.bench.measure.unit, "measured_by": self.bench.measured_by}
        return StudyResults(self.name, base, self.request.grid.keys, rows, total, rank(found, losses), **measured)

    def _trial(self, record: TrialRecord) -> TrialResult:
        result, adapter = record.result, self._adapter(record.number)
        return trial_result(
            number=record.number,
            settings=record.settings,
            values=result.get("values", {}),
            state=record.state,
            seconds=result.get("seconds"),
            steps=result.get("steps"),
            adapter_bytes=result.get("adapter_bytes"),
            unrelated=result.get("unrelated"),
            adapter=str(adapter) if is_directory(adapter) and record.state == DONE else None,
            note=result.get("note", ""),
        )

    def _remove_worse(self, results: StudyResults) -> None:
        """Remove the adapters that are worse than the best one, so that a study keeps those that could be chosen."""
        for trial in results.trials:
            if trial.verdict == WORSE and trial.adapter is not None:
                self._remove(trial.number)

    def _remove(self, number: int) -> None:
        """Remove what a trial wrote, and nothing else."""
        output = self._adapter(number)
        with suppress(OSError):
            for path in RunDirectory(output, output.with_name(f"{output.name}.partial"), str(output)).remove_all():
                self.log(f"{path} is kept: no trial wrote it")
            output.parent.rmdir()

    def _end(self, stop: KeyboardInterrupt | None) -> Swept:
        """Publish the winner, unless there is more to come."""
        results, output = self._results(), self.request.run.directory
        running = results.count("running")
        if stop is not None:
            self.notes.append("nothing is published yet; the same command goes on")
        elif running:
            self.notes.append(f"{running} of the trials run in other processes; the last of these publishes the best")
        elif results.winner is not None:
            if self._publish(results.winner, output):
                results = replace(results, published=str(output.output))
            waiting = [trial for trial in results.trials if trial.state == "waiting"]
            own = [one for one in waiting if self.wanted is None or label(one.settings) in self.wanted]
            if own:
                self.notes.append(f"{plural(len(own), 'trial')} left; the same command with --overwrite goes on")
            if self.untried:
                left = plural(self.untried, "combination")
                self.notes.append(f"{left} of the grid not tried, as --trials is {self.request.most}")
            if others := len(waiting) - len(own):
                self.notes.append(f"{plural(others, 'trial')} of other values left, for the command that named them")
        elif results.count("waiting"):
            self.notes.append("nothing is published, as no trial has an adapter yet; the same command goes on")
        else:
            results.write(self.request.directory)
            raise _nothing(results)
        results.write(self.request.directory)
        return Swept(results, self.request.directory, self.bench.example_prompt, stop, self.notes)

    def _publish(self, winner: TrialResult, directory: RunDirectory) -> bool:
        """Put a copy of the winner's adapter in the place of the output directory, whole or not at all.

        Returns:
            Whether it is there; it may be on another machine.

        Raises:
            AdapterError: It is missing or damaged.
        """
        source = self._adapter(winner.number)
        records = self.study.records()
        kept = next(one for one in records if one.number == winner.number)
        owner, recorded_digest = kept.host, kept.result.get(DIGEST)
        if owner != host() and not is_directory(source):
            where = f"the adapter of trial {winner.number}, the best, is on {owner}, in {kept.place}"
            self.notes.append(f"{where}; the same command publishes it there, if it has not done so")
            return False
        record, present = source / RECORD_FILE, directory.output / RECORD_FILE
        if is_file(present) and (found := sha256(present)) in {one.result.get(DIGEST) for one in records}:
            if found == recorded_digest:
                return True  # another process of the study was faster
            directory = replace(directory, overwrite=True)  # it published what was best then
        try:
            AdapterDirectory.open(source)
            if sha256(record) != recorded_digest:
                what = "it is not the one that the trial made"
                raise AdapterError(Problem(Code.SWEEP_WINNER_MISSING, what, str(source)))
        except AdapterError as error:
            what = f"the adapter of trial {winner.number}, the best, cannot be used: {error.problems[0].what}"
            elsewhere = kept.place not in ("", self.study.place)
            fix = f"it was made in {kept.place}: put it back; or " if elsewhere else ""
            fix += "move the study away, and start again"
            raise AdapterError(Problem(Code.SWEEP_WINNER_MISSING, what, str(source), fix=fix)) from None
        size = sum(path.stat().st_size for path in source.rglob("*"))
        with (
            run_dir.locked(directory),
            explain_full_disk("the adapter directory", size, directory.partial, "make room"),
        ):
            directory.prepare(resume=False)
            directory.create_staging()
            shutil.copytree(source, directory.staging, dirs_exist_ok=True)
            for path in directory.publish():
                self.log(f"{path} is kept: this run did not write it")
        return True


def _nothing(results: StudyResults) -> LoratuneError:
    """The error of a study without an adapter."""
    states = dict.fromkeys(trial.state for trial in results.trials)
    what = (
        f"no trial has an adapter: {', '.join(f'{results.count(state)} {state}' for state in states) or 'none was run'}"
    )
    if notes := [trial.note for trial in results.trials if trial.note]:
        what += f"; the first: {notes[0]}"
    fix = "try other values, such as lower learning rates or smaller batches; those that failed are not tried again"
    kind = ResourceError if [*states] == ["out of memory"] else NumericError
    return kind(Problem(Code.SWEEP_ALL_FAILED, what, grids.OPTION, fix=fix))
