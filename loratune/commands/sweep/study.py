"""The study of a sweep in Optuna's storage: its trials, who works on which, and their results.

The storage is a journal in `<output_dir>.study/`, or a database that several machines share. A process claims a trial
by setting it to running, which Optuna does atomically, and holds a lock named after the trial's directory as long as it
works there. So on one machine a running trial whose lock is free was abandoned; on other machines that is known by the
heartbeats in the database. Optuna's retry callback puts an abandoned trial into the queue again, and it continues from
the checkpoint in its directory.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import OperationalError

from loratune.codes import Code
from loratune.commands.sweep.grid import Axis, Settings, label
from loratune.errors import (
    ConfigError,
    LockedError,
    LoratuneError,
    LostError,
    Problem,
    ResourceError,
    ResumeError,
    is_disk_full,
)
from loratune.evaluation import study_results
from loratune.system.files import is_incidental_file, kind, open_lock, path_problem, try_lock
from loratune.system.launcher import host

JOURNAL, LOCKS, TRIALS = "journal.log", "locks", "trials"
_UNFINISHED = f"{JOURNAL}.unfinished"
_KINDS = dict.fromkeys((JOURNAL, f"{JOURNAL}.lock", _UNFINISHED, study_results.FILE), "a file")
_KINDS |= dict.fromkeys((LOCKS, TRIALS), "a directory")
"""What the directory of a study holds."""
_BEGUN, _IDENTITY = "begun_by_sweep", "identity"
"""Attributes of a study: the mark of a journal of ours, and the settings and fingerprints that all trials share."""
_SETTINGS, _FIRST, _HOST, _PLACE, _RESULT, _OUTCOME = "settings", "first", "host", "place", "result", "outcome"
"""Attributes of a trial; `first` is the number under which its directory was made, before it was retried."""
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE = 0, 2
"""Codes of operations in a journal of Optuna's."""
_TABLES = {"studies", "version_info", "alembic_version"}
"""The tables that Optuna makes first, and their versions."""
_BEATS_EVERY, _GRACE = 60, 1800
"""Seconds between heartbeats, and without one after which a trial of another machine counts as abandoned."""
_MAX_DUPLICATES = 50
"""Draws in a row that were all tried before, after which no new one is expected."""
_NO_SQLITE = ("unable to open database file", "file is not a database")
_LOCKED = re.compile(r"(?i)\b(?:dead)?lock(?:ed)?\b")
_PASSWORD = re.compile(r"(?i)((?:password|passwd|pwd|secret|token)=)([^&#\s]+)")
_FOREIGN = "the study holds what no sweep has written"


def study_directory(output: Path) -> Path:
    """The directory of the study of an output directory."""
    return output.with_name(f"{output.name}.study")


def check_kind(path: Path, right: str = "a directory") -> None:
    """Raises ConfigError: a link, or something else, has the name of a directory or file of a study, so that files
    outside it would be written, replaced or removed."""
    if (found := kind(path)) not in ("", right):
        raise _foreign(f"is {found} in place of {right} of the study", path)


def check_place(directory: Path, name: str, url: str | None) -> None:
    """Check that the place of a study holds one, or nothing. Nothing is changed.

    Args:
        directory: The directory of the study.
        name: The name of the study.
        url: The URL of its database; None for the journal.

    Raises:
        ConfigError: Something else is there, a link, or the journal of another study; or the URL is not valid.
        ResumeError: The journal is damaged.
        LockedError, LostError: The database is locked, or cannot be reached.
    """
    if url is not None:
        _check_database(url)
    check_kind(directory)
    names = {path.name for path in directory.iterdir()} if kind(directory) else set()
    if not _KINDS.keys() & names and (others := sorted(one for one in names if not is_incidental_file(one))):
        raise _foreign(f"holds {others[0]}, and no study", directory)
    for own in sorted(_KINDS.keys() & names):
        check_kind(directory / own, _KINDS[own])
    for parent, right in ((LOCKS, "a file"), (TRIALS, "a directory")):
        for path in sorted((directory / parent).iterdir()) if parent in names else ():
            if parent == LOCKS or path.name.isdecimal():
                check_kind(path, right)
    if study_results.FILE in names:
        study_results.StudyResults.read(directory)
    if JOURNAL in names and url is None:
        _check_journal(directory / JOURNAL, name)


