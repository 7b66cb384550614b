"""The Trainer of a run: it evaluates by tokens, keeps the best step, and writes checkpoints that are whole."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loratune.codes import Code
from loratune.compare.engine import ScoringPass
from loratune.compare.losses import RowLosses
from loratune.data.packing import BatchLayout
from loratune.errors import Problem, ResumeError
from loratune.lora import tensors
from loratune.system import launcher
from loratune.training.best_step import BestStep
from loratune.training.callbacks import NonFiniteGuard, Pace, diverged_error
from loratune.training.checkpoints.store import check_tensors
from loratune.training.curve import SECONDS, thinned, without_held_out
from loratune.training.outcome import CURVE_KEYS, Outcome
from loratune.training.run_context import RunContext
from loratune.training.sampling import DistributedBatchSampler, Loader, count_tokens
from loratune.training.sharded_trainer import ShardedTrainer
from loratune.training.upstream import scale_learning_rates


class NoStepLeft(Exception):
    """The run ends where it is resumed. Trainer would take a step at least, if that is in the middle of an epoch."""


class _EvaluationStopped(Exception):
    """The run was stopped while it was evaluating."""


class RunTrainer(ShardedTrainer):
    """A Trainer that writes whole checkpoints, and whose held-out loss is a mean over tokens, not over batches."""

    def __init__(
        self, context: RunContext, batches: BatchLayout, guard: NonFiniteGuard, best: BestStep, **arguments: Any
    ):
        self.context, self.batches, self.guard, self.group = context, batches, guard, context.group
        self.best = best
        self.shape: tuple[int, ...] = ()
        self.evaluating, self.pace, self.began = False, Pace(), time.monotonic()
        super().__init__(**arguments)
        self.add_callback(self.pace)

    def get_train_dataloader(self) -> Loader:
        """The batches of this process."""
        sampler = DistributedBatchSampler(len(self.batches.items), self.batches.size, self.args.seed, self.group)
        return Loader(self.batches.items, sampler, self.batches.collate, pin_memory=self.args.dataloader_pin_memory)

    def before_first_step(self, validation: ScoringPass | None, oom_dry_run: bool) -> None:
        """Check that steps are left, dry-run the largest batches if that is wanted, and evaluate if that is due.

        An evaluation is due where the run was stopped during one. Nothing of a dry run stays.

        Raises:
            ResumeError: More steps were taken than the config asks for, or none is left for a new learning rate.
            NoStepLeft: All steps were taken, patience is at its end, or the evaluation was stopped.
        """
        done, steps = self.state.global_step, self.state.max_steps
        if done > steps:
            what = f"the run has taken {done} steps, but only {steps} are set"
            fix = "set more, or start with --overwrite"
            raise ResumeError(Problem(Code.RESUME_CHANGED, what, key="training", fix=fix))
        if self.context.resume_from is not None:
            self.best.load(self.context.resume_from, done)
        if self.context.has_other_validation:
            self.state.log_history = without_held_out(self.state.log_history)
        if done == steps or self.best.is_exhausted:
            raise self._end(done, steps)
        if done == 0:
            self.guard.objective.check_start(self.model, self._first_batch)
        if oom_dry_run:
            batch = self.batches.collate([self.batches.items[number] for number in self.batches.heaviest()])
            with torch.random.fork_rng():
                self.dry_run_step(batch)
        if validation is None:
            return
        if oom_dry_run:
            self._held_out_loss(validation.heaviest())
        if self.args.eval_strategy == "steps" and done and done % self.state.eval_steps == 0:
            self.evaluate_once()
            if self.context.stopping():
                raise NoStepLeft
            if self.best.is_exhausted:
                raise self._end(done, steps)

    def _first_batch(self) -> dict[str, Any]:
        """The first batch of the run; no random number is drawn for it."""
        with torch.random.fork_rng():
            batch: dict[str, Any] = next(iter(self.get_train_dataloader()))
            return batch

    def _end(self, done: int, steps: int) -> Exception:
        """What ends a run that is resumed behind its last step: an error if the user expects more of it."""
        if self.context.learning_rate_factor == 1:
            return NoStepLeft()
        what = f"the run has taken all its {steps} steps, so a new learning rate has no effect"
        fix = "change it back, or set more steps with training.num_train_epochs or training.max_steps"
        if done < steps:
            what = f"patience ended the run at step {done} of {steps}, so a new learning rate has no effect"
            fix = "change it back, or raise training.patience as well"
        return ResumeError(Problem(Code.RESUME_CHANGED, what, key="training.learning_rate", fix=fix))

    def evaluate_once(self) -> None:
        """Evaluate, unless that was done at this step, and counts."""
        evaluation_steps = (entry["step"] for entry in self.state.log_history if "eval_loss" in entry)
        if self.best.record is None or self.state.global_step not in evaluation_steps:
            self.evaluate()

    def put_back_best(self) -> None:
        """Give the model the weights that become the adapter, where these are not those of the last step."""
        if (weights := self.best.kept_weights(self.state.global_step)) is not None:
            tensors.restore(self.model, weights)

    @property
    def seconds(self) -> float:
        """How long training has taken, with the time up to the checkpoint from which it is resumed."""
        return self.context.seconds_before + time.monotonic() - self.began

    def outcome(self, seconds: float) -> Outcome:
        """What the run came to. seconds: how long it took."""
        history = self.state.log_history
        losses, held_out_losses = ([entry[key] for entry in history if key in entry] for key in CURVE_KEYS)
        step, record = self.state.global_step, self.best.record
        return Outcome(
            steps=step,
            planned_steps=self.state.max_steps,
            kept_step=record.step if record and self.best.keep else step,
            keeps_best=self.best.keep,
            first_loss=losses[0],
            last_loss=losses[-1],
            last_held_out_loss=held_out_losses[-1] if held_out_losses else None,
            evaluations=record,
            tokens=int(self.state.num_input_tokens_seen),
            seconds=seconds,
            tokens_per_second=self.pace.overall(self.state),
            curve=thinned(history),
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: nothing uses the number, and upstream walks over the whole model at each micro-step for it."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report figures, and how many tokens were read."""
        means = {"loss": self.guard.losses.take_mean()} if "loss" in logs else {}
        means |= self.guard.objective.logged_of_step() if means else {}
        super().log(logs | means | self.pace.figures(logs, self.state), start_time)

    def position(self) -> str:
        """What is being computed, and the shape of its batch."""
        where = "in the evaluation after" if self.evaluating else "at"
        step = self.state.global_step + (not self.evaluating)
        return f"{where} step {step}, on a batch of {' x '.join(map(str, self.shape))} tokens"

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Compute the held-out loss, and take note of it. Raises NumericError: it is not finite."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        try:
            loss = self._held_out_loss(rows).loss
        except _EvaluationStopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if not abs(loss) < float("inf"):
            what = f"the held-out loss after step {self.state.global_step} is {loss}"
            fix = "lower training.learning_rate"
            problem = Problem(Code.TRAINING_NOT_FINITE, what, key="data.validation", fix=fix)
            raise diverged_error(problem, self.context.checkpoints, self.state.global_step)
        found = {"loss": loss, **self.guard.objective.logged()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.state.log_history = without_held_out(self.state.log_history, self.state.global_step)
        self.log(dict(metrics))
        self.notify_evaluation(metrics)
        self.best.add(self.state.global_step, loss, partial(tensors.full_weights, self.model))
        if self.best.is_exhausted:
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _held_out_loss(self, rows: ScoringPass) -> RowLosses:
        self.evaluating = True
        losses = self.guard.objective.score(self.model, rows, self._before_batch, self.group)
        self.evaluating = False
        return losses

    def _before_batch(self, batch: dict[str, torch.Tensor]) -> None:
        if self.context.stopping():
            self.evaluating = False
            raise _EvaluationStopped
        self.shape = tuple(batch["input_ids"].shape)

    def prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as it goes into the model, without a cache.

        With a key-value cache, which a model uses by default, it would treat packed rows as one row.
        """
        self.guard.tokens += count_tokens(inputs)
        prepared = super().prepare_inputs(inputs)
        self.shape = tuple(prepared["input_ids"].shape)
        self.guard.objective.expect(self.model, prepared)
        return prepared | {"use_cache": False}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-steps of an optimizer step, and what its loss is divided by."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.guard.objective.begin_step(self.model, batches, count, self.group)

    def checkpoint_parent(self) -> str:
        """Where the trainer writes a checkpoint before it is whole."""
        return str(self.context.checkpoints.unfinished)

    def save_checkpoint(self, model: Any) -> None:
        """Write a checkpoint that is whole, or absent."""
        step, checkpoints = self.state.global_step, self.context.checkpoints
        recorded = self.best.as_json() | self.guard.losses.as_json() | {SECONDS: round(self.seconds, 3)}
        with checkpoints.writing(step, recorded) as directory:
            super().save_checkpoint(model)
            if checkpoints.is_writer:
                self.best.save(directory, step)

    def checkpoint_seconds(self) -> float:
        """How long it takes to write a checkpoint, which is removed again."""
        start = time.monotonic()
        with self.context.checkpoints.writing(self.state.global_step, is_kept=False):
            super().save_checkpoint(self.model_wrapped)
        return time.monotonic() - start

    def load_weights(self, checkpoint: str, model: Any = None) -> None:
        """Restore the trained weights. Raises ResumeError: the checkpoint holds others; PEFT loads those that fit."""
        if not launcher.sharding():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.weights(self.model).items()}
            check_tensors(Path(checkpoint), shapes)
        super().load_weights(checkpoint, model)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore optimizer and scheduler, with a new learning rate if the user has set one."""
        super().load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.context.learning_rate_factor != 1:
            scale_learning_rates(self.optimizer, self.lr_scheduler, self.context.learning_rate_factor)
