"""Results that are the same each time, such as those of checks, kept in the cache directory of this user.

Whoever keeps a result names everything that it depends on. The results of one set of such values are a small file,
`results/<hash>.json`. There are no locks: a file is replaced as a whole, and processes that keep a result at the same
time may keep one of them only.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from loratune.system.files import make_private_directory, open_file, ownership_problem

_DAYS = 90
"""Files that were not used for this many days are removed when another one is written."""
_MAX_BYTES = 1 << 20
_PACKAGE = Path(__file__).parents[1]

Value = TypeVar("Value")


def cache_directory() -> Path:
    """The cache directory. Raises RuntimeError: there is no home directory."""
    value = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(value) if os.path.isabs(value) else Path.home() / ".cache"  # The XDG specification ignores others.
    return cache / "loratune"


def directory() -> Path:
    """Where results are kept. Raises RuntimeError: there is no home directory."""
    return cache_directory() / "results"


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

    def once(self, name: str, compute: Callable[[], Value]) -> Value:
        """The result of a function, which is called if none is kept. It must be a value that JSON can hold."""
        known = self.load()
        if name not in known:
            known[name] = value = compute()
            self.store(known)
            return value
        kept: Value = known[name]
        return kept

    def load(self) -> dict[str, Any]:
        """All results; empty if there are none, or if the file is damaged or can be written by another user."""
        with suppress(OSError, ValueError, RuntimeError):
            if self._name:
                path = directory() / self._name
                with open_file(path) as file:
                    content = b"" if ownership_problem(os.fstat(file.fileno())) else file.read(_MAX_BYTES)
                os.utime(path)
                values = json.loads(content)
                return values if isinstance(values, dict) else {}
        return {}

    def store(self, results: dict[str, Any]) -> str:
        """Replace all results. Returns why that is not possible, or an empty text."""
        if not self._name:
            return "what they depend on is not known"
        try:
            folder = directory()
            make_private_directory(folder)
            if problem := ownership_problem(folder.lstat()):
                return f"{folder} {problem}"
            for path in folder.iterdir():
                if path.stat().st_mtime < time.time() - _DAYS * 86400:
                    path.unlink(missing_ok=True)
            unfinished = folder / uuid.uuid4().hex
            try:
                unfinished.write_text(json.dumps(results), encoding="utf-8")
                unfinished.replace(folder / self._name)
            finally:
                unfinished.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            return str(error)
        return ""


NOTHING_KEPT = KeptResults()
"""Computes each result anew."""
