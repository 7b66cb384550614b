"""Where optuna keeps a study: a journal beside its trials, or a database that a URL names."""

import fcntl
import os
import re
import time
from pathlib import Path
from typing import IO

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from loratune.codes import Code
from loratune.errors import ConfigError, LostError, Problem
from loratune.system.files import kind, open_lock

JOURNAL = "journal.log"
_LARGEST = 1 << 30
"""Bytes of the largest journal that is read. One trial takes about ten thousand."""
_ATTEMPTS = 4
"""How often a database is opened, at most."""
_HIDDEN = "***"
_PASSWORD = re.compile(r"(?i)((?:password|passwd|pwd|secret|token)=)([^&#\s]+)")


def check_kept(url: str | None) -> None:
    """Raises ConfigError: the URL is of a database in memory, which would end with this process, and the study with it.

    Source: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
    """
    kind_of_database, _, place = (url or "").partition("://")
    path, _, options = place.partition("?")
    is_memory = not path.strip("/") or ":memory:" in path or "mode=memory" in options
    if url is not None and kind_of_database.partition("+")[0] == "sqlite" and is_memory:
        what = "is a database in memory, so the study would be lost when the command ends"
        fix = "write sqlite:///study.db for a file, or leave it out, and the study is kept beside output_dir"
        raise ConfigError(Problem(Code.SWEEP_STORAGE, what, url, "--storage", fix))


def check_directory(path: Path) -> None:
    """Raises LostError: a link, or something else, has the name of a directory of a study.

    A link would lead out of the study, where files are written, replaced and removed.
    """
    if (found := kind(path)) not in ("", "a directory"):
        what, fix = f"is {found} in place of a directory of the study", "move it away"
        raise LostError(Problem(Code.SWEEP_STORAGE, what, str(path), fix=fix))


def open_storage(directory: Path, url: str | None) -> BaseStorage:
    """The storage of a study.

    Args:
        directory: That of the study, for a journal and the lock on it.
        url: Of a database; None for the journal.

    Raises:
        LostError: What has the name of the journal is none.
        Exception: Whatever optuna, sqlalchemy and the client of a database raise.
    """
    if url is not None:
        return _database(url)
    path = directory / JOURNAL
    if (found := kind(path)) not in ("", "a file"):
        what, fix = f"is {found} in place of the study's journal", "move the study away, and start again"
        raise LostError(Problem(Code.SWEEP_STORAGE, what, str(path), fix=fix))
    if found and (size := path.stat().st_size) > _LARGEST:
        what, fix = f"has {size:,} bytes, more than any study takes", "move the study away, and start again"
        raise LostError(Problem(Code.SWEEP_STORAGE, what, str(path), fix=fix))
    lock = _JournalLock(path, directory / "locks" / "journal")
    lock.acquire()  # which removes half a line that an earlier process has left
    lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _database(url: str) -> BaseStorage:
    """A database, whose tables another process may be making at this moment, so that making them fails here."""
    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(url)
        except (ImportError, ArgumentError, NoSuchModuleError) as error:
            reason = without_password(next(iter(str(error).splitlines()), ""), url)
            what = f"is no URL of a database that can be opened here: {reason}"
            fix = "write sqlite:///study.db for a file, and install the client of any other database"
            raise ConfigError(Problem(Code.SWEEP_STORAGE, what, without_password(url, url), "--storage", fix)) from None
        except Exception:  # of whatever client the database has
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError


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
