"""Where a study is kept: in a directory beside `output_dir`, and there in Optuna's journal, or in a database.

Nothing is written before everything that has a name of the study is known to be a study's.
"""

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import OperationalError

from loratune.codes import Code
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
from loratune.report.study import FILE, StudyResults
from loratune.system.files import is_incidental_file, kind, path_problem

_log = logging.getLogger(__name__)

JOURNAL, LOCKS, TRIALS = "journal.log", "locks", "trials"
_UNFINISHED = f"{JOURNAL}.unfinished"
_KINDS = dict.fromkeys((JOURNAL, f"{JOURNAL}.lock", _UNFINISHED, FILE), "a file")
_KINDS |= dict.fromkeys((LOCKS, TRIALS), "a directory")
"""What the directory of a study holds."""
_BEGUN, IDENTITY, FIRST = "begun_by_sweep", "identity", "first"
"""Attributes of a study: the mark of a journal of ours, and the settings and fingerprints that all trials share; and of
a trial: the number under which its directory was made, before it was retried."""
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE = 0, 2
"""Codes of operations in a journal of Optuna's."""
_TABLES = {"studies", "version_info", "alembic_version"}
"""The tables that Optuna makes first, and their versions."""
BEATS_EVERY, _GRACE = 60, 1800
"""Seconds between heartbeats, and without one after which a trial of another machine counts as abandoned."""
_NO_SQLITE = ("unable to open database file", "file is not a database")
_LOCKED = re.compile(r"(?i)\b(?:dead)?lock(?:ed)?\b")
_PASSWORD = re.compile(r"(?i)((?:password|passwd|pwd|secret|token)=)([^&#\s]+)")


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
    if FILE in names:
        StudyResults.read(directory)
    if JOURNAL in names and url is None:
        _check_journal(directory / JOURNAL, name)


def _foreign(what: str, path: Path) -> ConfigError:
    fix = "move it away, or choose another output_dir"
    return ConfigError(Problem(Code.SWEEP_STUDY, what, str(path), fix=fix))


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
                raise ResumeError(Problem(Code.SWEEP_STUDY, what, f"{path}:{number}", fix=fix))
            if code == _SET_STUDY_ATTRIBUTE and isinstance(attributes, dict):
                is_begun |= not attributes.keys().isdisjoint((_BEGUN, IDENTITY))
    if not created:
        raise _foreign("is not the journal of a study", path)
    if created != name:
        what = f"is the study of an output_dir called {created!r}, and this one is called {name!r}"
        fix = "name it as it was, or move the study away"
        raise ConfigError(Problem(Code.SWEEP_STUDY, what, str(path.parent), fix=fix))
    if not is_begun:
        raise other_program(name, str(path))


def _operation(line: bytes) -> dict[str, Any]:
    """A line of a journal as an operation; empty if it is not one, or incomplete."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def other_program(name: str, where: str) -> ConfigError:
    """The error of a study that another program has made."""
    what = f"holds a study called {name!r} that no sweep has begun"
    fix = "choose another output_dir, after which a study is named, or another database"
    return ConfigError(Problem(Code.SWEEP_STUDY, what, where, fix=fix))


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
        raise explained(error, without_password(url, url), url) from error
    if found and not _TABLES & found:
        raise _no_database("is a database of something else", url)


def _no_database(what: str, url: str) -> ConfigError:
    fix = "write sqlite:///study.db for a file, and install the client of any other database"
    where, what = without_password(url, url), without_password(what, url)
    return ConfigError(Problem(Code.SWEEP_STUDY, what, where, "--storage", fix))


def explained(error: Exception, where: str, url: str | None) -> LoratuneError:
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
    return (LostError if is_unreachable else ResumeError)(Problem(Code.SWEEP_STUDY, what, where, fix=fix))


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


def open_journal(directory: Path, name: str) -> JournalStorage:
    """The journal of a study. A new one appears with the mark that shows whose it is, or not at all."""
    path, unfinished = directory / JOURNAL, directory / _UNFINISHED
    if not path.exists():
        unfinished.unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(unfinished), lock_obj=_JournalLock(unfinished)))
        optuna.create_study(study_name=name, storage=storage).set_user_attr(_BEGUN, True)
        unfinished.rename(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))


def open_database(url: str) -> RDBStorage:
    """The database; its tables may be missing at first because another process is making them at this moment."""
    arguments: dict[str, Any] = {"heartbeat_interval": BEATS_EVERY, "grace_period": _GRACE}
    arguments["heartbeat_stale_trial_callback"] = enqueue_again
    try:
        return RDBStorage(url, **arguments)
    except Exception:  # of whatever client the database has
        _log.debug("the database is opened again", exc_info=True)
        time.sleep(1)
        return RDBStorage(url, **arguments)


def enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put a trial that failed without a result into the queue again, under the number of its directory."""
    trial.set_user_attr(FIRST, trial.user_attrs.get(FIRST, trial.number))
    RetryHeartbeatStaleTrialCallback()(study, trial)
