"""A sweep: the study in Optuna's storage, the loop over its trials (ask, train or resume, tell), and its result.

The storage is Optuna's journal in `<output_dir>.study/`, or a database that several machines share. Each trial works in
`trials/NUMBER/` there and holds the lock of that directory. A trial that the storage calls running, but whose lock here
is free, was cut off: it is asked for again, and continues from its checkpoint. Trials of other machines are left alone.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic as now
from typing import Annotated, Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass as validated

from loratune.adapter import card
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.compare.metrics import RowLosses, Values
from loratune.config import AUTO, RunConfig, keys, path_keys
from loratune.data.formats import KINDS
from loratune.errors import (
    AdapterError,
    ConfigError,
    LockedError,
    LoratuneError,
    ModelError,
    NumericError,
    Problem,
    ResourceError,
    ResumeError,
    is_disk_full,
)
from loratune.events import Event, NoteEvent, PlanEvent, listener, listening, note
from loratune.lora import creation
from loratune.lora.adapter_files import RECORD_FILE
from loratune.model import load
from loratune.report.study import (
    DONE,
    INTERRUPTED,
    MAX_STEPS,
    TRIALS,
    WORSE,
    RowsCurve,
    StudyResults,
    TrialResult,
    rank,
    study_directory,
    trial_directory,
)
from loratune.study.grid import GRID, TRAIN_ROWS, Axis, Grid, Settings, label
from loratune.study.trials import Budget, TrialRunner, failure
from loratune.system import platforms
from loratune.system.files import is_directory, is_file, is_incidental_file, kind, open_lock, sha256, try_lock
from loratune.text import format_duration, plural
from loratune.training import auto
from loratune.training import run as training
from loratune.training.auto import Facts
from loratune.training.checkpoints.run_dir import RunDirectory
from loratune.training.preflight import Run

JOURNAL, LOCK = "journal.log", "lock"
_VARIED = "--grid"
"""The entry of a study's identity with the keys that vary."""
_IDENTITY = "identity"
"""An attribute of a study: the settings and fingerprints that all trials share."""
_SETTINGS, _FIRST, _RESULT, _OUTCOME = "settings", "first", "result", "outcome"
"""Attributes of a trial in the storage. first: the number of its directory, under which it was asked for at first."""
_STATES = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: DONE}
_MAX_DRAWS = 50
"""After this many draws that were all tried before, no new combination is expected."""
_FOREIGN = "the study holds what no sweep has written"
_NOT_COMPARED = ("training.report_to", "training.ddp_timeout", "training.logging_steps", "training.save_steps")
"""Keys that may differ between commands on the same study. Paths may differ too: their content is compared by
fingerprint."""
_PUBLISHING_SECONDS = 30.0
"""How long to wait for another process of the study that publishes its best adapter."""
_RIGHT, _DECIDED = "right", "decided"
"""Keys of a stored trial on a part of the rows: its right answers, and the values that it has decided for `auto`."""
_DIGEST = "record"
"""The key for the SHA-256 of an adapter's record, which has the digests of its other files."""
_SHOWN = ("seconds", "steps", "adapter_bytes", "unrelated", "note", "headline", "outcome")
"""Keys of a stored trial that are copied to its `TrialResult`."""


@validated(frozen=True)
class TrialRecord:
    """A trial as the storage has it.

    Attributes:
        number: The number of its directory, and in the table.
        settings: The settings to try.
        state: `waiting`, `running`, `done`, or why there is no adapter, see `TrialResult.state`.
        result: Further results.
        optuna_number: Its number in Optuna's storage, which is another one after it was cut off.
    """

    number: Annotated[int, Field(ge=0)]
    settings: Settings
    state: str
    result: dict[str, Any]
    optuna_number: int


