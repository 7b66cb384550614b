"""Callbacks of the trainer: they check numbers, emit events, stop the run on request, and report to trackers.

Trackers are the integrations of transformers (TensorBoard, W&B, Trackio, MLflow). A run draws the same random numbers
with and without them. A tracker that fails is reported once and then disabled; one that hangs blocks the run.
"""

import copy
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from loratune.codes import Code
from loratune.compare.engine import Objective
from loratune.errors import LoratuneError, NumericError, Problem
from loratune.events import EvaluationEvent, StepEvent, TrainingEvent, emit, note
from loratune.kernels import global_norm
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.tensors import Weights, read_weights
from loratune.system import accelerator, turns
from loratune.system.launcher import Group
from loratune.training.checkpoints.store import BEST_WEIGHTS, BestRecord, Checkpoints, StepLosses
from loratune.training.retention import RetentionTerm
from loratune.training.upstream import TensorBoard

_METRICS = ("reward_accuracy", "reward_margin")
"""Preference metrics that the trainer logs in addition to the loss."""


class StepLoss(TrainerCallback):
    """Computes the loss of every micro-step, and ends the run as soon as a number is not finite.

    Attributes:
        tokens: How many tokens this process has read since the last optimizer step.
        has_rows: Whether a row of the optimizer step has a weight above 0.
        norm: Returns the norm of the gradients of a step; set once there is a trainer to compute it.
        before_first_step: Called before the first step; set as `norm`.
        losses: Those of the steps that were not reported yet.
        retention: The term that keeps the model near what it was; None without one.
        objective: What the loss is.
    """

    norm: Callable[[], torch.Tensor]
    before_first_step: Callable[[], None]
    retention: RetentionTerm | None = None

    def __init__(self, checkpoints: Checkpoints, group: Group, losses: StepLosses, objective: Objective) -> None:
        self.checkpoints, self.group, self.losses, self.objective = checkpoints, group, losses, objective
        self.sum: torch.Tensor | None = None
        self.tokens, self.has_rows = 0, True

    def loss(
        self, model: Any, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The summed loss of a micro-step, divided by the supervised tokens of the whole optimizer step, or its pairs.

        These are counted over all processes, so neither accumulation nor the number of processes changes the result.

        Args:
            model: The model.
            outputs: The output of the model.
            labels: (rows, length), -100 at tokens without supervision.
            num_items_in_batch: The count of `Objective.begin_step` for the step; None: the count of the micro-step.
        """
        total, count = self.objective.total(model, outputs.logits, labels)
        value = total / (count if num_items_in_batch is None else num_items_in_batch)
        own = value.detach().clone()  # Trainer multiplies the loss in place, by the number of processes
        self.sum = own if self.sum is None else self.sum + own
        return value if self.retention is None else value + self.retention.of_batch(model, outputs.logits)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self.before_first_step()
        self.sum, self.tokens = None, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check loss and gradients before the weights change. One transfer from the device per optimizer step."""
        assert self.sum is not None
        own = [self.sum, self.norm(), *(self.retention.taken() if self.retention else ())]
        loss, norm, *texts = torch.stack([value.to(own[0].device).float() for value in own]).tolist()
        loss, tokens, divergence = self.group.total([loss, self.tokens, sum(texts)])
        state.num_input_tokens_seen += int(tokens)
        self.sum, self.tokens = None, 0
        if self.retention:
            self.retention.end_step(divergence)
        for name, value in (("loss", loss), ("gradient norm", norm), ("divergence from the base", divergence)):
            if not math.isfinite(value):
                fixes = "check that the base model works by itself", "lower training.learning_rate, or train in float32"
                what = f"the {name} of step {state.global_step + 1} is {value}"
                problem = Problem(Code.TRAINING_NOT_FINITE, what, fix=fixes[state.global_step > 0])
                raise diverged_error(problem, self.checkpoints, state.global_step)
        if self.has_rows:
            self.losses.add(loss)


def diverged_error(problem: Problem, checkpoints: Checkpoints, step: int) -> NumericError:
    """The error of a run whose weights after a step produce non-finite numbers.

    The checkpoint of that step is removed.
    """
    if (earlier := checkpoints.discard(step)) is None:
        return NumericError(problem)
    resume = "`resume=['training.learning_rate']`"
    continuation = f"step {earlier} is kept: continue from there with {resume}, or start afresh with `overwrite=True`"
    return NumericError(replace(problem, fix=f"{problem.fix}; {continuation}"))


def check_finite(weights: Iterable[torch.Tensor], step: int) -> None:
    """Check the trained weights.

    Raises:
        NumericError: One of them is NaN or inf.
    """
    if not global_norm(list(weights), math.inf).isfinite():
        what, fix = f"step {step} made a weight of the adapter NaN or inf", "lower it, or train in float32"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix=fix))


