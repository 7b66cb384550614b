"""Where a study is kept: in a directory beside `output_dir`, and there in a journal of optuna's, or in a database.

Nothing is written before all that has a name of the study is known to be a study's.
"""

import fcntl
import json
import os
import re
import time
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

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
from loratune.evaluation import study_results
from loratune.system.files import is_incidental_file, kind, open_lock, path_problem

JOURNAL, LOCKS, TRIALS = "journal.log", "locks", "trials"
_KINDS = {JOURNAL: "a file", study_results.FILE: "a file", LOCKS: "a directory", TRIALS: "a directory"}
"""What a study has in its directory."""
_UNFINISHED = f"{JOURNAL}.unfinished"
_INSIDE = (
    (LOCKS, re.compile(rf"\d{{4,}}|choosing|journal|{re.escape(_UNFINISHED)}"), "a file"),
    (TRIALS, re.compile(r"\d{4,}"), "a directory"),
)
"""What it has in its directories, by name."""
IDENTITY, _BEGUN = "identity", "begun_by_sweep"
"""The name under which a study has what it is of, and the one that a journal has from its beginning."""
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE = 0, 2
"""Codes of operations in a journal of optuna's."""
_LONGEST = 1 << 16
"""Bytes of the longest first line of a journal, which has the name of the study."""
_TABLES = {"studies", "version_info", "alembic_version"}
"""Those of optuna's tables that it makes first, and their versions."""
_LARGEST = 1 << 30
"""Bytes of the largest journal that is read. One trial takes about ten thousand."""
_ATTEMPTS = 4
"""How often a database is opened, at most."""
_NO_SQLITE = ("unable to open database file", "file is not a database")
"""What SQLite says of a file that it cannot open or make, and of one that is none of its own."""
_LOCKED = re.compile(r"(?i)\b(?:dead)?lock(?:ed)?\b")
_HIDDEN = "***"
_PASSWORD = re.compile(r"(?i)((?:password|passwd|pwd|secret|token)=)([^&#\s]+)")


def _check_kept(url: str) -> None:
    """Raises ConfigError: the URL is of a database in memory, which would end with this process, and the study with it.

    Source: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
    """
    kind_of_database, _, place = url.partition("://")
    path, _, options = place.partition("?")
    is_memory = not path.strip("/") or ":memory:" in path or "mode=memory" in options
    if kind_of_database.partition("+")[0] == "sqlite" and is_memory:
        what = "is a database in memory, so the study would be lost when the command ends"
        fix = "write sqlite:///study.db for a file, or leave it out, and the study is kept beside output_dir"
        raise ConfigError(Problem(Code.SWEEP_STORAGE, what, url, "--storage", fix))


def study_directory(output: Path) -> Path:
    """Where the study of an output directory is."""
    return output.with_name(f"{output.name}.study")


def check_directory(path: Path) -> None:
    """Raises ConfigError: a link, or something else, has the name of a directory of a study.

    A link would lead out of the study, where files are written, replaced and removed.
    """
    _check_kind(path, "a directory")


def _check_kind(path: Path, right: str) -> None:
    if (found := kind(path)) not in ("", right):
        raise _foreign(f"is {found} in place of {right} of the study", path)


def check_place(directory: Path, name: str, url: str | None) -> None:
    """Check that what is in the place of a study is one, or nothing. Nothing is changed.

    Args:
        directory: That of the study.
        name: Of the study.
        url: Of the database in which it is kept; None for the journal.

    Raises:
        ConfigError: Something else is there, a link, or the journal of another study; or the URL is of no such place.
        ResumeError: The journal is damaged.
    """
    if url is not None:
        _check_kept(url)
        _check_database(url)
    check_directory(directory)
    names = [path.name for path in directory.iterdir()] if kind(directory) else []
    if not _KINDS.keys() & {*names} and (others := sorted(name for name in names if not is_incidental_file(name))):
        raise _foreign(f"holds {others[0]}, and no study", directory)
    for own in _KINDS.keys() & {*names}:
        _check_kind(directory / own, _KINDS[own])
    for parent, own_names, right in _INSIDE:
        for path in sorted((directory / parent).iterdir()) if parent in names else ():
            if own_names.fullmatch(path.name):
                _check_kind(path, right)
    if study_results.FILE in names and not study_results.is_ours(directory):
        raise _foreign("is not what a sweep writes", directory / study_results.FILE)
    if JOURNAL in names and url is None:
        _check_journal(directory / JOURNAL, name)