class Study:
    """A study in Optuna's storage.

    Attributes:
        directory: The directory of the study, where its trials work on this machine.
        where: The journal, or the URL of the database without login and options.
    """

    def __init__(self, directory: Path, name: str, url: str | None, seed: int):
        """Open a study, or begin one.

        Args:
            directory: See above.
            name: The name of the study in the storage.
            url: The URL of a database; None for a journal in `directory`.
            seed: The seed of what is drawn from ranges.

        Raises:
            ConfigError: The directory holds something else, or the URL cannot be opened.
            LoratuneError: See `_explaining`.
        """
        self.directory, self._url, self._seed = directory, url, seed
        scheme, separator, place = (url or "").partition("://")
        place = place if scheme.startswith("sqlite") else place.rpartition("@")[2]
        shown = f"{scheme}://{place.partition('?')[0]}" if separator else ""
        self.where = str(directory / JOURNAL) if url is None else shown
        if kind(directory):
            names = sorted(path.name for path in directory.iterdir()) if is_directory(directory) else [directory.name]
            if not {JOURNAL, TRIALS} & {*names} and (others := [one for one in names if not is_incidental_file(one)]):
                what, fix = f"holds {others[0]}, and no study", "move it away, or choose another output_dir"
                raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(directory), fix=fix))
        if url is None:
            directory.mkdir(exist_ok=True)
        elif scheme.startswith("sqlite") and (":memory:" in url or "mode=memory" in url or not place.strip("/")):
            raise self._no_database("a study in memory would be lost")
        with self._explaining(is_opening=True):
            storage: Any = _journal(directory / JOURNAL) if url is None else url
            names = optuna.get_all_study_names(storage)
            if url is None and names and name not in names:
                raise self._other_program(f"holds a study called {names[0]!r}, not one of a sweep into {name!r}")
            self._study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
            (directory / TRIALS).mkdir(parents=True, exist_ok=True)

    def _other_program(self, what: str) -> ConfigError:
        fix = "move it away, or choose another output_dir, after which a study is named, or another database"
        return ConfigError(Problem(Code.SWEEP_STUDY, what, self.where, fix=fix))

    def _no_database(self, why: str) -> ConfigError:
        what = f"is not the URL of a database that can be opened here: {why}"
        fix = "write sqlite:///study.db for a file, and install the client of any other database"
        return ConfigError(Problem(Code.SWEEP_STUDY, what, self.where, "storage", fix))

    @contextmanager
    def _explaining(self, *, is_opening: bool = False) -> Iterator[None]:
        """Turn errors of the file system, of Optuna, and of the database and its client into one of these.

        Raises:
            ConfigError: The database cannot be opened.
            ResourceError: The disk is full.
            LockedError: Another program has locked the database.
            ResumeError: The storage cannot be read or written.
        """
        try:
            yield
        except LoratuneError:
            raise
        except Exception as error:
            if is_disk_full(error):
                problem = Problem(Code.SYSTEM_DISK_FULL, "no room for the study", self.where, fix="make room")
                raise ResourceError(problem) from error
            reason = next(iter(str(error.__cause__ or error).splitlines()), "") or type(error).__name__
            for secret in re.findall(r"(?<=:)[^:@/]+(?=@)|(?<==)[^&]+", self._url or ""):
                reason = reason.replace(secret, "***")
            if "locked" in reason and self._url is not None:
                what, fix = "another program has locked the database of the study", "wait until it ends, then rerun"
                raise LockedError(Problem(Code.SYSTEM_LOCKED, what, self.where, "storage", fix)) from error
            if is_opening and self._url is not None:
                raise self._no_database(reason) from error
            what, fix = f"the study cannot be read or written: {reason}", "repair it, then rerun to resume"
            raise ResumeError(Problem(Code.SWEEP_STUDY, what, self.where, fix=fix)) from error

    def identity(self) -> dict[str, Any] | None:
        """The recorded identity of the study, see `check`; None before the first. Raises LoratuneError: it is none."""
        with self._explaining():
            recorded = self._study.user_attrs.get(_IDENTITY)
            if recorded is not None and not isinstance(recorded, dict):
                raise TypeError(_FOREIGN)
            return recorded

    def check(self, identity: Mapping[str, Any], *, record: bool) -> None:
        """Compare the identity of the study with the recorded one.

        Args:
            identity: The settings and fingerprints that its trials share, or a part of them.
            record: Whether to record it if there is none yet.

        Raises:
            ConfigError: It is the study of something else.
        """
        if (recorded := self.identity()) is None:
            with self._explaining():
                if self._study.get_trials(deepcopy=False) or self._study.directions != [StudyDirection.MINIMIZE]:
                    raise self._other_program(f"holds a study called {self._study.study_name!r} that no sweep began")
                if record:
                    self._study.set_user_attr(_IDENTITY, dict(identity))
        elif other := [name for name in identity if recorded.get(name) != identity[name]]:
            named = [GRID if name == _VARIED else name for name in other]
            what = f"is a study of other settings than these: {', '.join(named)}"
            fix = "choose another output_dir, or move the study away"
            raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(self.directory), fix=fix))

    def records(self) -> list[TrialRecord]:
        """The trials in the order of their numbers: of each settings the first, as two machines may try the same."""
        with self._explaining():
            first = dict[str, TrialRecord]()
            trials = [one for one in self._study.get_trials(deepcopy=False) if one.state != TrialState.FAIL]
            found = [_record(trial) for trial in trials if _SETTINGS in trial.user_attrs]
            for record in sorted(found, key=lambda one: (one.number, one.optuna_number)):
                first.setdefault(label(record.settings), record)
            return [*first.values()]

    def is_cut_off(self, record: TrialRecord) -> bool:
        """Whether the process of a running trial in this directory has ended."""
        place = trial_directory(self.directory, record.number)
        if record.state != "running" or not (self._url is None or place.is_dir()):
            return False
        place.mkdir(exist_ok=True)
        with try_lock(place / LOCK) as is_free:
            return is_free

    @contextmanager
    def next_trial(
        self, wanted: Sequence[Settings] | None, axes: Sequence[Axis], most: int | None
    ) -> Iterator[TrialRecord | None]:
        """Ask Optuna for the next trial, and hold the lock of its directory inside.

        Args:
            wanted: The combinations to try, in this order; None where values are drawn.
            axes: What is varied.
            most: How many trials the study may have where values are drawn; None for any number.

        Returns:
            The trial; None if there is nothing left to do for this process.
        """
        with ExitStack() as stack:
            record = None
            with self._explaining(), self._exclusive():
                for _ in range(_MAX_DRAWS):
                    if not self._enqueue(wanted, most):
                        break
                    if (record := self._ask(wanted, axes)) is not None:
                        place = trial_directory(self.directory, record.number)
                        place.mkdir(exist_ok=True)
                        if stack.enter_context(try_lock(place / LOCK)):
                            break
                        record = None
            yield record

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes of this machine from asking, so that none finds a trial whose lock is not held yet."""
        with open_lock(self.directory / LOCK, os.O_RDWR | os.O_CREAT) as file:
            platforms.lock(file, wait=True)
            yield

    def _enqueue(self, wanted: Sequence[Settings] | None, most: int | None) -> bool:
        """Put a trial that was cut off, or the next combination, into Optuna's queue. Returns False if none is left."""
        records = self.records()
        for record in records:
            if (wanted is None or record.settings in wanted) and self.is_cut_off(record):
                trials = self._study.get_trials(deepcopy=False)
                if trials[record.optuna_number].state != TrialState.RUNNING:  # its process has just finished it
                    continue
                again = {_SETTINGS: record.settings, _FIRST: record.number}
                if not any(one.state == TrialState.WAITING and one.user_attrs == again for one in trials):
                    self._study.enqueue_trial(trials[record.optuna_number].params, user_attrs=again)
                self._study.tell(record.optuna_number, state=TrialState.FAIL)
                return True
        if any(record.state == "waiting" for record in records):
            return True
        if wanted is None:
            return most is None or len(records) < most
        tried = [record.settings for record in records]
        if (settings := next((one for one in wanted if one not in tried), None)) is not None:
            self._study.enqueue_trial({}, user_attrs={_SETTINGS: settings})
        return settings is not None

    def _ask(self, wanted: Sequence[Settings] | None, axes: Sequence[Axis]) -> TrialRecord | None:
        """A trial of the queue, or one that is drawn; None if its settings are known, or another process has it."""
        trials = self._study.get_trials(deepcopy=False)
        self._study.sampler = optuna.samplers.TPESampler(seed=self._seed + len(trials), constant_liar=True)
        self._trial = self._study.ask({} if wanted is not None else {axis.key: axis.distribution for axis in axes})
        if _SETTINGS not in self._trial.user_attrs:
            texts = {
                key: f"{value:.4g}" if isinstance(value, float) else str(value)
                for key, value in self._trial.params.items()
            }
            settings = {axis.key: texts[axis.key] for axis in axes if axis.key in texts}
            if not settings or any(record.settings == settings for record in self.records()):
                self.withdraw()
                return None
            self._trial.set_user_attr(_SETTINGS, settings)
        record = _record(self._study.get_trials(deepcopy=False)[self._trial.number])
        if record.settings.keys() != {axis.key for axis in axes}:  # which would reach the config of a run
            raise ValueError(_FOREIGN)
        return record

    def withdraw(self) -> None:
        """Take the trial of `next_trial` back, as if it had not been asked for."""
        with self._explaining():
            self._study.tell(self._trial, state=TrialState.FAIL)

    def finish(self, result: Mapping[str, Any], loss: float | None, outcome: str = "") -> None:
        """Record the result of the trial of `next_trial`. loss: None without an adapter, whose state is `outcome`."""
        with self._explaining(), suppress(UpdateFinishedTrialError):
            self._trial.set_user_attr(_RESULT, dict(result))
            if outcome:
                self._trial.set_user_attr(_OUTCOME, outcome)
            # pruned counts as bad for later draws
            state = TrialState.COMPLETE if loss is not None else TrialState.PRUNED
            self._study.tell(self._trial, loss, state=state, skip_if_finished=True)


