"""The public API: what `import loratune` offers.

Long-running functions take `on_event`, a function that is called with events, see `loratune.events`. Nothing is
printed; signal handlers, warnings and environment variables are unchanged or restored. Errors are those of
`loratune.errors`; their `.problems` name parameters as on the command line, such as `--output`.

Modules of this package import torch and other large libraries inside functions, so that errors in a config or in rows
are found without them.
"""

import atexit
import gc
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from os import PathLike, fspath
from typing import Any, Literal, TypeAlias

from loratune.events import LIBRARIES, progress

StrPath: TypeAlias = str | PathLike[str]
Rows: TypeAlias = Any
"""A file, a directory, a glob or a hub id; or the rows themselves: a list of dicts, a `datasets.Dataset` or a pandas
DataFrame."""
Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]
"""Dotted config key → value, such as `{"training.max_steps": 50}`; or strings like `training.max_steps=50`."""
MergedDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]


def assignments(overrides: Overrides) -> list[str]:
    """Overrides in the form of `--set`: `KEY=VALUE`."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={json.dumps(value, default=fspath)}" for key, value in overrides.items()]


@contextmanager
def _silenced(library: str) -> Iterator[None]:
    """Inside, a library does not log what is missing for features that loratune does not use."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def libraries() -> Iterator[None]:
    """A context for importing libraries. Their stdout goes to stderr; transformers prints if WANDB_MODE is offline.

    The garbage collector is disabled inside, and afterwards ignores the million permanent objects that imports create.
    """
    with redirect_stdout(sys.stderr), _silenced("bitsandbytes"):
        if "transformers" in sys.modules:  # little is left to import
            yield
            return
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with progress(LIBRARIES):
                yield
        except SystemExit as error:
            raise ImportError(f"a package ends the program as it is imported (exit code {error.code})") from error
        finally:
            gc.freeze()
            atexit.register(gc.unfreeze)  # at its end, Python collects all: nanobind would report what is left as leaks
            if was_enabled:
                gc.enable()
