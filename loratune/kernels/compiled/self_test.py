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
from pathlib import Path

import torch

from loratune import __version__
from loratune.kernels.compiled import library
from loratune.system.files import make_private_directory, open_file, ownership_problem, write_json

FAILED = "failed"
OPERATIONS = "compiled operations, {}"
"""The name of the check of the compiled operations in a dtype."""
_MAX_BYTES = 1 << 20
_UNKNOWN = (OSError, RuntimeError, importlib.metadata.PackageNotFoundError)
"""The cache cannot be used, there is no home directory, or a package is installed without its metadata."""


def record(results: Mapping[str, str]) -> str:
    """Keep the results of this machine: check → result; none forgets them. Returns why that is not possible, or an
    empty text."""
    _failed.cache_clear()
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
    return [*_failed()]


@cache
def _failed() -> tuple[str, ...]:
    try:
        results = _read(_path()).get(_machine(), {})
    except _UNKNOWN:
        return ()
    return tuple(name for name, result in results.items() if result == FAILED)


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


@cache
def _machine() -> str:
    """A hash of what the results depend on."""
    has_gpu = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if has_gpu else []
    stack = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    parts = [library.processor_name(), sorted(library.features()), names, stack, __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