def _journal(path: Path) -> JournalStorage:
    """Optuna's journal, without an incomplete last line, which a full disk or a power cut leaves: Optuna would append
    to it, and could read neither."""
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes() if is_file(path) else b""
        if content and not content.startswith(b'{"op_code":'):
            raise ValueError("it is not the journal of a study")
        if content and not content.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _record(trial: FrozenTrial) -> TrialRecord:
    """A trial of a storage. Raises ValueError: no sweep has written it."""
    attributes = trial.user_attrs
    try:
        return TrialRecord(
            number=attributes.get(_FIRST, trial.number),
            settings=attributes[_SETTINGS],
            state=_STATES.get(trial.state) or attributes.get(_OUTCOME, "diverged"),
            result=attributes.get(_RESULT, {}),
            optuna_number=trial.number,
        )
    except ValidationError:
        raise ValueError(_FOREIGN) from None


def _right(text: str, losses: RowLosses) -> Values:
    """The right answers of a trial from its storage; empty without any. Raises ValueError: they are of other rows."""
    if text and (len(text) != len(losses) or {*text} - {*"01"}):
        raise ValueError(_FOREIGN)
    return np.array([float(one) for one in text])


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
    """

    grid: Grid
    runs: dict[str, RunConfig]
    run: Run
    storage: str | None
    most: int | None
    budget: Budget

    def __post_init__(self) -> None:
        """Open the study, and load base and rows. Raises as `train`."""
        output = self.run.directory.output
        self.name, self.directory = output.name, study_directory(output)
        self._check_grid()
        self.study = Study(self.directory, self.name, self.storage, self.run.config.training.seed)
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
        self.wanted = None if self.grid.has_ranges else self.grid.spread_out()[: self.most]

    def _check_grid(self) -> None:
        """Raises ConfigError, ModelError: an objective does not fit the rows, or LoRA settings do not fit the model."""
        objectives = {run.training.objective for run in self.runs.values()}
        rows = KINDS[self.run.config.training.objective]
        if wrong := sorted(one for one in objectives if KINDS[one] != rows):
            what = f"cannot be {' or '.join(wrong)}, as the rows are {rows or 'neither pairs nor unpaired answers'}"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, GRID, "training.objective"))
        sections = {json.dumps(run.lora.model_dump(mode="json")): name for name, run in reversed(self.runs.items())}
        for name in reversed(sections.values()):
            model, (lora, _) = self.runs[name].model, auto.decide_lora(self.runs[name].lora, Facts())
            try:
                creation.adapt(load.build_meta(load.load_config(model), model), lora, seed=0)
            except (ModelError, ConfigError) as error:
                problems = [replace(one, where=one.where or f"{GRID} {name}") for one in error.problems]
                raise type(error)(problems) from None

    def _as_begun(self, config: RunConfig) -> RunConfig:
        """A config with what `auto` was when the study began: earlier releases had no retention, cut texts, and did not
        decide on Liger's kernels."""
        recorded = self.study.identity()
        if recorded is not None and config.data.truncation == AUTO:
            truncation = {"truncation": recorded.get("data.truncation", AUTO)}
            config = config.model_copy(update={"data": config.data.model_copy(update=truncation)})
        if recorded is not None and config.model.use_liger_kernel == AUTO:
            used = {"true": True, "false": False}.get(recorded.get("model.use_liger_kernel", AUTO), AUTO)
            config = config.model_copy(update={"model": config.model.model_copy(update={"use_liger_kernel": used})})
        if recorded is None or "retention.kl_weight" in recorded or config.retention.kl_weight != AUTO:
            return config
        return config.model_copy(update={"retention": config.retention.model_copy(update={"kl_weight": 0.0})})

    def _identity(self) -> dict[str, str]:
        """The settings common to all trials of the study, and the keys that vary."""
        places = (key.removesuffix(".path") for key in path_keys())
        run = self.run.config
        added = {"retention": run.retention.kl_weight != 0}
        added |= {"data.prompt_loss_weight": run.data.prompt_loss_weight > 0, "data.stride": run.data.stride > 0}
        added |= {"data.reasoning": run.data.reasoning != "train", "data.sample_by": run.data.sample_by != AUTO}
        added |= {TRAIN_ROWS: run.data.max_train_samples is not None}
        added |= {"data.empty_reasoning": run.data.empty_reasoning != AUTO}
        unused = [name for name, is_set in added.items() if not is_set]  # which earlier studies do not have
        skipped = (*_NOT_COMPARED, *places, *self.grid.keys, *unused)
        shared = {
            key: value
            for key, value in keys.flat(self.run.config.resolved()).items()
            if not any(key == name or key.startswith(f"{name}.") for name in skipped)
        }
        drawn = "parts" if self.grid.by_rows else "ranges" if self.grid.has_ranges else "values"
        return shared | {_VARIED: f"{drawn} of {', '.join(sorted(self.grid.keys))}"}

    def work(self) -> SweepResult:
        """Run trials until none is left."""
        stop: KeyboardInterrupt | None = None
        try:
            while self._next_trial():
                pass
        except KeyboardInterrupt as interruption:
            stop = interruption
        except LoratuneError:
            with suppress(LoratuneError, OSError):
                self._results().write(self.directory)
            raise
        return self._finish(stop)

    def _all_rows(self) -> TrialRecord | None:
        """The trial on all rows, where parts of them are tried and it has an adapter."""
        if not self.grid.by_rows:
            return None
        first = self.grid.combinations()[0]
        return next((one for one in self.study.records() if one.settings == first and one.state == DONE), None)

    def _next_trial(self) -> bool:
        """Run the next trial. Returns False if no trial or no time is left."""
        budget, all_rows = self.budget, self._all_rows()
        wanted = self.wanted[:1] if self.wanted and self.grid.by_rows and all_rows is None else self.wanted
        with self.study.next_trial(wanted, self.grid.axes, self.most) as record:
            if record is None:
                return False
            try:
                run = self.runs.get(label(record.settings)) or self._as_begun(self.grid.run(record.settings))
                if all_rows is not None:
                    run, _ = auto.with_decided(run, all_rows.result[_DECIDED])
            except ConfigError as error:  # a drawn value may be invalid although both ends of its range are valid
                self._fail(record, "invalid", error.problems[0].what)
                return True
            estimate = self.runner.estimate(run) if budget.seconds is not None else 0.0
            if not budget.fits(estimate):
                expected, left = format_duration(budget.expected(estimate)), format_duration(max(0.0, budget.left))
                self.notes.append(f"the next trial takes about {expected}, and {left} of the budget are left")
                if record.number == record.optuna_number:  # else it was cut off, and continues from its checkpoint
                    self.study.withdraw()
                    self._remove(record.number)
                return False
            note(f"trial {record.number}: {label(record.settings)}")
            self._try(record, run, estimate)
        results = self._results()
        results.write(self.directory)
        for trial in results.trials:  # keep only the adapters that may still be published
            if trial.verdict == WORSE and trial.adapter is not None:
                self._remove(trial.number)
        return True

    def _try(self, record: TrialRecord, config: RunConfig, estimate: float) -> None:
        """Train a trial and record its result."""
        budget, output, start, outer = self.budget, self._adapter(record.number), now(), listener()
        brief, is_part = budget.begun > 0, self.grid.by_rows and record.settings != self.grid.combinations()[0]
        budget.begun += 1

        def listen(event: Event) -> None:
            outer(NoteEvent(event.summary) if brief and isinstance(event, PlanEvent) else event)

        try:
            with listening(listen), self.runner.planned(config, output) as plan:
                adapter = training.carry_out(plan, began=start, allow_worse=is_part)  # a part is not published
            losses, point = self.runner.score(plan), plan.resume_point
            right = self.runner.right_answers(plan) if self.grid.by_rows else ""
        except Exception as error:
            if (failed := failure(error)) is None:
                raise
            self._fail(record, *failed)
        else:
            assert adapter is not None
            seconds = now() - start
            if point is None and estimate > 0:
                budget.ratios.append(seconds / estimate)
            shown = {*self.grid.keys, *([MAX_STEPS] if config.training.max_minutes is not None else ())}
            result = {
                "values": {key: text for key, text in keys.flat(adapter.config.resolved()).items() if key in shown},
                "seconds": seconds + (point.record.seconds if point else 0.0),
                "steps": adapter.steps,
                "adapter_bytes": adapter.adapter_bytes,
                "unrelated": adapter.metrics["unrelated_text"].get("change"),
                "headline": adapter.headline,
                "outcome": adapter.outcome,
                "rows": losses.packed(),
                _DIGEST: sha256(output / RECORD_FILE),
            }
            if self.grid.by_rows:
                result |= {_RIGHT: right, _DECIDED: auto.decided_values(adapter.config)}
            self.study.finish(result, losses.loss)
        finally:
            self.runner.remove_adapter()

    def _fail(self, record: TrialRecord, state: str, why: str) -> None:
        """Record a failed trial, and remove its files."""
        note(f"trial {record.number}: {state}: {why}")
        self.study.finish({"note": why}, None, state)
        self._remove(record.number)

    def _adapter(self, number: int) -> Path:
        """The directory of a trial's adapter, named after `output_dir`, as its card has that name."""
        return trial_directory(self.directory, number) / self.name

    def _remove(self, number: int) -> None:
        """Remove only the files that a trial wrote."""
        output = self._adapter(number)
        with suppress(OSError):
            for path in RunDirectory(output, output.with_name(f"{output.name}.partial"), str(output)).remove_all():
                note(f"{path} is kept: no trial wrote it")
            (output.parent / LOCK).unlink(missing_ok=True)
            output.parent.rmdir()

    def _results(self) -> StudyResults:
        """The stored trials, compared and ranked. Raises ResumeError: the storage has invalid content."""
        runner, records = self.runner, self.study.records()
        try:
            losses = {one.number: RowLosses.unpacked(one.result["rows"]) for one in records if one.state == DONE}
            first = next(iter(losses.values()), None)
            if any(len(one.nats) != runner.rows or not first or not one.has_rows_of(first) for one in losses.values()):
                raise ValueError("other rows than those of the sweep")
            reference = self._all_rows()
            trials = rank([self._trial(record) for record in records], losses, reference.number if reference else None)
            curve = self._curve(records, losses) if reference is not None else None
        except (KeyError, ValueError, TypeError):
            what, fix = "the study holds what no sweep has written", "move the study away, and start again"
            raise ResumeError(Problem(Code.SWEEP_STUDY, what, self.study.where, fix=fix)) from None
        base, keys = Path(self.run.config.model.name_or_path).name, self.grid.keys
        measured: dict[str, Any] = {
            "unit": runner.objective.unit, "measured_by": runner.described, "curve": curve
        }  # fmt: skip
        return StudyResults(self.name, base, keys, runner.rows, runner.total, trials, **measured)

    def _curve(self, records: Sequence[TrialRecord], losses: Mapping[int, RowLosses]) -> RowsCurve:
        """What more training rows bring. Raises KeyError, ValueError: the storage has invalid content."""
        done = {one.number: one for one in records if one.number in losses}
        right = {number: _right(one.result[_RIGHT], losses[number]) for number, one in done.items()}
        counts = {number: int(one.settings[TRAIN_ROWS]) for number, one in done.items()}
        return RowsCurve.of(counts, losses, right if all(map(len, right.values())) else None)

    def _trial(self, record: TrialRecord) -> TrialResult:
        adapter = self._adapter(record.number)
        known: dict[str, Any] = {name: record.result[name] for name in _SHOWN if name in record.result}
        kept = str(adapter) if is_directory(adapter) and record.state == DONE else None
        state = INTERRUPTED if self.study.is_cut_off(record) else record.state
        return TrialResult(
            record.number, record.settings, record.result.get("values", {}), state, adapter=kept, **known
        )

    def _finish(self, stop: KeyboardInterrupt | None) -> SweepResult:
        """Publish the best adapter so far."""
        results, notes = self._results(), self.notes
        if stop is not None:
            notes.append("nothing is published yet; rerun the same command to resume")
        else:
            if results.winner is not None and self._publish(results.winner):
                results = replace(results, published=str(self.run.directory.output))
            again = f"the same command{' with `overwrite=True`' if results.published else ''}"
            if running := results.count("running"):
                notes.append(
                    f"{plural(running, 'trial')} run elsewhere, or were cut off there, where {again} continues"
                )
            tried = [trial.settings for trial in results.trials if trial.state != INTERRUPTED]
            if left := sum(settings not in tried for settings in self.wanted or ()):
                notes.append(f"{plural(left, 'combination')} left; {again} continues")
            if self.most and self.wanted and (left := len(self.grid.combinations()) - len(self.wanted)) > 0:
                notes.append(f"{plural(left, 'combination')} of the grid not tried, as `trials=...` is {self.most}")
        results.write(self.directory)
        if stop is None and results.count("running", "waiting", INTERRUPTED, DONE) == 0:
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
        source, directory = self._adapter(winner.number), self.run.directory
        digests = {record.number: record.result.get(_DIGEST) for record in self.study.records()}
        if self.storage is not None and not is_directory(source.parent):
            where = f"the adapter of trial {winner.number}, the best, is on the machine that trained it"
            self.notes.append(f"{where}; the same command publishes it there, if it has not done so")
            return False
        with directory.locked(_PUBLISHING_SECONDS):
            present = directory.output / RECORD_FILE
            if is_file(present) and (found := sha256(present)) in digests.values():
                if found == digests[winner.number]:
                    return True  # another process of the study has published it
                directory = replace(directory, overwrite=True)  # an earlier best adapter of this study
            try:
                AdapterDirectory.open(source)
                is_whole = sha256(source / RECORD_FILE) == digests[winner.number]
            except AdapterError:
                is_whole = False
            if not is_whole:
                what = f"the adapter of trial {winner.number}, the best, is missing, or not as it was made"
                fix = "put it back; or move the study away, and start again"
                raise AdapterError(Problem(Code.SWEEP_STUDY, what, str(source), fix=fix))
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
    problem = Problem(Code.SWEEP_ALL_FAILED, f"no trial has an adapter: {counts}{first}", GRID, fix=fix)
    return ResourceError(problem) if states == ["out of memory"] else NumericError(problem)
