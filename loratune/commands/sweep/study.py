"""The study of a sweep: which trials there are, who works on which, and what they came to. Optuna stores it.

Several processes share one study. On one machine, a lock on a file beside the study is held while a process chooses its
next trial, and another one while it works on it; the kernel releases both when the process ends, in whatever way, so
that a trial whose lock is free has been abandoned. Other machines, which see the storage alone, tell that from the time
at which the process last showed that it lives.

A trial that was abandoned or interrupted is put into the queue again, and goes on from its checkpoint in its directory.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from loratune.codes import Code
from loratune.commands.sweep.grid import Axis, Settings, label
from loratune.commands.sweep.storage import (
    IDENTITY,
    JOURNAL,
    LOCKS,
    check_place,
    explained,
    open_study,
    other_study,
    without_password,
)
from loratune.errors import ConfigError, LoratuneError, Problem
from loratune.system.files import open_lock
from loratune.system.launcher import host

SETTINGS, RESULT, OUTCOME = "settings", "result", "outcome"
_FIRST, _HOST, _PLACE, _ALIVE = "first", "host", "place", "alive"
"""Names under which the storage keeps what belongs to a study and to a trial."""
_SHOWS_EVERY, _SILENT = 60.0, 1800.0
"""Seconds between signs of life, and without one after which another machine's process counts as gone."""
_FOREIGN = "it holds what no sweep has written"
_MOST_DUPLICATES = 50
"""Draws in a row that were all tried before, after which nothing new is to be expected."""

optuna.logging.set_verbosity(optuna.logging.CRITICAL)


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the storage has it.

    Attributes:
        number: Of its directory and of the table.
        settings: What it tries.
        state: `waiting`, `running`, `done`, or why there is no adapter: `diverged`, `worse than base`,
            `learned nothing`, `out of memory`, `stopped early`, `invalid`, `failed`.
        loss: The held-out loss; None without an adapter.
        result: What else is known of it.
        host: The machine that worked on it.
        place: The directory there in which the study was.
    """

    number: int
    settings: Settings
    state: str
    loss: float | None
    result: dict[str, Any]
    host: str
    place: str


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on.

    Attributes:
        trial: Optuna's.
        number: See `TrialRecord`.
        settings: What it tries.
    """

    trial: Trial
    number: int
    settings: Settings