def _foreign(what: str, path: Path) -> ConfigError:
    fix = "move it away, or choose another output_dir"
    return ConfigError(Problem(Code.SWEEP_STORAGE, what, str(path), fix=fix))


def _check_journal(path: Path, name: str) -> None:
    """Check each line of a journal but an incomplete last one, which the next line replaces."""
    created, is_begun = "", False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            operation = _operation(line)
            code, attributes = operation.get("op_code"), operation.get("user_attr")
            if number == 1 and code == _CREATE_STUDY:
                created = str(operation.get("study_name", ""))
            if not created:
                break
            if line.endswith(b"\n") and not isinstance(code, int):
                what, fix = "the study is damaged", "restore it, or move the study away, and start again"
                raise ResumeError(Problem(Code.SWEEP_STORAGE, what, f"{path}:{number}", fix=fix))
            if code == _SET_STUDY_ATTRIBUTE and isinstance(attributes, dict):
                is_begun |= not attributes.keys().isdisjoint((_BEGUN, _IDENTITY))
    if not created:
        raise _foreign("is not the journal of a study", path)
    if created != name:
        what = f"is the study of an output_dir called {created!r}, and this one is called {name!r}"
        fix = "name it as it was, or move the study away"
        raise ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, str(path.parent), fix=fix))
    if not is_begun:
        raise _other_program(name, str(path))


