"""No compiled code from the hub: libraries download it through the package `kernels`, and run it, without being asked.

transformers 5.25 requires the package, takes such code for the layers of GPUs unless `use_kernels=False` is given, and
for GGUF files in any case. bitsandbytes 0.50 asks for it as it is imported. What it computes is not what the checks of
`loratune.kernels` have seen, and a run would be another one tomorrow.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_PACKAGE = "kernels"


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, the package cannot be imported, and transformers knows of none."""
    loaded = {_PACKAGE: sys.modules[_PACKAGE]} if _PACKAGE in sys.modules else {}
    sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # importing it raises ImportError, as Python documents
    _look_again()
    try:
        yield
    finally:
        del sys.modules[_PACKAGE]
        sys.modules.update(loaded)
        _look_again()


def _look_again() -> None:
    """Let transformers, which keeps what it has found, look for the package again."""
    if utils := sys.modules.get("transformers.utils.import_utils"):
        utils.is_kernels_available.cache_clear()


class _Finder:
    """Imports bitsandbytes while the package is hidden; a finder of `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "bitsandbytes" else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = hidden()(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


@contextmanager
def hidden_from_bitsandbytes() -> Iterator[None]:
    """Inside, the package is hidden while bitsandbytes is imported."""
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