class BestStep:
    """The best step so far, by its held-out loss.

    Each checkpoint holds the record and the best weights at that time, so a resumed run needs only the checkpoint, and
    repeats the evaluations after it. The weights are in a separate file unless they are the checkpoint's own.

    Attributes:
        record: The record of the evaluations; None before the first.
        keep: Whether the weights of the best step become the adapter.
        patience: The run ends after this many consecutive evaluations without a lower loss; None: never.
    """

    def __init__(self, *, keep: bool, patience: int | None, record: BestRecord | None = None) -> None:
        self.record, self.keep, self.patience = record, keep, patience
        self._weights: Weights | None = None

    @property
    def is_exhausted(self) -> bool:
        """Whether the run ends by patience."""
        return self.record is not None and self.patience is not None and self.record.since >= self.patience

    def add(self, step: int, loss: float, weights: Callable[[], Weights]) -> None:
        """Add an evaluation.

        Args:
            step: The step of the evaluation.
            loss: The held-out loss.
            weights: Returns the trained weights as whole tensors, see `tensors.full_weights`; called in all processes
                or in none.
        """
        self.record = self.record.after(step, loss) if self.record else BestRecord(step, loss)
        if self.keep and self.record.step == step:
            self._weights = {name: tensor.cpu() for name, tensor in weights().items()}

    def kept_weights(self, step: int) -> Weights | None:
        """The weights that become the adapter; None if they are the current weights. step: the last step."""
        if not self.keep or self.record is None or self.record.step == step:
            return None
        assert self._weights is not None
        return self._weights

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the weights to a checkpoint of a step, unless they are its own."""
        if (weights := self.kept_weights(step)) is not None:
            save_file(weights, checkpoint / BEST_WEIGHTS)

    def load(self, checkpoint: Path, step: int) -> None:
        """Read the weights back from a checkpoint of a step."""
        if self.keep and self.record is not None:
            self._weights = read_weights(checkpoint / (WEIGHTS_FILE if self.record.step == step else BEST_WEIGHTS))


class RunCallback(TrainerCallback):
    """Emits the events of training, and ends a run after the current step on request.

    Args:
        stopping: Returns whether any process was asked to stop; all of them call it together.
        at_evaluations: Whether the loss is also reported at each evaluation, as any may end the run.
    """

    def __init__(self, stopping: Callable[[], bool], *, at_evaluations: bool):
        self.stopping, self.at_evaluations = stopping, at_evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        state.compute_steps(args, state.max_steps)  # a checkpoint restores the values of the interrupted run
        self.tokens_before = int(state.num_input_tokens_seen)
        emit(TrainingEvent(state.max_steps, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step. If the loss of the step is reported, its event is emitted by `on_log`."""
        if state.global_step >= state.max_steps or (self.at_evaluations and control.should_evaluate):
            control.should_log = True  # the last loss is reported as the result of the run
        if not control.should_log:
            self._emit_step(state, {})
        if self.stopping():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """When a loss is reported."""
        values = logs or {}
        if "eval_loss" in values:
            metrics = {name: values[f"eval_{name}"] for name in _METRICS if f"eval_{name}" in values}
            emit(EvaluationEvent(state.global_step, state.max_steps, values["eval_loss"], metrics))
        elif "learning_rate" in values:
            self._emit_step(state, values)

    def _emit_step(self, state: Any, values: Mapping[str, float]) -> None:
        tokens = int(state.num_input_tokens_seen) - self.tokens_before
        metrics = {name: values[name] for name in _METRICS if name in values}
        loss, rate = values.get("loss"), values.get("learning_rate")
        emit(StepEvent(state.global_step, state.max_steps, tokens, loss, rate, metrics))


