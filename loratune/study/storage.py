"""The storage of a study: Optuna's journal in the directory next to `output_dir`, or a database.

Nothing is written until every existing file with a name of the study is known to belong to a study.
"""

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import OperationalError

from loratune import config
from loratune.codes import Code
from loratune.config import RunConfig
from loratune.errors import ConfigError, LockedError, LoratuneError, Problem, ResourceError, ResumeError, is_disk_full
from loratune.system.files import is_incidental_file, kind
from loratune.training.checkpoints import run_dir
from loratune.training.checkpoints.run_dir import RunDirectory

_log = logging.getLogger(__name__)

JOURNAL, LOCKS, TRIALS, RESULTS = "journal.log", "locks", "trials", "results.json"
_KINDS = dict.fromkeys((JOURNAL, f"{JOURNAL}.lock", RESULTS), "a file") | dict.fromkeys((LOCKS, TRIALS), "a directory")
"""What the directory of a study holds."""
IDENTITY = "identity"
"""An attribute of a study: the settings and fingerprints that all trials share."""
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE, _CREATE_TRIAL = 0, 2, 4
"""Codes of operations in a journal of Optuna's."""
_TABLES = {"studies", "version_info", "alembic_version"}
"""Tables of every database of Optuna's; other programs have some of these names too."""
_OTHER_TABLES = ("study_", "trial")
"""How the names of Optuna's other tables begin."""
BEATS_EVERY, _GRACE = 60, 1800
"""Seconds between heartbeats, and without one after which a trial of another machine is retried."""
_LOCKED = re.compile(r"(?i)\b(?:dead)?lock(?:ed)?\b")


def study_directory(output: Path) -> Path:
    """The directory of the study of an output directory."""
    return output.with_name(f"{output.name}.study")


def check_output(run: RunConfig, config_file: Path | None, url: str | None, *, overwrite: bool) -> RunDirectory:
    """The directory of the best adapter, after a check that nothing prevents writing it and its study.

    Args:
        run: The config.
        config_file: Its file, if it has one.
        url: The URL of the database of the study; None for the journal.
        overwrite: Whether an adapter at `output_dir` may be replaced.

    Raises:
        LoratuneError: See `run_dir.check` and `check_place`.
    """
    directory = run_dir.check(run.output_dir, overwrite=overwrite, inputs=config.input_paths(config_file, run))
    check_place(study_directory(directory.output), directory.output.name, url)
    return directory


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
        LockedError: The database is locked.
    """
    if url is not None:
        _check_database(url)
    check_kind(directory)
    names = {path.name for path in directory.iterdir()} if kind(directory) else set()
    if not _KINDS.keys() & names and (others := sorted(one for one in names if not is_incidental_file(one))):
        raise _foreign(f"holds {others[0]}, and no study", directory)
    for own, right in _KINDS.items():
        check_kind(directory / own, right)
    for path in (directory / LOCKS).glob("*"):
        check_kind(path, "a file")
    for path in (directory / TRIALS).glob("[0-9]*"):
        check_kind(path)
    if JOURNAL in names and url is None:
        _check_journal(directory / JOURNAL, name)


def _foreign(what: str, path: Path) -> ConfigError:
    fix = "move it away, or choose another output_dir"
    return ConfigError(Problem(Code.SWEEP_STUDY, what, str(path), fix=fix))


def _check_journal(path: Path, name: str) -> None:
    """Check each line of a journal but an incomplete last one, which the next line replaces."""
    with path.open("rb") as file:
        operations = [_operation(line) for line in file if line.endswith(b"\n")]
    first = operations[0] if operations else {}
    if first.get("op_code") != _CREATE_STUDY or not first.get("study_name"):
        raise _foreign("is not the journal of a study", path)
    for number, operation in enumerate(operations, 1):
        if not isinstance(operation.get("op_code"), int):
            what, fix = "the study is damaged", "restore it, or move the study away, and start again"
            raise ResumeError(Problem(Code.SWEEP_STUDY, what, f"{path}:{number}", fix=fix))
    attributes = [one.get("user_attr") for one in operations if one["op_code"] == _SET_STUDY_ATTRIBUTE]
    is_ours = any(isinstance(one, dict) and IDENTITY in one for one in attributes)
    if first["study_name"] != name or not (is_ours or all(one["op_code"] != _CREATE_TRIAL for one in operations)):
        raise other_program(
            f"holds a study called {first['study_name']!r}, not one of a sweep into {name!r}", str(path)
        )


def _operation(line: bytes) -> dict[str, Any]:
    """A line of a journal as an operation; empty if it is not one."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def other_program(what: str, where: str) -> ConfigError:
    """The error of a study that is not one of this sweep."""
    fix = "move it away, or choose another output_dir, after which a study is named, or another database"
    return ConfigError(Problem(Code.SWEEP_STUDY, what, where, fix=fix))


