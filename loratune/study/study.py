"""The study of a sweep in Optuna's storage: its trials, the processes that run them, and their results.

The storage is a journal in `<output_dir>.study/`, or a database that several machines share. A process claims a trial
by a lock named after the trial's directory, which ends with the process, and by setting the trial to running, which
Optuna does atomically. So on one machine a running trial whose lock is free was abandoned, and is waiting again. On
other machines Optuna's heartbeats and its retry callback do the same. A trial continues from the checkpoint in its
directory.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from loratune.codes import Code
from loratune.errors import ConfigError, LoratuneError, Problem
from loratune.study import storage
from loratune.study.grid import Axis, Settings, label
from loratune.study.storage import IDENTITY, JOURNAL, LOCKS
from loratune.system import platforms
from loratune.system.files import open_lock, try_lock
from loratune.system.launcher import host

DONE = "done"
_FIRST, _SETTINGS, _HOST, _PLACE, _RESULT, _OUTCOME = "first", "settings", "host", "place", "result", "outcome"
"""Attributes of a trial in the storage. first: the number under which its directory was made, before it was retried."""
_STATES = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: DONE}
_MAX_DUPLICATES = 50
"""After this many consecutive duplicate draws, no new combination is expected."""
_FOREIGN = "the study holds what no sweep has written"


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the storage has it.

    Attributes:
        number: The number of its directory, and in the table.
        settings: The settings to try.
        state: `waiting`, `running`, `done`, or why there is no adapter, see `TrialResult.state`.
        result: Further results.
        host: The machine that worked on it.
        place: The directory of the study on that machine.
        optuna_number: Its number in Optuna's storage, which is another one after a retry.
    """

    number: Annotated[int, Field(ge=0)]
    settings: Settings
    state: str
    result: dict[str, Any]
    host: str
    place: str
    optuna_number: int


