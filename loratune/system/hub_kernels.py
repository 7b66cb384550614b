"""No compiled code from the hub: libraries download it through the package `kernels`, and run it, without being asked.

transformers 5.25 requires the package, takes such code for the layers of GPUs unless `use_kernels=False` is given, and
for GGUF files and a few models in any case. bitsandbytes 0.50 asks for it as it is imported. What it computes is not
what the checks of `loratune.kernels` have seen, and a run would be another one tomorrow.

No documented switch is enough: bitsandbytes has none, and the `USE_HUB_KERNELS` of transformers, a variable of the
whole program, does not hold for GGUF files and attention.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any

_PACKAGE = "kernels"


class _Hiding:
    """Hides the package from the first that asks for it to the last that is done, in any thread."""

    def __init__(self) -> None:
        self._lock, self._count, self._loaded = Lock(), 0, dict[str, ModuleType]()

    def begin(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._loaded = {_PACKAGE: sys.modules[_PACKAGE]} if _PACKAGE in sys.modules else {}
                sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # to import it raises ImportError, as documented
                _look_again()

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                sys.modules.pop(_PACKAGE, None)
                sys.modules.update(self._loaded)
                _look_again()


_HIDING = _Hiding()


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, the package cannot be imported, and transformers knows of none; in other threads, too."""
    _HIDING.begin()
    try:
        yield
    finally:
        _HIDING.end()


def _look_again() -> None:
    """Let transformers, which keeps what it has found, look for the package again."""
    if utils := sys.modules.get("transformers.utils.import_utils"):
        utils.is_kernels_available.cache_clear()


@contextmanager
def _hidden_quietly() -> Iterator[None]:
    """`hidden`, and bitsandbytes does not log that it misses the package."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with hidden():
            yield
    finally:
        logger.setLevel(level)


class _Finder:
    """Imports bitsandbytes while the package is hidden; a finder of `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "bitsandbytes":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not _Finder)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _hidden_quietly()(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


@contextmanager
def hidden_from_bitsandbytes() -> Iterator[None]:
    """Inside, the package is hidden while bitsandbytes is imported."""
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
