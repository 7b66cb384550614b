"""Results that are the same each time, such as those of checks, kept in the cache directory of this user.

Whoever keeps a result names everything that it depends on. The results of one set of such values are a small file,
`results/<hash>.json`. There are no locks: a file is replaced as a whole, and processes that keep a result at the same
time may keep one of them only.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from loratune.system.files import is_file, make_private_directory, open_file, ownership_problem, replace_private

_log = logging.getLogger(__name__)

_DAYS = 90
"""Files that were not used for this many days are removed when another one is written."""
_NAME = re.compile(r"[0-9a-f]{64}\.json(\.[0-9a-f]{32})?")
"""Names of files of results, also of unfinished ones; others are not ours to remove."""
_MAX_BYTES = 1 << 20
_PACKAGE = Path(__file__).parents[1]
_ELSEWHERE: ContextVar[Path | None] = ContextVar("elsewhere", default=None)

Value = TypeVar("Value")
REFUSAL = str | None
"""The type of a kept reason, which is None where there is none."""


def cache_directory() -> Path:
    """The cache directory. Raises RuntimeError: there is no home directory."""
    value = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(value) if os.path.isabs(value) else Path.home() / ".cache"  # The XDG specification ignores others.
    return cache / "loratune"


def directory() -> Path:
    """Where results are kept by default. Raises RuntimeError: there is no home directory."""
    return cache_directory() / "results"


def elsewhere() -> Path | None:
    """The directory of the innermost `keeping_in`; None outside."""
    return _ELSEWHERE.get()


@contextmanager
def keeping_in(folder: Path) -> Iterator[None]:
    """Inside, results are kept in another directory, so none of those that were kept before is known."""
    token = _ELSEWHERE.set(folder)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


@cache
def source_digest() -> str:
    """SHA-256 of the source code of this package."""
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("py", "c", "h", "json") for path in _PACKAGE.rglob(f"*.{ending}")):
        digest.update(f"{path.relative_to(_PACKAGE)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class KeptResults:
    """Results by name.

    parts: what they depend on, as plain values; None: nothing is kept.
    """

    def __init__(self, parts: Any = None):
        text = json.dumps(parts, sort_keys=True, default=str)
        self._name = f"{hashlib.sha256(text.encode()).hexdigest()}.json" if parts is not None else ""

    def once(self, name: str, kind: type | UnionType, compute: Callable[[], Value]) -> Value:
        """The result of a function, which is called if none of this type is kept. JSON must be able to hold it."""
        known = self.load()
        if name in known and isinstance(known[name], kind):
            kept: Value = known[name]
            return kept
        value = compute()
        if why := self.store({**self.load(), name: value}):  # Another process may have kept others meanwhile.
            _log.debug("the result of %s is not kept: %s", name, why)
        return value

    def load(self) -> dict[str, Any]:
        """All results; empty if there are none, or if the file is damaged or can be written by another user."""
        with suppress(OSError, ValueError, RuntimeError):
            if self._name:
                path = (elsewhere() or directory()) / self._name
                with open_file(path) as file:
                    content = b"" if ownership_problem(os.fstat(file.fileno())) else file.read(_MAX_BYTES)
                with suppress(OSError):  # such as a file system that is read-only
                    os.utime(path)
                values = json.loads(content)
                return values if isinstance(values, dict) else {}
        return {}

    def store(self, results: dict[str, Any]) -> str:
        """Replace all results. Returns why that is not possible, or an empty text."""
        if not self._name:
            return "what they depend on is not known"
        try:
            folder = elsewhere() or directory()
            make_private_directory(folder)
            if problem := ownership_problem(folder.lstat()):
                return f"{folder} {problem}"
            for path in folder.iterdir():
                with suppress(OSError):
                    is_ours = _NAME.fullmatch(path.name) and is_file(path)
                    if is_ours and path.stat().st_mtime < time.time() - _DAYS * 86400:
                        path.unlink()
            replace_private(folder / self._name, json.dumps(results).encode())
        except (OSError, RuntimeError) as error:
            return str(error)
        return ""


NOTHING_KEPT = KeptResults()
"""Computes each result anew."""
