"""Kept results that hold on one machine only, such as those of checks of what it computes.

They hold for a processor or GPU, and for the versions of the libraries and of loratune; other results are kept beside
them, as machines may share a home directory.
"""

import hashlib
import importlib.metadata
import json
from functools import cache
from importlib.util import find_spec
from typing import Any

from loratune import __version__
from loratune.system import accelerator, environment
from loratune.system.cache import NOTHING_KEPT, EntryKind, KeptResults


def kept_here(*parts: Any, of: EntryKind | None = None) -> KeptResults:
    """Results that hold on this machine, for these versions of the libraries and of loratune, and for `parts`, which
    are plain values. Nothing is kept if a package is installed without its metadata. of: see `KeptResults`."""
    try:
        return KeptResults([_machine(), *parts], of)
    except importlib.metadata.PackageNotFoundError:
        return NOTHING_KEPT


@cache
def _machine() -> str:
    """A hash of what the results depend on."""
    names = ["torch", "transformers", "peft", "bitsandbytes", *(["liger-kernel"] if find_spec("liger_kernel") else [])]
    stack = [importlib.metadata.version(name) for name in names]
    parts = [environment.processor_name(), sorted(environment.features()), accelerator.names(), stack, __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