def _check_database(url: str) -> None:
    """Raises LoratuneError: the URL is not valid, is of a database in memory, or of a file of something else."""
    try:
        engine = create_engine(url)
    except Exception as error:  # of sqlalchemy, or of a missing or broken client of the database
        what = f"is not the URL of a database that can be opened here ({type(error).__name__})"
        raise _no_database(what, url) from None
    if engine.name != "sqlite":
        return
    path = engine.url.database or ""
    is_odd = path == ":memory:" or path.startswith("file:") or "uri" in engine.url.query or "\0" in path
    if is_odd or not path.strip("/") or not os.path.isdir(os.path.dirname(path) or "."):
        raise _no_database("is not the path of a file in an existing directory; a study in memory would be lost", url)
    try:
        found = {*inspect(engine).get_table_names()} if os.path.exists(path) else set()
    except Exception as error:
        raise explained(error, shown(url), url) from error
    is_being_made = "studies" in found and all(name in _TABLES or name.startswith(_OTHER_TABLES) for name in found)
    if found and not (found >= _TABLES or is_being_made):  # another process may have begun to make them
        raise _no_database("is a database of something else", url)


def _no_database(what: str, url: str) -> ConfigError:
    fix = "write sqlite:///study.db for a file, and install the client of any other database"
    return ConfigError(Problem(Code.SWEEP_STUDY, what, shown(url), "--storage", fix))


def explained(error: Exception, where: str, url: str | None) -> LoratuneError:
    """The error of a storage that cannot be read or written.

    Args:
        error: What the file system, Optuna, SQLAlchemy or the client of a database has raised.
        where: The journal, or the URL without passwords.
        url: The URL of the database; None for the journal.
    """
    if is_disk_full(error):
        return ResourceError(Problem(Code.SYSTEM_DISK_FULL, "no room for the study", where, fix="make room"))
    if "file is not a database" in str(error):
        return _no_database("is a file of something else", str(url))
    cause = error if isinstance(error, OperationalError) else error.__cause__
    of_database = str(cause.orig) if isinstance(cause, OperationalError) else ""
    if _LOCKED.search(of_database):
        what, fix = "another program has locked the database of the study", "wait until it ends, then rerun the command"
        return LockedError(Problem(Code.SYSTEM_LOCKED, what, where, "--storage", fix))
    reason = _without_secrets(next(iter(str(error).splitlines()), ""), url) or type(error).__name__
    what, fix = f"the study cannot be read or written: {reason}", "repair it, then rerun the same command to resume"
    return ResumeError(Problem(Code.SWEEP_STUDY, what, where, fix=fix))


def shown(url: str) -> str:
    """The URL of a database without its login and options; empty if it is not a URL."""
    scheme, separator, rest = url.partition("://")
    place = rest if scheme.startswith("sqlite") else rest.rpartition("@")[2]
    return f"{scheme}://{place.partition('?')[0]}" if separator else ""


def _without_secrets(text: str, url: str | None) -> str:
    if url is None:
        return text
    parsed = make_url(url)
    for secret in filter(None, (parsed.password, *parsed.query.values())):
        text = text.replace(str(secret), "***")
    return text


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


def open_journal(path: Path) -> JournalStorage:
    """A journal, which is created if it does not exist."""
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))


def open_database(url: str) -> RDBStorage:
    """A database; its tables may be missing at first because another process is making them at this moment."""
    arguments: dict[str, Any] = {"heartbeat_interval": BEATS_EVERY, "grace_period": _GRACE}
    arguments["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
    try:
        return RDBStorage(url, **arguments)
    except Exception:  # of whatever client the database has
        _log.debug("the database is opened again", exc_info=True)
        time.sleep(1)
        return RDBStorage(url, **arguments)
