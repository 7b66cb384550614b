"""The public API: what `import loratune` offers.

Long-running functions take `on_event`, a function that is called with events, see `loratune.events`. Nothing is
printed; signal handlers, warnings and environment variables stay as they are, or are put back. Errors are those of
`loratune.errors`, and each has `.problems`, which name a parameter as the command line does, such as `--output`.

Modules of this package import torch and other large libraries inside functions, so that errors in a config or in rows
are found without them.
"""

import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from os import PathLike, fspath
from typing import Any, Literal, TypeAlias

from loratune.events import LIBRARIES, progress

StrPath: TypeAlias = str | PathLike[str]
Rows: TypeAlias = Any
"""The path of a file, a directory or a glob, or a hub id; or rows: a list of dicts, a `datasets.Dataset` or a pandas
frame."""
Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]
"""Values of a config by their dotted keys, such as `{"training.max_steps": 50}`; or texts, `training.max_steps=50`."""
MergedDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]


def assignments(overrides: Overrides) -> list[str]:
    """Overrides as `--set` takes them."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={json.dumps(value, default=fspath)}" for key, value in overrides.items()]


@contextmanager
def libraries() -> Iterator[None]:
    """Import libraries inside. What they print goes to stderr, as of transformers where WANDB_MODE is offline.

    The garbage collector does not walk the million objects that imports make and that stay, then and later.
    """
    with redirect_stdout(sys.stderr):
        if "transformers" in sys.modules:  # there is little left to load
            yield
            return
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with progress(LIBRARIES):
                yield
        finally:
            gc.freeze()
            if was_enabled:
                gc.enable()