class Pace(TrainerCallback):
    """Measures how fast tokens are read in training. Evaluations and checkpoints do not count."""

    def __init__(self) -> None:
        self.seconds = self.start = self.reported_seconds = 0.0
        self.first_tokens = self.reported_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self.reported_tokens = self.first_tokens = int(state.num_input_tokens_seen)
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        before, self.start = self.start, time.monotonic()
        self.seconds += self.start - before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint, or an evaluation."""
        self.start = time.monotonic()

    on_evaluate = on_save

    def metrics(self, logs: Mapping[str, float], state: Any) -> dict[str, float]:
        """Values added to a report of the trainer: the tokens read so far and, with a loss, tokens per second."""
        tokens = int(state.num_input_tokens_seen)
        if "loss" not in logs:
            return {"tokens": tokens}
        rate = (tokens - self.reported_tokens) / max(self.seconds - self.reported_seconds, 1e-9)
        self.reported_tokens, self.reported_seconds = tokens, self.seconds
        return {"tokens": tokens, "tokens_per_second": round(rate, 1)}

    def overall(self, state: Any) -> float | None:
        """Tokens a second over all steps of this process; None if it took none."""
        tokens = int(state.num_input_tokens_seen) - self.first_tokens
        return round(tokens / self.seconds, 1) if tokens and self.seconds else None


class StepTimer(TrainerCallback):
    """Times the micro-steps of a run that accumulates nothing, and ends it when there are enough of them.

    Attributes:
        is_enough: Function of the number of micro-steps that returns whether the run ends; all processes call it
            together.
        micro_steps: Seconds of each micro-step, without the optimizer.
        optimizer: Seconds of the optimizer after each micro-step.
        setup: Seconds that it takes to set up the trainer.
        checkpoint: Seconds that a checkpoint takes.
    """

    def __init__(self, is_enough: Callable[[int], bool]):
        self.is_enough = is_enough
        self.micro_steps, self.optimizer = list[float](), list[float]()
        self.setup = self.checkpoint = self.start = 0.0

    def _lap(self) -> float:
        start, self.start = self.start, time.monotonic()
        return self.start - start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self._lap()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the gradients of a step."""
        self.micro_steps.append(self._lap())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        self.optimizer.append(self._lap())
        control.should_training_stop = self.is_enough(len(self.micro_steps))


class Tracker(TrainerCallback):
    """Forwards the trainer's callbacks to one integration, until that fails.

    The end of training is forwarded by `end`: upstream's integrations close their run then, and the last held-out loss
    is reported later.
    """

    def __init__(self, name: str, make: Callable[[], TrainerCallback], run_name: str):
        """name: its name in `training.report_to`; make: creates the integration, which imports its package; run_name:
        the name of the run in the tracker."""
        self._name, self._make, self._run_name = name, make, run_name
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
            with _same_random_numbers(), nullcontext() if self._name == "wandb" else turns.stdout_to(sys.stderr):
                action()
        except LoratuneError:
            raise
        except (Exception, SystemExit) as error:  # whatever a package, its disk or its network comes up with
            self._has_failed, self._integration = True, None
            what = f"{self._name} failed at step {step}: {type(error).__name__}: {error}"
            fix = "the run continues without it"
            note(str(Problem(Code.TRAINING_TRACKER_FAILED, what, key="training.report_to", fix=fix)))


def trackers(names: Iterable[str], output: Path, *, is_resumed: bool) -> Sequence[Tracker]:
    """The trackers of a run, for the main process. The run is named after the output directory. TensorBoard's files are
    written next to it, and continued if the run `is_resumed`."""

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
    state, array_state = random.getstate(), np.random.get_state()
    try:
        with accelerator.same_random_numbers(accelerator.device()):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(array_state)
