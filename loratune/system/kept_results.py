"""Results that are the same each time, such as those of checks, kept in the cache directory of this user.

Whoever keeps a result names everything that it depends on. The results of one set of such values are a small file,
`results/<hash>.json`, with a digest that detects damage. There are no locks: a file is replaced as a whole, and
processes that keep a result at the same time may keep one of them only.
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
        text = json.dumps(parts, sort_keys=True, default=_plain)
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
        with suppress(OSError, ValueError, RuntimeError, KeyError, TypeError):
            if self._name and not _problem(folder := elsewhere() or directory()):
                path = folder / self._name
                with open_file(path) as file:
                    content = b"" if ownership_problem(os.fstat(file.fileno())) else file.read(_MAX_BYTES)
                with suppress(OSError):  # such as a file system that is read-only
                    os.utime(path)
                values: dict[str, Any] = json.loads(content)["results"]
                return values if content == self._sealed(values) else {}
        return {}

    def store(self, results: dict[str, Any]) -> str:
        """Replace all results. Returns why that is not possible, or an empty text."""
        if not self._name:
            return "what they depend on is not known"
        try:
            folder = elsewhere() or directory()
            make_private_directory(folder)
            if problem := _problem(folder):
                return problem
            for path in folder.iterdir():
                with suppress(OSError):
                    is_ours = _NAME.fullmatch(path.name) and is_file(path)
                    if is_ours and path.stat().st_mtime < time.time() - _DAYS * 86400:
                        path.unlink()
            replace_private(folder / self._name, self._sealed(results))
        except (OSError, RuntimeError) as error:
            return str(error)
        return ""

    def _sealed(self, results: dict[str, Any]) -> bytes:
        """The content of the file, with a digest of what the results depend on and of the results."""
        digest = hashlib.sha256(f"{self._name} {json.dumps(results)}".encode()).hexdigest()
        return json.dumps({"results": results, "sha256": digest}).encode()


def _plain(value: Any) -> Any:
    """A value for JSON. The order of a set differs from process to process."""
    return sorted(value, key=str) if isinstance(value, set) else str(value)


def _problem(folder: Path) -> str:
    """Why somebody else can write to a directory or replace it, in words; empty if only this user can. Raises OSError:
    it cannot be read.

    The one above it may be a link: to make that, one must own what is above.
    """
    found = {folder: folder.lstat(), folder.parent: folder.parent.stat()}
    return next((f"{path} {why}" for path, status in found.items() if (why := ownership_problem(status))), "")


NOTHING_KEPT = KeptResults()
"""Computes each result anew."""