class Study:
    """A study in a storage, as one process sees it."""

    def __init__(self, directory: Path, name: str, storage: str | None, *, halving: bool, seed: int):
        """Open a study, or begin one.

        Args:
            directory: Where its trials work, on this machine.
            name: Of the study in the storage.
            storage: The URL of a database; None for a file in `directory`.
            halving: Whether trials may be stopped early, by successive halving.
            seed: Of what is drawn from ranges.

        Raises:
            ConfigError: The storage is in memory; what is in the place of the study is none, or one of another name.
            LoratuneError: The storage cannot be opened, see `storage.explained`.
        """
        check_place(directory, name, storage)
        self.directory, self.name, self._seed, self._url = directory, name, seed, storage
        self.is_shared_by_machines = storage is not None and not storage.startswith("sqlite")
        self.where = str(directory / JOURNAL) if storage is None else without_password(storage, storage)
        self._locks: dict[int, ExitStack] = {}
        self._shown = time.monotonic()
        pruner = optuna.pruners.SuccessiveHalvingPruner() if halving else optuna.pruners.NopPruner()
        with self._storage():
            (directory / LOCKS).mkdir(parents=True, exist_ok=True)
            with self.choosing():
                self._study = open_study(directory, name, storage, pruner)

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Raises LoratuneError: something is wrong with the storage, see `storage.explained`."""
        try:
            yield
        except (LoratuneError, KeyboardInterrupt, optuna.TrialPruned):
            raise
        except Exception as error:  # of the file system, of optuna, of sqlalchemy, of a database's own client
            raise explained(error, self.where, self._url) from error

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Inside, no other process on this machine chooses a trial, publishes, or removes adapters."""
        with open_lock(self.directory / LOCKS / "choosing", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check(self, identity: Mapping[str, Any], *, record: bool) -> None:
        """Compare what the study is of with what is recorded.

        Args:
            identity: Of the study, or a part of that.
            record: Whether to record it, if nothing is recorded yet.

        Raises:
            ConfigError: It is of something else.
        """
        with self._storage(), self.choosing():
            recorded = self._study.user_attrs.get(IDENTITY)
            if recorded is None and (self._trials() or self._study.directions != [StudyDirection.MINIMIZE]):
                raise other_study(self.name, self.where)
            if recorded is None and not record:
                return
            if recorded is None:
                self._study.set_user_attr(IDENTITY, dict(identity))
                return
            if not isinstance(recorded, dict):
                raise TypeError(_FOREIGN)
        if other := [name for name in identity if recorded.get(name) != identity[name]]:
            fix = "choose another output_dir, or move the study away"
            what = f"is a study of other settings than these: {', '.join(other)}"
            raise ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, str(self.directory), fix=fix))

    def enqueue(self, combinations: Sequence[Settings]) -> None:
        """Put combinations that the study does not have into its queue, in their order."""
        with self._storage(), self.choosing():
            known = {label(record.settings) for record in self.records()}
            for settings in combinations:
                if label(settings) not in known:
                    self._study.enqueue_trial({}, user_attrs={SETTINGS: settings})

    def records(self) -> list[TrialRecord]:
        """The trials, but for those that were put into the queue again, in the order of their numbers."""
        with self._storage():
            found = [_record(trial) for trial in self._trials() if _is_of_study(trial)]
        return sorted(found, key=lambda record: record.number)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def claim(self, wanted: set[str] | None, axes: Sequence[Axis], most: int | None) -> Claim | None:
        """The next trial to work on.

        Args:
            wanted: The labels of those to be tried; None where values are drawn.
            axes: What values are drawn for.
            most: Trials of the whole study, at most; None for any number.

        Returns:
            The trial; None if there is nothing left to do for this process.
        """
        with self._storage(), self.choosing():
            self._give_back_abandoned()
            others = list[Claim]()  # what other commands wait for stays in the queue
            try:
                for _ in range(_MOST_DUPLICATES if wanted is None else len(self._trials())):
                    waiting = any(trial.state == TrialState.WAITING for trial in self._trials())
                    if not waiting and (wanted is not None or (most is not None and len(self.records()) >= most)):
                        return None
                    claim = self._ask(axes)
                    if self._is_tried(claim):
                        continue
                    if wanted is None or label(claim.settings) in wanted:
                        self._hold(claim)
                        return claim
                    others.append(claim)
            finally:
                for other in others:
                    self._give_back(other.trial.number, other.trial.user_attrs)
        return None

    def _ask(self, axes: Sequence[Axis]) -> Claim:
        """The next trial of the queue, or one that is drawn."""
        self._study.sampler = TPESampler(seed=self._seed + len(self._trials()), constant_liar=True)
        trial = self._study.ask()
        settings = trial.user_attrs.get(SETTINGS)
        if settings is None:
            settings = {axis.key: _drawn(trial, axis) for axis in axes}
            trial.set_user_attr(SETTINGS, settings)
        elif _settings(settings).keys() != {axis.key for axis in axes}:  # they would reach the config of a run
            raise ValueError(_FOREIGN)
        number = trial.user_attrs.get(_FIRST, trial.number)
        trial.set_user_attr(_HOST, host())
        trial.set_user_attr(_PLACE, self.place)
        trial.set_user_attr(_ALIVE, time.time())
        return Claim(trial, number, settings)

    def _is_tried(self, claim: Claim) -> bool:
        """Whether an earlier trial has the same settings, as where two machines began a study; this one is dropped."""
        same = [one for one in self._trials() if one.number < claim.trial.number and _is_of_study(one)]
        if any(one.user_attrs.get(SETTINGS) == claim.settings for one in same):
            self._drop(claim.trial.number)
            return True
        return False

    def _drop(self, number: int) -> None:
        """Take a trial out of the study."""
        self._study.tell(number, state=TrialState.FAIL)

    def _hold(self, claim: Claim) -> None:
        stack = ExitStack()
        file = stack.enter_context(open_lock(self._lock(claim.number), os.O_RDWR | os.O_CREAT))
        fcntl.flock(file, fcntl.LOCK_EX)
        self._locks[claim.number] = stack

    @property
    def place(self) -> str:
        """The directory of the study, by which other commands on this machine find the locks on its trials."""
        return str(self.directory.resolve())

    def _lock(self, number: int, place: str = "") -> Path:
        return Path(place or self.directory) / LOCKS / f"{number:04}"

    def _give_back_abandoned(self) -> None:
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and self._is_abandoned(trial):
                self._give_back(trial.number, trial.user_attrs)

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        number = trial.user_attrs.get(_FIRST, trial.number)
        if number in self._locks:
            return False
        owner = trial.user_attrs.get(_HOST)
        if owner not in (None, host()):
            return bool(time.time() - trial.user_attrs.get(_ALIVE, 0) > _SILENT)
        if owner is None and self.is_shared_by_machines:
            return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() > _SILENT
        place = str(trial.user_attrs.get(_PLACE, ""))
        with suppress(FileNotFoundError), open_lock(self._lock(number, place), os.O_RDONLY) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _give_back(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Put a trial into the queue again."""
        if SETTINGS in attributes:
            kept = {SETTINGS: attributes[SETTINGS], _FIRST: attributes.get(_FIRST, number)}
            self._study.enqueue_trial({}, user_attrs=kept)
        self._drop(number)

    def give_back(self, claim: Claim) -> None:
        """Put a trial that this process could not end into the queue again."""
        with self._storage(), self.choosing():
            if self._trials()[claim.trial.number].state == TrialState.RUNNING:  # a signal may come once it has ended
                self._give_back(claim.trial.number, claim.trial.user_attrs)
            self._release(claim)

    def show_life(self, claim: Claim) -> None:
        """Let other machines know that a trial is being worked on."""
        if self.is_shared_by_machines and time.monotonic() - self._shown > _SHOWS_EVERY:
            self._shown = time.monotonic()
            with self._storage():
                claim.trial.set_user_attr(_ALIVE, time.time())

    def is_hopeless(self, claim: Claim, percent: int, loss: float) -> bool:
        """Whether successive halving stops a trial. percent: of its steps that were taken."""
        with self._storage():
            claim.trial.report(loss, percent)
            return claim.trial.should_prune()

    def finish(self, claim: Claim, result: Mapping[str, Any], loss: float | None, outcome: str = "") -> None:
        """Record what a trial came to. loss: None without an adapter; then `outcome` says why."""
        with self._storage(), self.choosing():
            claim.trial.set_user_attr(RESULT, dict(result))
            if outcome:
                claim.trial.set_user_attr(OUTCOME, outcome)
            if loss is None:  # as pruned, it counts as bad where further ones are drawn
                self._study.tell(claim.trial, state=TrialState.PRUNED)
            else:
                self._study.tell(claim.trial, loss)
            self._release(claim)

    def _release(self, claim: Claim) -> None:
        self._locks.pop(claim.number, ExitStack()).close()


def _is_of_study(trial: FrozenTrial) -> bool:
    return SETTINGS in trial.user_attrs and trial.state != TrialState.FAIL


def _settings(found: object) -> Settings:
    """Settings as a storage has them. Raises ValueError: they are none."""
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(_FOREIGN)
    return found


def _record(trial: FrozenTrial) -> TrialRecord:
    """What a storage has of a trial. Raises ValueError: no sweep has written that."""
    attributes = trial.user_attrs
    states = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "done"}
    state = states.get(trial.state) or attributes.get(OUTCOME, "diverged")
    loss = trial.value if trial.state == TrialState.COMPLETE else None
    number, result = attributes.get(_FIRST, trial.number), attributes.get(RESULT, {})
    owner, place = attributes.get(_HOST, ""), attributes.get(_PLACE, "")
    settings = _settings(attributes[SETTINGS])
    are_texts = all(isinstance(text, str) for text in (state, owner, place))
    if not (are_texts and type(number) is int and 0 <= number <= trial.number and isinstance(result, dict)):
        raise ValueError(_FOREIGN)
    return TrialRecord(number, settings, state, loss, result, owner, place)


def _drawn(trial: Trial, axis: Axis) -> str:
    if not axis.is_range:
        return str(trial.suggest_categorical(axis.key, axis.values))
    low, high = axis.bounds
    if axis.is_whole:
        return str(trial.suggest_int(axis.key, int(low), int(high), log=axis.is_logarithmic))
    return f"{trial.suggest_float(axis.key, low, high, log=axis.is_logarithmic):.4g}"