class Study:
    """A study in a storage, as one process sees it.

    Attributes:
        directory: The directory of the study, where its trials work on this machine.
        where: The journal, or the URL of the database without passwords.
        place: `directory`, absolute and without links.
    """

    def __init__(self, directory: Path, name: str, url: str | None, *, halving: bool, seed: int):
        """Open a study, or begin one.

        Args:
            directory: See above.
            name: The name of the study in the storage.
            url: The URL of a database; None for a journal in `directory`.
            halving: Whether trials may be stopped early, by successive halving.
            seed: The seed of what is drawn from ranges.

        Raises:
            LoratuneError: See `storage.check_place`; or the storage cannot be opened.
        """
        storage.check_place(directory, name, url)
        self.directory, self._url, self._seed = directory, url, seed
        self.where = str(directory / JOURNAL) if url is None else storage.shown(url)
        self.place = str(directory.resolve())
        self._last_beat = 0.0
        pruner = optuna.pruners.SuccessiveHalvingPruner() if halving else optuna.pruners.NopPruner()
        with self._explaining():
            (directory / LOCKS).mkdir(parents=True, exist_ok=True)
            with self.locked():
                self._storage: Any = (
                    storage.open_journal(directory / JOURNAL) if url is None else storage.open_database(url)
                )
                is_new = name not in optuna.get_all_study_names(self._storage)
                begin = optuna.create_study if is_new else optuna.load_study
                self._study = begin(study_name=name, storage=self._storage, pruner=pruner)
                self._id = self._storage.get_study_id_from_name(name)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raises LoratuneError: something is wrong with the storage, see `storage.explained`."""
        try:
            yield
        except LoratuneError:
            raise
        except Exception as error:  # of the file system, Optuna, SQLAlchemy, or a database's own client
            raise storage.explained(error, self.where, self._url) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process on this machine claims a trial, publishes, or removes adapters."""
        with open_lock(self.directory / LOCKS / "study", os.O_RDWR | os.O_CREAT) as file:
            platforms.lock(file, wait=True)
            yield

    def identity(self) -> dict[str, Any] | None:
        """The recorded identity of the study, see `check`; None before the first. Raises LoratuneError: it is none."""
        with self._explaining():
            recorded = self._study.user_attrs.get(IDENTITY)
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
        with self._explaining(), self.locked():
            if (recorded := self.identity()) is None:
                if self._trials() or self._study.directions != [StudyDirection.MINIMIZE]:
                    what = f"holds a study called {self._study.study_name!r} that no sweep has begun"
                    raise storage.other_program(what, self.where)
                if record:
                    self._study.set_user_attr(IDENTITY, dict(identity))
                return
        if other := [name for name in identity if recorded.get(name) != identity[name]]:
            what = f"is a study of other settings than these: {', '.join(other)}"
            fix = "choose another output_dir, or move the study away"
            raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(self.directory), fix=fix))

    def enqueue(self, combinations: Sequence[Settings]) -> None:
        """Put combinations that the study does not have into its queue, in their order."""
        with self._explaining(), self.locked():
            known = {label(record.settings) for record in self.records()}
            for settings in combinations:
                if label(settings) not in known:
                    self._study.enqueue_trial({}, user_attrs={_SETTINGS: settings})

    def records(self) -> list[TrialRecord]:
        """The trials in the order of their numbers: of each settings the first, as two machines that begin a study at
        once may both put them into the queue."""
        with self._explaining():
            of_study = [one for one in self._trials() if _SETTINGS in one.user_attrs and one.state != TrialState.FAIL]
            found = [_record(trial) for trial in of_study]
        first = dict[str, TrialRecord]()
        for record in sorted(found, key=lambda one: (one.number, one.optuna_number)):
            first.setdefault(label(record.settings), record)
        return [*first.values()]

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    @contextmanager
    def claim(self, wanted: set[str] | None, axes: Sequence[Axis], most: int | None) -> Iterator[TrialRecord | None]:
        """The next trial, which inside belongs to this process. Without a result it returns to the queue at the end.

        Args:
            wanted: The labels of the settings to try; None where values are drawn.
            axes: What values are drawn for.
            most: How many trials the study may have where values are drawn; None for any number.

        Returns:
            The trial; None if there is nothing left to do for this process.
        """
        with ExitStack() as held:
            with self._explaining(), self.locked():
                record = self._next(wanted, axes, most, held)
            try:
                yield record
            finally:
                if record is not None:
                    with suppress(LoratuneError), self._explaining(), self.locked():
                        self._return(record)

    def _next(
        self, wanted: set[str] | None, axes: Sequence[Axis], most: int | None, held: ExitStack
    ) -> TrialRecord | None:
        self._return_abandoned()
        records = self.records()
        for record in records:
            if record.state == "waiting" and (wanted is None or label(record.settings) in wanted):
                if record.settings.keys() != {axis.key for axis in axes}:  # which would reach the config of a run
                    raise ValueError(_FOREIGN)
                if self._hold(record, held):
                    return record
        for _ in range(_MAX_DUPLICATES if wanted is None else 0):
            if most is not None and len(records) >= most:
                break
            record = self._draw(axes)
            is_known = any(label(one.settings) == label(record.settings) for one in records)
            if not is_known and self._hold(record, held):
                return record
            self._study.tell(record.optuna_number, state=TrialState.FAIL)
        return None

    def _return_abandoned(self) -> None:
        fail_stale_trials(self._study)
        for record in self.records():
            is_here = self._url is None or (record.host, record.place) == (host(), self.place)
            if record.state == "running" and is_here:
                with try_lock(self._lock(record)) as is_free:
                    if is_free:
                        self._return(record)

    def _draw(self, axes: Sequence[Axis]) -> TrialRecord:
        self._study.sampler = optuna.samplers.TPESampler(seed=self._seed + len(self._trials()), constant_liar=True)
        trial = self._study.ask({axis.key: axis.distribution for axis in axes})
        drawn = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in trial.params.items()}
        trial.set_user_attr(_SETTINGS, {axis.key: drawn[axis.key] for axis in axes})
        return _record(self._trials()[trial.number])

    def _hold(self, record: TrialRecord, held: ExitStack) -> bool:
        """Lock the directory of a trial and set the trial to running, unless another process has done so."""
        trial = self._trial_id(record)
        self._last_beat = 0.0
        with ExitStack() as stack, suppress(UpdateFinishedTrialError):
            if not stack.enter_context(try_lock(self._lock(record))):
                return False
            self.show_life(record)  # an old heartbeat would let another machine retry it
            if record.state == "running" or self._storage.set_trial_state_values(trial, TrialState.RUNNING):
                for name, value in ((_FIRST, record.number), (_HOST, host()), (_PLACE, self.place)):
                    self._storage.set_trial_user_attr(trial, name, value)
                held.push(stack.pop_all())
                return True
        return False

    def _trial_id(self, record: TrialRecord) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._id, record.optuna_number))

    def _lock(self, record: TrialRecord) -> Path:
        return self.directory / LOCKS / f"{record.number:04}"

    def _return(self, record: TrialRecord) -> None:
        """Put a trial into the queue again if it has no result."""
        trial = self._trial_id(record)
        if self._storage.get_trial(trial).state == TrialState.RUNNING:
            self._storage.set_trial_state_values(trial, TrialState.WAITING)

    def show_life(self, record: TrialRecord) -> None:
        """Record a heartbeat in the database, at most once a minute."""
        if isinstance(self._storage, RDBStorage) and time.monotonic() - self._last_beat > storage.BEATS_EVERY:
            self._last_beat = time.monotonic()
            with self._explaining():
                self._storage.record_heartbeat(self._trial_id(record))

    def should_prune(self, record: TrialRecord, percent: int, loss: float) -> bool:
        """Whether successive halving stops a trial. percent: how much of its steps were taken."""
        with self._explaining():
            trial = self._trial_id(record)
            self._storage.set_trial_intermediate_value(trial, percent, loss)
            return self._study.pruner.prune(self._study, self._storage.get_trial(trial))

    def finish(self, record: TrialRecord, result: Mapping[str, Any], loss: float | None, outcome: str = "") -> None:
        """Record the result of a trial. loss: None without an adapter; then `outcome` is its state."""
        with self._explaining(), self.locked(), suppress(UpdateFinishedTrialError):  # another machine has retried it
            trial = self._trial_id(record)
            self._storage.set_trial_user_attr(trial, _RESULT, dict(result))
            if outcome:
                self._storage.set_trial_user_attr(trial, _OUTCOME, outcome)
            # pruned counts as bad for later draws
            state = TrialState.COMPLETE if loss is not None else TrialState.PRUNED
            self._study.tell(record.optuna_number, loss, state=state, skip_if_finished=True)


def _record(trial: FrozenTrial) -> TrialRecord:
    """A trial of a storage. Raises ValueError: no sweep has written it."""
    attributes = trial.user_attrs
    try:
        return TrialRecord(
            number=attributes.get(_FIRST, trial.number),
            settings=attributes[_SETTINGS],
            state=_STATES.get(trial.state) or attributes.get(_OUTCOME, "diverged"),
            result=attributes.get(_RESULT, {}),
            host=attributes.get(_HOST, ""),
            place=attributes.get(_PLACE, ""),
            optuna_number=trial.number,
        )
    except ValidationError:
        raise ValueError(_FOREIGN) from None
