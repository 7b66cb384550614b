"""What is done between the trainer's steps: numbers are guarded, the user is told and obeyed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from loratune.errors import NumericError, Problem
from loratune.kernels import global_norm, next_token_loss
from loratune.system.launcher import Group
from loratune.training.checkpoints import Checkpoints


class Progress(Protocol):
    """Whoever shows a run while it lasts."""

    def start(self, steps: int, done: int) -> None:
        """The run has this many steps, of which some are done already."""

    def step(self, done: int, tokens: int) -> None:
        """An optimizer step ended; tokens: how many the model has read in this process, without padding."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """The trainer reported: `loss`, `learning_rate`, or `eval_loss`."""

    def stop(self) -> None:
        """The run is over, for better or worse."""


class NonFiniteGuard(TrainerCallback):
    """The loss of every micro-step, and the stop as soon as a number is not finite.

    tokens: read by this process since the last optimizer step. norm: that of the gradients of a step, to be set once
    there is a trainer that knows it.
    """

    norm: Callable[[], torch.Tensor]

    def __init__(self, checkpoints: Checkpoints, group: Group) -> None:
        self.checkpoints, self.group = checkpoints, group
        self.sum: torch.Tensor | None = None
        self.tokens = 0

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """The summed loss over the learnt tokens of the whole optimizer step, of all processes: neither accumulation
        nor their number changes anything."""
        total, count = next_token_loss(outputs.logits, labels)
        value = total / (count if num_items_in_batch is None else num_items_in_batch)
        own = value.detach().clone()  # Trainer multiplies the loss in place, by the number of processes
        self.sum = own if self.sum is None else self.sum + own
        return value

    def forget(self) -> None:
        """Begin a step anew."""
        self.sum, self.tokens = None, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the weights take anything on. One transfer from the device per optimizer step."""
        norm = self.norm()
        assert self.sum is not None
        loss, norm = torch.stack([self.sum.float(), norm.to(self.sum.device).float()]).tolist()
        loss, tokens = self.group.total([loss, self.tokens])
        state.num_input_tokens_seen += int(tokens)
        self.forget()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not abs(value) < float("inf"):
                fix = "lower training.learning_rate, or train in float32" if state.global_step else "is the base sound?"
                problem = Problem(f"the {name} of step {state.global_step + 1} is {value}", fix=fix)
                raise diverged_error(problem, self.checkpoints, state.global_step)


def diverged_error(problem: Problem, checkpoints: Checkpoints, step: int) -> NumericError:
    """The error of a run whose weights after a step lead to numbers that are not finite. A checkpoint of them goes."""
    if (kept := checkpoints.forget(step)) is None:
        return NumericError(problem)
    way = f"step {kept} is kept: --resume with --allow-change training.learning_rate, or --overwrite"
    return NumericError(replace(problem, fix=f"{problem.fix}; {way}"))


def check_finite(weights: Iterable[torch.Tensor], step: int) -> None:
    """Look at the trained weights. Raises NumericError: one of them is NaN or inf."""
    if not global_norm(list(weights), math.inf).isfinite():
        what = f"step {step} made a weight of the adapter NaN or inf"
        raise NumericError(Problem(what, key="training.learning_rate", fix="lower it, or train in float32"))


class OomDryRun(TrainerCallback):
    """Takes the step of the largest batch before all others, so that memory that is short shows at once.

    rehearse: the step, to be set once there is a trainer to take it; nothing of it stays, in the guard neither.
    """

    rehearse: Callable[[], None]

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self.rehearse()
        self.guard.forget()


class Stopper(TrainerCallback):
    """Ends a run at the next step, with a checkpoint, once that is asked for.

    asked: whether any process was asked to stop; all of them call it together.
    """

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        if self.asked():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class ProgressCallback(TrainerCallback):
    """Tells a `Progress` what the trainer does."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        state.compute_steps(args, state.max_steps)  # a checkpoint brings those of the run that wrote it
        self.seen_before = int(state.num_input_tokens_seen)
        self.progress.start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss is the one that the run is known by
        self.progress.step(state.global_step, int(state.num_input_tokens_seen) - self.seen_before)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """When a loss is reported."""
        self.progress.log(state.global_step, logs or {})
