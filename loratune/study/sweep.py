"""`loratune sweep`: trains one run with different settings, compares the trials, and publishes the best adapter."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic as now
from typing import Any

from loratune.adapter import card
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.compare.metrics import RowLosses
from loratune.config import AUTO, RunConfig, keys, path_keys
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
from loratune.lora import creation
from loratune.lora.adapter_files import RECORD_FILE
from loratune.model import load
from loratune.report.study import MAX_STEPS, WORSE, StudyResults, TrialResult, rank
from loratune.study.grid import OPTION, Grid, label
from loratune.study.storage import RESULTS, TRIALS, check_kind, study_directory
from loratune.study.study import DONE, Study, TrialRecord
from loratune.study.trials import Budget, TrialProgress, TrialRunner, failure
from loratune.system.files import is_directory, is_file, kind, sha256
from loratune.system.launcher import host
from loratune.text import format_duration, plural
from loratune.training import auto
from loratune.training import run as training
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.preflight import Run

_NOT_COMPARED = ("training.report_to", "training.ddp_timeout", "training.logging_steps", "training.save_steps")
"""Keys that may differ between commands on the same study. Paths may differ too: their content is compared by
fingerprint."""
_DIGEST = "record"
"""The key for the SHA-256 of an adapter's record, which has the digests of its other files."""
_SHOWN = ("seconds", "steps", "adapter_bytes", "unrelated", "note")
"""Keys of a stored trial that are copied to its `TrialResult`."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        results: The trials.
        directory: The directory of the study.
        example_command: The command that tries the adapter, see `card.example_command`.
        stop: The signal that ended the sweep, if any.
        notes: Lines on remaining trials and files.
    """

    results: StudyResults
    directory: Path
    example_command: str
    stop: KeyboardInterrupt | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """A sweep in this process.

    Attributes:
        grid: The settings to try.
        runs: `grid.label` → config of each combination.
        run: The checked run of the config itself, with its rows and the directory of the best adapter.
        storage: The URL of the study's database; None for a journal file in the study directory.
        most: The maximum number of trials of the study; None for no limit.
        budget: The time budget.
        halving: Whether trials may be stopped early.
    """

    grid: Grid
    runs: dict[str, RunConfig]
    run: Run
    storage: str | None
    most: int | None
    budget: Budget
    halving: bool

    def __post_init__(self) -> None:
        """Open the study, load base and rows, and enqueue the combinations. Raises as `train`."""
        self.name, self.directory = self.run.directory.output.name, study_directory(self.run.directory.output)
        self._check_grid()
        if kind(self.directory / RESULTS):
            StudyResults.read(self.directory)
        seed = self.run.config.training.seed
        self.study = Study(self.directory, self.name, self.storage, halving=self.halving, seed=seed)
        self.run = replace(self.run, config=self._as_begun(self.run.config))
        self.runs = {name: self._as_begun(run) for name, run in self.runs.items()}
        self.study.check(identity := self._identity(), record=False)
        self.runner = TrialRunner(self.run)
        for run in self.runs.values():
            self.runner.prepare_rows(run)
        if self.budget.seconds is not None and not self.study.records():  # before anything is recorded
            self.budget.fits(self.runner.estimate(next(iter(self.runs.values()))))
        self.study.check(identity | self.runner.fingerprints, record=True)
        self.notes = list[str]()
        self.wanted: set[str] | None = None  # labels of the combinations to try; None if values are sampled
        if not self.grid.has_ranges:
            combinations = self.grid.spread_out()
            self.study.enqueue(combinations[: self.most])
            self.wanted = {label(settings) for settings in combinations[: self.most]}

    def _check_grid(self) -> None:
        """Raises ConfigError, ModelError: an objective does not fit the rows, or LoRA settings do not fit the model."""
        objectives = {run.training.objective for run in self.runs.values()}
        rows = KINDS[self.run.config.training.objective]
        if wrong := sorted(one for one in objectives if KINDS[one] != rows):
            what = f"cannot be {' or '.join(wrong)}, as the rows are {rows or 'neither pairs nor unpaired answers'}"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, OPTION, "training.objective"))
        sections = {json.dumps(run.lora.model_dump(mode="json")): name for name, run in reversed(self.runs.items())}
        for name in reversed(sections.values()):
            model, lora = self.runs[name].model, auto.without_rows(self.runs[name].lora)
            try:
                creation.adapt(load.build_meta(load.load_config(model), model), lora, seed=0)
            except (ModelError, ConfigError) as error:
                problems = [replace(one, where=one.where or f"{OPTION} {name}") for one in error.problems]
                raise type(error)(problems) from None

    def _as_begun(self, run: RunConfig) -> RunConfig:
        """A config with what `auto` was when the study began: earlier releases had no retention, cut texts, and did not
        decide on Liger's kernels."""
        recorded = self.study.identity()
        if recorded is not None and run.data.truncation == AUTO:
            truncation = {"truncation": recorded.get("data.truncation", AUTO)}
            run = run.model_copy(update={"data": run.data.model_copy(update=truncation)})
        if recorded is not None and run.model.use_liger_kernel == AUTO:
            used = {"true": True, "false": False}.get(recorded.get("model.use_liger_kernel", AUTO), AUTO)
            run = run.model_copy(update={"model": run.model.model_copy(update={"use_liger_kernel": used})})
        if recorded is None or "retention.kl_weight" in recorded or run.retention.kl_weight != AUTO:
            return run
        return run.model_copy(update={"retention": run.retention.model_copy(update={"kl_weight": 0.0})})

    def _identity(self) -> dict[str, str]:
        """The settings common to all trials of the study, and the keys that vary."""
        places = (key.removesuffix(".path") for key in path_keys())
        run = self.run.config
        added = {"retention": run.retention.kl_weight != 0}
        added |= {"data.prompt_loss_weight": run.data.prompt_loss_weight > 0, "data.stride": run.data.stride > 0}
        added |= {"data.reasoning": run.data.reasoning != "train", "data.sample_by": run.data.sample_by != AUTO}
        unused = [name for name, is_set in added.items() if not is_set]  # which earlier studies do not have
        skipped = (*_NOT_COMPARED, *places, *self.grid.keys, *unused)
        shared = {
            key: value
            for key, value in keys.flat(self.run.config.resolved()).items()
            if not any(key == name or key.startswith(f"{name}.") for name in skipped)
        }
        drawn = "ranges" if self.grid.has_ranges else "values"
        return shared | {OPTION: f"{drawn} of {', '.join(sorted(self.grid.keys))}"}

    def work(self) -> SweepResult:
        """Run trials until none is left."""
        stop: KeyboardInterrupt | None = None
        try:
            while self._next_trial():
                pass
        except KeyboardInterrupt as interruption:
            stop = interruption
        except LoratuneError:
            with suppress(LoratuneError, OSError), self.study.locked():
                self._results().write(self.directory)
            raise
        with self.study.locked():
            return self._finish(stop)

    def _next_trial(self) -> bool:
        """Run the next trial. Returns False if no trial or no time is left."""
        budget = self.budget
        with self.study.claim(self.wanted, self.grid.axes, self.most) as record:
            if record is None:
                return False
            try:
                run = self.runs.get(label(record.settings)) or self._as_begun(self.grid.run(record.settings))
            except ConfigError as error:  # a sampled value may be invalid although both ends of its range are valid
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
            for trial in results.trials:  # keep only the adapters that may still be published
                if trial.verdict == WORSE and trial.adapter is not None:
                    self._remove(trial.number)
        return True

    def _try(self, record: TrialRecord, run: RunConfig, estimate: float) -> None:
        """Train a trial and record its result."""
        budget, varied, output, start = self.budget, self.grid.keys, self._adapter(record.number), now()
        halving, brief = self.halving, budget.begun > 0
        budget.begun += 1
        try:
            progress = TrialProgress(listener(), self.study, record, halving=halving, brief=brief)
            with listening(progress), self.runner.planned(run, output) as plan:
                adapter = training.carry_out(plan, began=start)
            losses, point = self.runner.score(plan), plan.resume_point
        except Exception as error:
            if (failed := failure(error)) is None:
                raise
            self._fail(record, *failed)
        else:
            assert adapter is not None
            seconds = now() - start
            if point is None and estimate > 0:
                budget.ratios.append(seconds / estimate)
            shown = {*varied, *([MAX_STEPS] if run.training.max_minutes is not None else ())}
            result = {
                "values": {key: text for key, text in keys.flat(adapter.config.resolved()).items() if key in shown},
                "seconds": seconds + (point.record.seconds if point else 0.0),
                "steps": adapter.steps,
                "adapter_bytes": adapter.adapter_bytes,
                "unrelated": adapter.unrelated.to_dict().get("change"),
                "rows": losses.packed(),
                _DIGEST: sha256(output / RECORD_FILE),
            }
            self.study.finish(record, result, losses.loss)
        finally:
            self.runner.remove_adapter()

    def _fail(self, record: TrialRecord, state: str, why: str) -> None:
        """Record a failed trial, and remove its files."""
        note(f"trial {record.number}: {state}: {why}")
        self._remove(record.number)
        self.study.finish(record, {"note": why}, None, state)

    def _adapter(self, number: int) -> Path:
        """The directory of a trial's adapter, named after `output_dir`, as its card has that name. Raises ConfigError:
        the path contains a link, so files outside the study could be replaced or removed."""
        output = self.directory / TRIALS / f"{number:04}" / self.name
        for path in (*reversed(output.parents[:3]), output):
            check_kind(path)
        return output

    def _remove(self, number: int) -> None:
        """Remove only the files that a trial wrote."""
        output = self._adapter(number)
        with suppress(OSError):
            for path in RunDirectory(output, output.with_name(f"{output.name}.partial"), str(output)).remove_all():
                note(f"{path} is kept: no trial wrote it")
            output.parent.rmdir()

    def _results(self) -> StudyResults:
        """The stored trials, compared and ranked. Raises ResumeError: the storage has invalid content."""
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
        base, keys = Path(self.run.config.model.name_or_path).name, self.grid.keys
        measured: dict[str, Any] = {"unit": runner.objective.unit, "measured_by": runner.described}
        return StudyResults(self.name, base, keys, runner.rows, runner.total, trials, **measured)

    def _trial(self, record: TrialRecord) -> TrialResult:
        adapter = self._adapter(record.number)
        known: dict[str, Any] = {name: record.result[name] for name in _SHOWN if name in record.result}
        kept = str(adapter) if is_directory(adapter) and record.state == DONE else None
        values = record.result.get("values", {})
        return TrialResult(record.number, record.settings, values, record.state, adapter=kept, **known)

    def _finish(self, stop: KeyboardInterrupt | None) -> SweepResult:
        """Publish the best adapter, unless trials are still running."""
        results, notes = self._results(), self.notes
        running, waiting = results.count("running"), results.count("waiting")
        if stop is not None:
            notes.append("nothing is published yet; rerun the same command to resume")
        elif running:
            notes.append(f"{running} of the trials run in other processes; the last of these publishes the best")
        else:
            if results.winner is not None and self._publish(results.winner):
                results = replace(results, published=str(self.run.directory.output))
            if waiting:
                option = " with --overwrite" if results.published else ""
                notes.append(f"{plural(waiting, 'trial')} left; the command that named them{option} continues")
            if self.most and not self.grid.has_ranges and (left := len(self.grid.combinations()) - self.most) > 0:
                notes.append(f"{plural(left, 'combination')} of the grid not tried, as --trials is {self.most}")
        results.write(self.directory)
        if stop is None and running + waiting + results.count(DONE) == 0:
            raise _nothing(results)
        rows = self.run.rows.train if self.run.rows is not None else None
        command = card.example_command(str(self.run.directory.output), rows, self.run.system)
        return SweepResult(results, self.directory, command, stop, notes)

    def _publish(self, winner: TrialResult) -> bool:
        """Copy the best adapter to the output directory atomically.

        Returns:
            Whether it is published; False if it is on another machine.

        Raises:
            AdapterError: The adapter is missing or damaged.
        """
        source, directory, records = self._adapter(winner.number), self.run.directory, self.study.records()
        best = next(one for one in records if one.number == winner.number)
        if best.host != host() and not is_directory(source):
            where = f"the adapter of trial {winner.number}, the best, is on {best.host}, in {best.place}"
            self.notes.append(f"{where}; the same command publishes it there, if it has not done so")
            return False
        present = directory.output / RECORD_FILE
        if is_file(present) and (found := sha256(present)) in {one.result.get(_DIGEST) for one in records}:
            if found == best.result.get(_DIGEST):
                return True  # another process of the study has published it
            directory = replace(directory, overwrite=True)  # an earlier best adapter of this study
        try:
            AdapterDirectory.open(source)
            is_whole = sha256(source / RECORD_FILE) == best.result.get(_DIGEST)
        except AdapterError:
            is_whole = False
        if not is_whole:
            what = f"the adapter of trial {best.number}, the best, is missing, or not as it was made in {best.place}"
            fix = "put it back; or move the study away, and start again"
            raise AdapterError(Problem(Code.SWEEP_STUDY, what, str(source), fix=fix))
        with directory.locked():
            directory.prepare(resume=False)
            directory.create_staging()
            shutil.copytree(source, directory.staging, dirs_exist_ok=True)
            for path in directory.publish():
                note(f"{path} is kept: this run did not write it")
        return True


def _nothing(results: StudyResults) -> LoratuneError:
    """The error for a study in which no trial produced an adapter."""
    states = [*dict.fromkeys(trial.state for trial in results.trials)]
    counts = ", ".join(f"{results.count(state)} {state}" for state in states) or "none was run"
    first = next((f"; the first: {trial.note}" for trial in results.trials if trial.note), "")
    fix = "try other values, such as lower learning rates or smaller batches; those that failed are not tried again"
    problem = Problem(Code.SWEEP_ALL_FAILED, f"no trial has an adapter: {counts}{first}", OPTION, fix=fix)
    return ResourceError(problem) if states == ["out of memory"] else NumericError(problem)
