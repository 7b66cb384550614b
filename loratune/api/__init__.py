"""The public API: what `import loratune` offers.

Long-running functions take `on_event`, a function that is called with events, see `loratune.events`. Nothing is
printed; signal handlers, warnings and environment variables are unchanged or restored. Errors are those of
`loratune.errors`; their `.problems` name parameters, which the command line translates into its options.

One thread of a process computes at a time, as random states belong to the process: other threads wait for their turn,
`train` and `sweep` let them compute between two steps, and a second `train` or `sweep` raises LockedError at once. What
`on_event` and the like call has to wait until the function is done, and raises LockedError; between two steps of
training it may compute. Afterwards the random states of Python, NumPy and torch, torch's default dtype and device,
gradient, inference and autocast mode are those of the program, and none of them changes a result; only sampling without
a seed draws from torch's random state.

Modules of this package import torch and other large libraries inside functions, so that errors in a config or in rows
are found without them.
"""

import atexit
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.events import LIBRARIES, EvaluationEvent, Event, StepEvent, listener, listening, progress
from loratune.system import hub_kernels, turns

StrPath: TypeAlias = str | PathLike[str]
Messages: TypeAlias = list[dict[str, Any]]
if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

    Rows: TypeAlias = StrPath | Sequence[Mapping[str, Any]] | Dataset | DataFrame
else:
    Rows = Any  # it is checked where it is read
"""A file, a directory, a glob or a hub id; or the rows themselves: a list of dicts, a `datasets.Dataset` or a pandas
DataFrame."""
Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]
"""Dotted config key → value, such as `{"training.max_steps": 50}`; or strings like `training.max_steps=50`."""
Client: TypeAlias = Literal["peft", "vllm", "sglang", "gguf", "ollama"]
MergedType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
MergedDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]


def assignments(overrides: Overrides) -> list[str]:
    """Overrides in the form `KEY=VALUE`. Raises ConfigError: see `arguments.plain`; a value is no value of
    a config."""
    if not isinstance(overrides, Mapping):
        return list(overrides)

    from loratune.config.arguments import plain
    from loratune.config.yaml_files import kind_of

    found, problems = list[str](), list[Problem]()
    for key, value in overrides.items():
        try:
            found.append(f"{key}={json.dumps(plain(value, key))}")
        except TypeError:
            what = f"no config holds such a value, got {kind_of(value)}"
            problems.append(Problem(Code.CONFIG_BAD_VALUE, what, key=key))
    if problems:
        raise ConfigError(problems)
    return found


@contextmanager
def libraries() -> Iterator[None]:
    """A context for importing libraries. Their stdout goes to stderr; transformers prints if WANDB_MODE is offline.

    bitsandbytes loads no compiled code from the hub. The garbage collector is disabled inside, and afterwards ignores
    the million permanent objects that imports create.
    """
    with turns.stdout_to(sys.stderr), hub_kernels.hidden_from_bitsandbytes():
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


@contextmanager
def default_state() -> Iterator[None]:
    """Import the libraries, and set aside the random states and torch's modes of the program inside."""
    with libraries():
        from loratune.system import accelerator

    with accelerator.kept_random_states(), accelerator.default_modes():
        yield


@contextmanager
def computing() -> Iterator[None]:
    """Compute inside, when it is the turn of this thread, see `turns.turn`; with `default_state`."""
    with turns.turn(), default_state():
        yield


@contextmanager
def training() -> Iterator[None]:
    """Train inside, see `turns.training`. Whoever waits has a turn between two steps, as has the listener of events.
    What the listener draws or sets does not reach the run."""
    outer = listener()

    def pass_on(event: Event) -> None:
        if "loratune.system.accelerator" not in sys.modules:  # the libraries are not loaded yet
            outer(event)
            return
        from loratune.system import accelerator

        others = turns.passed_on() if isinstance(event, StepEvent | EvaluationEvent) else nullcontext()
        with accelerator.kept_random_states(), accelerator.kept_modes(), others:
            outer(event)

    with turns.training(), listening(pass_on):
        yield
