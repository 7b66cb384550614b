"""Trackers, which follow a run by the integrations of transformers: TensorBoard, W&B, Trackio and MLflow.

They only watch. One that fails is reported once and then left out. The run draws the same random numbers with and
without trackers. One that hangs, as on a network, holds up the run.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from loratune.codes import Code
from loratune.errors import LoratuneError, Problem
from loratune.events import note
from loratune.training.upstream import TensorBoard


class Tracker(TrainerCallback):
    """Passes on to one integration what the trainer does, until that fails.

    The end of training is passed on by `end`: upstream's integrations close their run then, and the last held-out loss
    comes after it.
    """

    def __init__(self, name: str, make: Callable[[], TrainerCallback], run_name: str):
        """A tracker that has not begun.

        Args:
            name: Its name in `training.report_to`.
            make: Makes the integration, which imports its package.
            run_name: What it is to call the run.
        """
        self._name, self._make, self._run_name, self._log = name, make, run_name, note
        self._integration: TrainerCallback | None = None
        self._last_call: tuple[Any, Any, Any, dict[str, Any]] | None = None
        self._has_failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self._pass_on("on_train_begin", args, state, control, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """When a loss is reported. Not upstream's summary of the run, which counts packs as rows."""
        if logs is not None and "train_runtime" not in logs:
            self._pass_on("on_log", args, state, control, kwargs, logs=dict(logs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each checkpoint, which some integrations upload if their environment asks for it."""
        self._pass_on("on_save", args, state, control, kwargs)

    def end(self) -> None:
        """The run is over. The tracker records the error that is being handled, if there is one."""
        if self._last_call is not None:
            error, name = sys.exception(), self._name
            args, state, control, kwargs = self._last_call
            if name == "mlflow" and error is not None:
                status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                self._attempt(state.global_step, lambda: import_module("mlflow").end_run(status))
            self._pass_on("on_train_end", args, state, control, kwargs)
            if name == "wandb":  # its integration leaves that to the end of the process
                self._attempt(
                    state.global_step, lambda: import_module("wandb").finish(exit_code=int(error is not None))
                )
        self._integration = self._last_call = None

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any], **others: Any) -> None:
        arguments = copy.copy(args)
        arguments.run_name = self._run_name

        def call() -> None:
            self._integration = self._integration or self._make()
            getattr(self._integration, event)(arguments, state, control, **kwargs, **others)

        self._last_call = arguments, state, control, kwargs
        self._attempt(state.global_step, call)

    def _attempt(self, step: int, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            # W&B prints on stderr by itself, and keeps hold of the streams that it finds.
            with _same_random_numbers(), nullcontext() if self._name == "wandb" else redirect_stdout(sys.stderr):
                action()
        except LoratuneError:
            raise
        except (Exception, SystemExit) as error:  # whatever a package, its disk or its network comes up with
            self._has_failed, self._integration = True, None
            what = f"{self._name} failed at step {step}: {type(error).__name__}: {error}"
            fix = "the run goes on without it"
            note(str(Problem(Code.TRAINING_TRACKER_FAILED, what, key="training.report_to", fix=fix)))


def trackers(names: Iterable[str], output: Path, *, is_resumed: bool) -> Sequence[Tracker]:
    """The trackers of a run, for the main process.

    Args:
        names: Those of `training.report_to`.
        output: The output directory, after which the run is called, and beside which TensorBoard's files go.
        is_resumed: Whether the run goes on from a checkpoint, and so do TensorBoard's files.
    """

    def make(name: str) -> TrainerCallback:
        if name == "tensorboard":
            return TensorBoard(_log_directory(output, is_resumed=is_resumed))
        (integration,) = get_reporting_integration_callbacks([name])
        return integration()

    return [Tracker(name, partial(make, name), output.name) for name in dict.fromkeys(names)]


def _log_directory(output: Path, *, is_resumed: bool) -> Path:
    """A new directory within `<output>.logs`, which is named by the time; that of the last run if it is resumed."""
    logs = output.with_name(f"{output.name}.logs")
    earlier = sorted(path for path in logs.glob("2*") if path.is_dir()) if is_resumed else []
    return earlier[-1] if earlier else logs / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """After this, random numbers are drawn as if nothing had been drawn inside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    state, array_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(array_state)
