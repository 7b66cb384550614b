"""What `loratune env --self-test` found on this machine, as it is kept in the cache directory.

The results hold for a processor or GPU, and for the versions of the libraries and of loratune; other results are kept
beside them, as machines may share a home directory.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune import __version__
from loratune.kernels.compiled import library
from loratune.system import accelerator, environment
from loratune.system.files import make_private_directory, open_file, ownership_problem, write_json
from loratune.system.kept_results import NOTHING_KEPT, KeptResults

PASSED, FAILED = "passed", "failed"
OPERATIONS = "compiled operations, {}"
"""The name of the check of the compiled operations in a dtype."""
LIGER, LIGER_FASTER = "Liger's kernels", "Liger's kernels: faster"
"""The name of the check of Liger's kernels; and what is kept as passed beside it where they were faster."""
_MAX_BYTES = 1 << 20
_UNKNOWN = (OSError, RuntimeError, importlib.metadata.PackageNotFoundError)
"""The cache cannot be used, there is no home directory, or a package is installed without its metadata."""


def record(results: Mapping[str, str]) -> str:
    """Keep the results of this machine: check → result; none forgets them. Returns why that is not possible, or an
    empty text."""
    _known.cache_clear()
    try:
        path = _path()
        make_private_directory(path.parent)
        known = _read(path)
        write_json(path, {**known, _machine(): dict(results)})
    except _UNKNOWN as error:
        return str(error)
    return ""


def failed() -> list[str]:
    """The names of the checks that failed on this machine; empty if it was not tested."""
    return [name for name, result in _known().items() if result == FAILED]


def passed() -> list[str]:
    """The names of the checks that passed on this machine; empty if it was not tested."""
    return [name for name, result in _known().items() if result == PASSED]


@cache
def _known() -> Mapping[str, str]:
    try:
        return _read(_path()).get(_machine(), {})
    except _UNKNOWN:
        return {}


def _path() -> Path:
    """Raises RuntimeError: there is no home directory."""
    return library.cache_directory() / "self-test.json"


def _read(path: Path) -> dict[str, dict[str, str]]:
    """Machine → its results; empty if the file is missing, damaged, or of another user. Raises OSError."""
    if not path.exists():
        return {}
    with open_file(path) as file:
        content = b"" if ownership_problem(os.fstat(file.fileno())) else file.read(_MAX_BYTES)
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return {
        str(machine): {str(name): str(result) for name, result in results.items()}
        for machine, results in (values.items() if isinstance(values, dict) else ())
        if isinstance(results, dict)
    }


def kept_here(*parts: Any) -> KeptResults:
    """Results that hold on this machine, for these versions of the libraries and of loratune, and for `parts`, which
    are plain values. Nothing is kept if a package is installed without its metadata."""
    try:
        return KeptResults([_machine(), *parts])
    except importlib.metadata.PackageNotFoundError:
        return NOTHING_KEPT


@cache
def _machine() -> str:
    """A hash of what the results depend on."""
    names = ["torch", "transformers", "peft", "bitsandbytes", *(["liger-kernel"] if find_spec("liger_kernel") else [])]
    stack = [importlib.metadata.version(name) for name in names]
    parts = [environment.processor_name(), sorted(environment.features()), accelerator.names(), stack, __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