def _operation(line: bytes) -> dict[str, Any]:
    """A line of a journal as an operation; empty if it is not one, or incomplete."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _other_program(name: str, where: str) -> ConfigError:
    what = f"holds a study called {name!r} that no sweep has begun"
    fix = "choose another output_dir, after which a study is named, or another database"
    return ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, where, fix=fix))


def _check_database(url: str) -> None:
    """Raises LoratuneError: the URL is not valid, is of a database in memory, or of a file of something else."""
    try:
        engine = create_engine(url)
    except Exception as error:  # of sqlalchemy, or of a missing or broken client of the database
        raise _no_database(f"is not the URL of a database that can be opened here: {_first_line(error)}", url) from None
    if engine.name != "sqlite":
        return
    path = engine.url.database or ""
    if not path.strip("/") or path == ":memory:":
        raise _no_database("is a database in memory, so the study would be lost when the command ends", url)
    if path.startswith("file:") or "uri" in engine.url.query:
        raise _no_database("is a URI of SQLite; write a path, which shows which file it is", url)
    if problem := path_problem(path):
        raise _no_database(problem, url)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise _no_database("is in a directory that does not exist", url)
    try:
        found = {*inspect(engine).get_table_names()} if os.path.exists(path) else set()
    except Exception as error:
        raise _explained(error, without_password(url, url), url) from error
    if found and not _TABLES & found:
        raise _no_database("is a database of something else", url)


def _no_database(what: str, url: str) -> ConfigError:
    fix = "write sqlite:///study.db for a file, and install the client of any other database"
    where, what = without_password(url, url), without_password(what, url)
    return ConfigError(Problem(Code.SWEEP_STORAGE, what, where, "--storage", fix))


def _explained(error: Exception, where: str, url: str | None) -> LoratuneError:
    """The error of a storage that cannot be read or written.

    Args:
        error: What the file system, Optuna, SQLAlchemy or the client of a database has raised.
        where: The journal, or the URL without passwords.
        url: The URL of the database; None for the journal.
    """
    if is_disk_full(error):
        return ResourceError(Problem(Code.SYSTEM_DISK_FULL, "no room for the study", where, fix="make room"))
    if any(words in str(error) for words in _NO_SQLITE):
        return _no_database(f"cannot be opened: {_first_line(error)}", str(url))
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    of_database = next((str(one.orig) for one in causes if isinstance(one, OperationalError)), "")
    if _LOCKED.search(of_database):
        what, fix = "another program has locked the database of the study", "wait until it ends, then rerun the command"
        return LockedError(Problem(Code.SYSTEM_LOCKED, what, where, "--storage", fix))
    reason = without_password(_first_line(error), url) or type(error).__name__
    what, fix = f"the study cannot be read or written: {reason}", "repair it, then rerun the same command to resume"
    is_unreachable = of_database and not str(url).startswith("sqlite")
    return (LostError if is_unreachable else ResumeError)(Problem(Code.SWEEP_STORAGE, what, where, fix=fix))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def without_password(text: str, url: str | None) -> str:
    """A text that may mention the URL of a database, with `***` in place of the passwords in that URL."""
    if url is None:
        return text
    credentials = url.partition("://")[2].rpartition("@")[0] if "://" in url else url.rpartition("@")[0]
    parts = credentials.partition(":")[2], credentials.rpartition(":")[2]
    for secret in filter(None, (credentials, *parts, *(match[2] for match in _PASSWORD.finditer(url)))):
        text = text.replace(secret, "***")
    return _PASSWORD.sub(r"\g<1>***", text)


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock on a journal. It also removes an incomplete last line, which a full disk or a power cut leaves: the
    next line would be appended to it, and neither could be read."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self._journal = path

    def acquire(self) -> bool:
        """Wait for the lock."""
        super().acquire()
        try:
            with self._journal.open("rb+") as file:
                if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return True


def _open_journal(directory: Path, name: str) -> JournalStorage:
    """The journal of a study. A new one appears with the mark that shows whose it is, or not at all."""
    path, unfinished = directory / JOURNAL, directory / _UNFINISHED
    if not path.exists():
        unfinished.unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(unfinished), lock_obj=_JournalLock(unfinished)))
        optuna.create_study(study_name=name, storage=storage).set_user_attr(_BEGUN, True)
        unfinished.rename(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))


def _open_database(url: str) -> RDBStorage:
    """The database; its tables may be missing at first because another process is making them at this moment."""
    arguments: dict[str, Any] = {"heartbeat_interval": _BEATS_EVERY, "grace_period": _GRACE}
    arguments["heartbeat_stale_trial_callback"] = _enqueue_again
    try:
        return RDBStorage(url, **arguments)
    except Exception:  # of whatever client the database has
        time.sleep(1)
        return RDBStorage(url, **arguments)


def _enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put a trial that failed without a result into the queue again, under the number of its directory."""
    trial.set_user_attr(_FIRST, trial.user_attrs.get(_FIRST, trial.number))
    RetryHeartbeatStaleTrialCallback()(study, trial)


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the storage has it.

    Attributes:
        number: The number of its directory, and in the table.
        settings: What it tries.
        state: `waiting`, `running`, `done`, or why there is no adapter, see `TrialResult.state`.
        result: What else is known of it.
        host: The machine that worked on it.
        place: The directory of the study on that machine.
        optuna_number: Its number in Optuna's storage, which is another one after a retry.
    """

    number: int
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
            LoratuneError: See `check_place`; or the storage cannot be opened.
        """
        check_place(directory, name, url)
        self.directory, self.name, self._url, self._seed = directory, name, url, seed
        self.where = str(directory / JOURNAL) if url is None else without_password(url, url)
        self.place = str(directory.resolve())
        self._last_beat = 0.0
        pruner = optuna.pruners.SuccessiveHalvingPruner() if halving else optuna.pruners.NopPruner()
        with self._explaining():
            (directory / LOCKS).mkdir(parents=True, exist_ok=True)
            with self.locked():
                self._storage = _open_journal(directory, name) if url is None else _open_database(url)
                is_new = name not in optuna.get_all_study_names(self._storage)
                opened = optuna.create_study if is_new else optuna.load_study
                self._study = opened(study_name=name, storage=self._storage, pruner=pruner)
                self._id = self._storage.get_study_id_from_name(name)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raises LoratuneError: something is wrong with the storage, see `_explained`."""
        try:
            yield
        except LoratuneError:
            raise
        except Exception as error:  # of the file system, Optuna, SQLAlchemy, or a database's own client
            raise _explained(error, self.where, self._url) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process on this machine claims a trial, publishes, or removes adapters."""
        with open_lock(self.directory / LOCKS / "study", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check(self, identity: Mapping[str, Any], *, record: bool) -> None:
        """Compare the identity of the study with the recorded one.

        Args:
            identity: The settings and fingerprints that its trials share, or a part of them.
            record: Whether to record it if there is none yet.

        Raises:
            ConfigError: It is the study of something else.
        """
        with self._explaining(), self.locked():
            recorded = self._study.user_attrs.get(_IDENTITY)
            if recorded is None:
                if self._trials() or self._study.directions != [StudyDirection.MINIMIZE]:
                    raise _other_program(self.name, self.where)
                if record:
                    self._study.set_user_attr(_IDENTITY, dict(identity))
                return
            if not isinstance(recorded, dict):
                raise TypeError(_FOREIGN)
        if other := [name for name in identity if recorded.get(name) != identity[name]]:
            what = f"is a study of other settings than these: {', '.join(other)}"
            fix = "choose another output_dir, or move the study away"
            raise ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, str(self.directory), fix=fix))

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
            found = [_record(trial) for trial in self._trials() if _is_of_study(trial)]
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

    def _draw(self, axes: Sequence[Axis]) -> TrialRecord:
        self._study.sampler = optuna.samplers.TPESampler(seed=self._seed + len(self._trials()), constant_liar=True)
        trial = self._study.ask()
        trial.set_user_attr(_SETTINGS, {axis.key: _drawn(trial, axis) for axis in axes})
        return _record(self._trials()[trial.number])

    def _hold(self, record: TrialRecord, held: ExitStack) -> bool:
        """Lock the directory of a trial and set the trial to running, unless another process has done so."""
        trial = self._trial_id(record)
        with ExitStack() as stack, suppress(UpdateFinishedTrialError):
            is_free = stack.enter_context(try_lock(self._lock(record)))
            if is_free and (
                record.state == "running" or self._storage.set_trial_state_values(trial, TrialState.RUNNING)
            ):
                for name, value in ((_FIRST, record.number), (_HOST, host()), (_PLACE, self.place)):
                    self._storage.set_trial_user_attr(trial, name, value)
                self._last_beat = 0.0
                self.show_life(record)
                held.push(stack.pop_all())
                return True
        return False

    def _trial_id(self, record: TrialRecord) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, record.optuna_number)

    def _lock(self, record: TrialRecord) -> Path:
        return self.directory / LOCKS / f"{record.number:04}"

    def _return_abandoned(self) -> None:
        fail_stale_trials(self._study)
        for record in self.records():
            is_here = self._url is None or (record.host, record.place) == (host(), self.place)
            if record.state == "running" and is_here:
                with try_lock(self._lock(record)) as is_free:
                    if is_free:
                        self._return(record)

    def _return(self, record: TrialRecord) -> None:
        """Put a trial into the queue again if it has no result."""
        trial = self._study.get_trials()[record.optuna_number]
        if trial.state == TrialState.RUNNING:
            self._study.tell(record.optuna_number, state=TrialState.FAIL)
            _enqueue_again(self._study, trial)

    def show_life(self, record: TrialRecord) -> None:
        """Record a heartbeat in the database, at most once a minute."""
        if isinstance(self._storage, RDBStorage) and time.monotonic() - self._last_beat > _BEATS_EVERY:
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
            state = (
                TrialState.COMPLETE if loss is not None else TrialState.PRUNED
            )  # which counts as bad for later draws
            self._study.tell(record.optuna_number, loss, state=state, skip_if_finished=True)