def _foreign(what: str, path: Path) -> ConfigError:
    fix = "move it away, or choose another output_dir"
    return ConfigError(Problem(Code.SWEEP_STORAGE, what, str(path), fix=fix))


def _check_journal(path: Path, name: str) -> None:
    """Check a journal. Its last line may have been cut off, but never its first two, see `_begin`.

    Raises:
        ConfigError: It is not that of a study of this name, which a sweep has begun.
        ResumeError: A later line is none of a journal.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise _foreign(f"has {size:,} bytes, more than the journal of any study", path)
    with path.open("rb") as file:
        first = _operation(file.readline(_LONGEST))
        if first.get("op_code") != _CREATE_STUDY or not isinstance(first.get("study_name"), str):
            raise _foreign("is not the journal of a study", path)
        is_begun = False
        for number, line in enumerate(file, 2):
            operation = _operation(line)
            code = operation.get("op_code")
            if line.endswith(b"\n") and not isinstance(code, int):
                what, fix = "the study is damaged", "restore it, or move the study away, and start again"
                raise ResumeError(Problem(Code.SWEEP_STORAGE, what, f"{path}:{number}", fix=fix))
            attributes = operation.get("user_attr") if code == _SET_STUDY_ATTRIBUTE else None
            is_begun |= isinstance(attributes, dict) and not attributes.keys().isdisjoint((_BEGUN, IDENTITY))
    if first["study_name"] != name:
        what = f"is the study of an output_dir called {first['study_name']!r}, and this one is called {name!r}"
        fix = "name it as it was, or move the study away"
        raise ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, str(path.parent), fix=fix))
    if not is_begun:
        raise other_study(name, str(path))


def other_study(name: str, where: str) -> ConfigError:
    """The error of a study that another program has made."""
    what = f"holds a study called {name!r} that no sweep has begun"
    fix = "choose another output_dir, after which a study is named, or another database"
    return ConfigError(Problem(Code.SWEEP_OTHER_STUDY, what, where, fix=fix))


def _operation(line: bytes) -> dict[str, Any]:
    """What a line of a journal says; empty for one that is none, or that was cut off."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def open_study(directory: Path, name: str, url: str | None, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """Open a study, or begin one.

    Args:
        directory: That of the study, for a journal and the lock on it.
        name: Of the study in the storage.
        url: Of a database; None for the journal.
        pruner: What stops trials early.

    Raises:
        Exception: Whatever optuna, sqlalchemy and the client of a database raise; see `explained`.
    """
    if url is None and not (directory / JOURNAL).exists():
        _begin(directory, name)
    storage = _journal(directory, directory / JOURNAL) if url is None else _database(url)
    if name in optuna.get_all_study_names(storage):  # which creating would write once more
        return optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    return optuna.create_study(study_name=name, storage=storage, pruner=pruner, load_if_exists=True)


def _begin(directory: Path, name: str) -> None:
    """Begin a journal, which appears with the lines that show whose it is or not at all."""
    unfinished = directory / LOCKS / _UNFINISHED
    unfinished.unlink(missing_ok=True)
    optuna.create_study(study_name=name, storage=_journal(directory, unfinished)).set_user_attr(_BEGUN, True)
    unfinished.rename(directory / JOURNAL)


def _journal(directory: Path, path: Path) -> BaseStorage:
    lock = _JournalLock(path, directory / LOCKS / "journal")
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _check_database(url: str) -> None:
    """Raises LoratuneError: the URL is none, or of a file that is no database of studies; or see `explained`."""
    try:
        engine = create_engine(url)
    except (ImportError, ArgumentError, NoSuchModuleError, ValueError) as error:
        raise _no_database(f"is no URL of a database that can be opened here: {_first_line(error)}", url) from None
    except Exception as error:
        raise explained(error, without_password(url, url), url) from error
    if engine.name != "sqlite" or not (path := engine.url.database):
        return
    if path.startswith("file:") or "uri" in engine.url.query:
        raise _no_database("is a URI of SQLite, and only a path shows which file it is", url)
    if problem := path_problem(path):
        raise _no_database(problem, url)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise _no_database("is in a directory that does not exist", url)
    try:
        found = inspect(engine).get_table_names() if os.path.exists(path) else []
    except Exception as error:
        raise explained(error, without_password(url, url), url) from error
    if found and not _TABLES & {*found}:
        raise _no_database("is a database of something else", url)


def _database(url: str) -> BaseStorage:
    """A database, whose tables another process may be making at this moment, so that making them fails here."""
    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(url)
        except Exception:  # of whatever client the database has
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError


def _no_database(what: str, url: str) -> ConfigError:
    fix = "write sqlite:///study.db for a file, and install the client of any other database"
    where, what = without_password(url, url), without_password(what, url)
    return ConfigError(Problem(Code.SWEEP_STORAGE, what, where, "--storage", fix))


def explained(error: Exception, where: str, url: str | None) -> LoratuneError:
    """The error of a study that cannot be read or written.

    Args:
        error: What the file system, optuna, sqlalchemy or the client of a database has raised.
        where: The journal, or the URL without passwords.
        url: Of the database; None for the journal.
    """
    if is_disk_full(error):
        return ResourceError(Problem(Code.SYSTEM_DISK_FULL, "no room for the study", where, fix="make room"))
    if any(words in str(error) for words in _NO_SQLITE):
        return _no_database(f"cannot be opened: {_first_line(error)}", str(url))
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    reason = without_password(_first_line(error), url) or type(error).__name__
    of_database = next((str(one.orig) for one in causes if isinstance(one, OperationalError)), None)
    if of_database is not None and _LOCKED.search(of_database):
        what, fix = "another program has locked the database of the study", "wait until it ends"
        return LockedError(Problem(Code.SYSTEM_LOCKED, what, where, "--storage", f"{fix}; the same command goes on"))
    fix = "repair it, and the same command goes on with the study"
    what = f"the study cannot be read or written: {reason}"
    is_gone = of_database is not None and not str(url).startswith("sqlite")
    return (LostError if is_gone else ResumeError)(Problem(Code.SWEEP_STORAGE, what, where, fix=fix))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


class _JournalLock(JournalFileOpenLock):
    """The lock on a journal while a line is added. The kernel releases it when its holder ends, in whatever way.

    Optuna's own locks are files, which stay behind a process that was killed: the next ones wait for half a minute, or
    without end where the link that is the lock leads nowhere.

    Whoever gets the lock removes a last line that was cut off, as by a full disk or a power cut: the next line would
    be added to it, and neither could be read.
    """

    def __init__(self, journal: Path, lock: Path):
        super().__init__(str(journal))
        self._journal, self._path = journal, lock
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and get it."""
        file = open_lock(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._remove_incomplete_line()
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _remove_incomplete_line(self) -> None:
        if not self._journal.exists():
            return
        with self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def without_password(text: str, url: str | None) -> str:
    """A text that may mention the URL of a database, without the passwords in that.

    Args:
        text: The URL itself, or an error's words.
        url: The URL; None without one.
    """
    if url is None:
        return text
    credentials = url.partition("://")[2].rpartition("@")[0] if "://" in url else url.rpartition("@")[0]
    parts = credentials.partition(":")[2], credentials.rpartition(":")[2]
    secrets = [credentials, *parts, *(match[2] for match in _PASSWORD.finditer(url))]
    for secret in filter(None, secrets):
        text = text.replace(secret, _HIDDEN)
    return _PASSWORD.sub(rf"\g<1>{_HIDDEN}", text)
