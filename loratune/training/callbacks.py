"""Callbacks of the trainer: they check numbers, emit events, and stop the run when a signal has asked for it."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from loratune.codes import Code
from loratune.compare.engine import Objective
from loratune.data.packing import BatchLayout
from loratune.errors import NumericError, Problem
from loratune.events import EvaluationEvent, StepEvent, TrainingEvent, emit
from loratune.kernels import global_norm
from loratune.system.launcher import Group
from loratune.training.checkpoints.store import Checkpoints
from loratune.training.curve import StepLosses


class NonFiniteGuard(TrainerCallback):
    """Computes the loss of every micro-step, and ends the run as soon as a number is not finite.

    Attributes:
        tokens: How many tokens this process has read since the last optimizer step.
        norm: Returns the norm of the gradients of a step; set once there is a trainer to compute it.
        losses: Those of the steps that were not reported yet.
        objective: What the loss is.
    """

    norm: Callable[[], torch.Tensor]

    def __init__(self, checkpoints: Checkpoints, group: Group, losses: StepLosses, objective: Objective) -> None:
        self.checkpoints, self.group, self.losses, self.objective = checkpoints, group, losses, objective
        self.sum: torch.Tensor | None = None
        self.tokens = 0

    def loss(
        self, model: Any, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The summed loss of a micro-step, divided by the supervised tokens of the whole optimizer step, or its pairs.

        These are counted over all processes, so neither accumulation nor the number of processes changes the result.

        Args:
            model: What is trained.
            outputs: What it gives.
            labels: Of shape (rows, length), -100 where a token is not supervised.
            num_items_in_batch: What `Objective.begin_step` counts of the step; that of the micro-step if not given.
        """
        total, count = self.objective.total(model, outputs.logits, labels)
        value = total / (count if num_items_in_batch is None else num_items_in_batch)
        own = value.detach().clone()  # Trainer multiplies the loss in place, by the number of processes
        self.sum = own if self.sum is None else self.sum + own
        return value

    def reset(self) -> None:
        """Forget the micro-steps since the last optimizer step."""
        self.sum, self.tokens = None, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check loss and gradients before they change the weights. One transfer from the device per optimizer step."""
        norm = self.norm()
        assert self.sum is not None
        loss, norm = torch.stack([self.sum.float(), norm.to(self.sum.device).float()]).tolist()
        loss, tokens = self.group.total([loss, self.tokens])
        state.num_input_tokens_seen += int(tokens)
        self.reset()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not abs(value) < float("inf"):
                fix = "lower training.learning_rate, or train in float32"
                if not state.global_step:
                    fix = "check that the base model works by itself"
                what = f"the {name} of step {state.global_step + 1} is {value}"
                problem = Problem(Code.TRAINING_NOT_FINITE, what, fix=fix)
                raise diverged_error(problem, self.checkpoints, state.global_step)
        self.losses.add(loss)


def diverged_error(problem: Problem, checkpoints: Checkpoints, step: int) -> NumericError:
    """The error of a run whose weights after a step lead to numbers that are not finite.

    The checkpoint of that step is removed.
    """
    if (earlier := checkpoints.discard(step)) is None:
        return NumericError(problem)
    resume = "--resume --allow-change training.learning_rate"
    continuation = f"step {earlier} is kept: continue from there with {resume}, or start afresh with --overwrite"
    return NumericError(replace(problem, fix=f"{problem.fix}; {continuation}"))


def check_finite(weights: Iterable[torch.Tensor], step: int) -> None:
    """Check the trained weights.

    Raises:
        NumericError: One of them is NaN or inf.
    """
    if not global_norm(list(weights), math.inf).isfinite():
        what, fix = f"step {step} made a weight of the adapter NaN or inf", "lower it, or train in float32"
        raise NumericError(Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix=fix))


def check_final_loss(
    model: PreTrainedModel, train: BatchLayout, objective: Objective, checkpoints: Checkpoints, step: int
) -> None:
    """Check that the model gives a finite loss after the last step, which no later step has shown.

    Raises:
        NumericError: The loss of the first rows is NaN or inf. The checkpoint of the step is removed then.
    """
    loss = objective.losses(model, train, [range(min(train.size, len(train.items)))]).loss
    if not loss < float("inf"):
        what, fix = f"after the last step the loss is {loss}", "lower training.learning_rate"
        problem = Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix=fix)
        raise diverged_error(problem, checkpoints, step)


class OomDryRun(TrainerCallback):
    """Computes the largest batch before all others, so that a lack of memory shows at once.

    Attributes:
        run: Computes it; set once there is a trainer to do so. Afterwards model, trainer and guard are as before.
    """

    run: Callable[[], None]

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self.run()
        self.guard.reset()


class StopCallback(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, once that is asked for.

    stopping: whether any process was asked to stop; all of them call it together.
    """

    def __init__(self, stopping: Callable[[], bool]):
        self.stopping = stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        if self.stopping():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class EventCallback(TrainerCallback):
    """Emits events of what the trainer does.

    at_evaluations: whether the loss is reported at each evaluation too, since any may be the end of the run.
    """

    def __init__(self, *, at_evaluations: bool = False):
        self.at_evaluations = at_evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        state.compute_steps(args, state.max_steps)  # a checkpoint brings those of the run that wrote it
        self.tokens_before = int(state.num_input_tokens_seen)
        emit(TrainingEvent(state.max_steps, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step. A step whose loss is reported has its event then."""
        if state.global_step >= state.max_steps or (self.at_evaluations and control.should_evaluate):
            control.should_log = True  # the last loss is reported as the result of the run
        if not control.should_log:
            self._emit_step(state, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """When a loss is reported."""
        values = logs or {}
        if "eval_loss" in values:
            metrics = {name: values[f"eval_{name}"] for name in _METRICS if f"eval_{name}" in values}
            emit(EvaluationEvent(state.global_step, state.max_steps, values["eval_loss"], metrics))
        elif "loss" in values:
            self._emit_step(state, values)

    def _emit_step(self, state: Any, values: Mapping[str, float]) -> None:
        tokens = int(state.num_input_tokens_seen) - self.tokens_before
        metrics = {name: values[name] for name in _METRICS if name in values}
        loss, rate = values.get("loss"), values.get("learning_rate")
        emit(StepEvent(state.global_step, state.max_steps, tokens, loss, rate, metrics))


_METRICS = ("reward_accuracy", "reward_margin")
"""Metrics of preferences that the trainer logs beside the loss."""


class CheckpointCallback(TrainerCallback):
    """Calls a function after each checkpoint."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint."""
        self.function()


class StepTimer(TrainerCallback):
    """Times the micro-steps of a run that accumulates nothing, and ends it when there are enough of them.

    Attributes:
        is_enough: From the number of micro-steps to whether the run ends; all processes call it together.
        micro_steps: Seconds of each, without those of the optimizer.
        optimizer: Seconds of the optimizer after each.
        setup: Seconds that it takes to set up the trainer.
        checkpoint: Seconds that a checkpoint takes.
    """

    def __init__(self, is_enough: Callable[[int], bool]):
        self.is_enough = is_enough
        self.micro_steps: list[float] = []
        self.optimizer: list[float] = []
        self.setup = self.checkpoint = self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self.start = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the gradients of a step."""
        now = time.monotonic()
        self.micro_steps.append(now - self.start)
        self.start = now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        now = time.monotonic()
        self.optimizer.append(now - self.start)
        self.start = now
        control.should_training_stop = self.is_enough(len(self.micro_steps))


class Pace(TrainerCallback):
    """Measures how fast tokens are read in training. Evaluations and checkpoints do not count."""

    def __init__(self) -> None:
        self.seconds = self.total_seconds = self.start = 0.0
        self.tokens = self.first_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self.tokens = self.first_tokens = int(state.num_input_tokens_seen)
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        now = time.monotonic()
        self.seconds += now - self.start
        self.total_seconds += now - self.start
        self.start = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an evaluation."""
        self.start = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint."""
        self.start = time.monotonic()

    def figures(self, logs: Mapping[str, float], state: Any) -> dict[str, float]:
        """What is added to a report of the trainer: the tokens that the run has read, and with a loss, how many a
        second since the report before; only the latter depends on the clock."""
        tokens = int(state.num_input_tokens_seen)
        if "loss" not in logs:
            return {"tokens": tokens}
        rate = (tokens - self.tokens) / max(self.seconds, 1e-9)
        self.tokens, self.seconds = tokens, 0.0
        return {"tokens": tokens, "tokens_per_second": round(rate, 1)}

    def overall(self, state: Any) -> float | None:
        """Tokens a second over all steps of this process; None if it took none."""
        tokens = int(state.num_input_tokens_seen) - self.first_tokens
        return round(tokens / self.total_seconds, 1) if tokens and self.total_seconds else None