def _is_of_study(trial: FrozenTrial) -> bool:
    return _SETTINGS in trial.user_attrs and trial.state != TrialState.FAIL


def _record(trial: FrozenTrial) -> TrialRecord:
    """A trial of a storage. Raises ValueError: no sweep has written it."""
    attributes = trial.user_attrs
    states = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: study_results.DONE}
    state = states.get(trial.state) or attributes.get(_OUTCOME, "diverged")
    number, result = attributes.get(_FIRST, trial.number), attributes.get(_RESULT, {})
    owner, place, settings = attributes.get(_HOST, ""), attributes.get(_PLACE, ""), attributes[_SETTINGS]
    are_settings = isinstance(settings, dict) and all(isinstance(one, str) for pair in settings.items() for one in pair)
    are_texts = all(isinstance(text, str) for text in (state, owner, place))
    is_number = type(number) is int and 0 <= number <= trial.number
    if not (are_settings and are_texts and is_number and isinstance(result, dict)):
        raise ValueError(_FOREIGN)
    return TrialRecord(number, settings, state, result, owner, place, trial.number)


def _drawn(trial: Trial, axis: Axis) -> str:
    if not axis.is_range:
        return str(trial.suggest_categorical(axis.key, axis.values))
    low, high = axis.bounds
    if axis.is_whole:
        return str(trial.suggest_int(axis.key, int(low), int(high), log=axis.is_logarithmic))
    return f"{trial.suggest_float(axis.key, low, high, log=axis.is_logarithmic):.4g}"
