"""The training loop: `transformers.Trainer` with this package's batches, callbacks and checkpoints.

Evaluation is by tokens, the best step is kept, and checkpoints are complete or absent.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from loratune import kernels
from loratune.codes import Code
from loratune.compare.engine import ScoringPass
from loratune.compare.metrics import RowLosses
from loratune.config import TrainingSection
from loratune.errors import Problem, ResumeError, is_out_of_memory
from loratune.events import TrainingEvent, emit
from loratune.lora import attach, tensors
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.parameters import choose_optimizer
from loratune.system import accelerator, launcher
from loratune.training import callbacks
from loratune.training.batching import DistributedBatchSampler, Loader, count_tokens
from loratune.training.callbacks import BestStep, Pace, RunCallback, StepLoss, diverged_error
from loratune.training.checkpoints.store import StepLosses
from loratune.training.plan import Plan
from loratune.training.processes import SharedStop
from loratune.training.results import OutOfMemory, TrainedAdapter, thinned
from loratune.training.retention import ItemsWithTexts, RetentionTerm
from loratune.training.upstream import (
    CheckpointTrainer,
    exclude_from_ddp,
    training_arguments,
    use_one_gpu,
)


class NoStepLeft(Exception):
    """A resumed run has no steps left. Trainer would take at least one step in the middle of an epoch."""


class _EvaluationStopped(Exception):
    """The run was stopped while it was evaluating."""


def fit(plan: Plan, stop: SharedStop, *, oom_dry_run: bool = True) -> TrainedAdapter:
    """Train the trainable weights of a plan's model in place.

    Args:
        plan: The plan of the run.
        stop: Whether the run was asked to stop.
        oom_dry_run: Whether to compute the largest batch first, so that a lack of memory is detected at once.

    Returns:
        The result of training, without comparison.

    Raises:
        NumericError: A loss, gradient or weight is not finite; at most one step after it became so.
        OutOfMemory: A batch needs more memory than there is.
        ResourceError: The disk is full.
        KeyboardInterrupt: The run was stopped, after a checkpoint.
    """
    point, names = plan.resume_point, plan.training.report_to if stop.group.main else ()
    following = callbacks.trackers(names, plan.run.directory.output, is_resumed=point is not None)
    at_evaluations = plan.training.patience is not None
    watching = RunCallback(stop.is_requested, at_evaluations=at_evaluations)
    trainer = build(plan, stop, plan.training, [watching, *following], oom_dry_run=oom_dry_run)
    trainer.began = time.monotonic()
    try:
        with trainer.out_of_memory_placed():
            with suppress(NoStepLeft):
                trainer.train(resume_from_checkpoint=str(point.checkpoint) if point else None)
            seconds = trainer.seconds
            if plan.batches.held_out is not None and not stop.is_requested():
                trainer.evaluate_once()
        stop.check()
    finally:
        emit(TrainingEvent(trainer.state.max_steps, trainer.state.global_step, finished=True))
        for tracker in following:
            tracker.end()
    if (weights := trainer.best.kept_weights(trainer.state.global_step)) is not None:
        tensors.restore(plan.model, weights)
    if not stop.is_requested():  # The model is still accelerated here; afterwards its logits can need more memory.
        trainer.check_final_loss()
    return trainer.trained(seconds)


def build(
    plan: Plan, stop: SharedStop, section: TrainingSection, watchers: Sequence[TrainerCallback], *, oom_dry_run: bool
) -> "RunTrainer":
    """The trainer of a plan. section: its settings, without `auto`; other arguments as in `fit`."""
    model, batches = plan.model, plan.batches
    arguments = training_arguments(
        section.model_copy(update={"per_device_train_batch_size": batches.train.size}),
        plan.checkpoints.directory,
        has_validation=batches.held_out is not None,
        experts=any("expert" in name for name, parameter in model.named_parameters() if parameter.requires_grad),
        bfloat16=launcher.sharding() == "deepspeed" and model.dtype == torch.bfloat16,
    )
    use_one_gpu(arguments)
    default = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    exclude_from_ddp(model, [*frozen, *(name for name, _ in model.named_buffers())])
    trainer = RunTrainer(
        plan,
        stop,
        BestStep(keep=section.keep == "best", patience=section.patience, record=plan.best),
        watchers,
        oom_dry_run=oom_dry_run,
        args=arguments,
        optimizer_cls_and_kwargs=choose_optimizer(model, plan.config.lora, default, section.weight_decay),
    )
    if stop.group.rank:
        torch.manual_seed(section.seed + stop.group.rank)  # processes draw different dropout masks
    return trainer


class RunTrainer(CheckpointTrainer):
    """A Trainer that writes whole checkpoints, and whose held-out loss is a mean over tokens, not over batches."""

    def __init__(
        self,
        plan: Plan,
        stop: SharedStop,
        best: BestStep,
        watchers: Sequence[TrainerCallback],
        *,
        oom_dry_run: bool,
        **arguments: Any,
    ):
        self.plan, self.layout, self.stop, self.group, self.best = plan, plan.batches.train, stop, stop.group, best
        self.shape, self.keeps_checkpoints, self.oom_dry_run = tuple[int, ...](), True, oom_dry_run
        self.items = ItemsWithTexts(self.layout.items, plan.retention.rows() if plan.retention else ())
        self.evaluating, self.pace, self.began = False, Pace(), time.monotonic()
        point = plan.resume_point
        unreported = replace(point.record.unreported) if point and point.record.unreported else StepLosses()
        self.step_loss = StepLoss(plan.checkpoints, stop.group, unreported, plan.batches.objective)
        self.step_loss.retention = RetentionTerm.of(
            plan.retention, stop.group, point.record.divergences if point else None
        )
        self.step_loss.norm, self.step_loss.before_first_step = self.gradient_norm, self.before_first_step
        super().__init__(
            model=plan.model,
            train_dataset=self.layout.items,
            eval_dataset=plan.batches.held_out,
            data_collator=self.layout.collate,
            compute_loss_func=partial(self.step_loss.loss, plan.model),
            callbacks=[self.step_loss, *watchers, self.pace],
            **arguments,
        )
        self.remove_callback(PrinterCallback)  # Trainer adds it where its own progress bar is off

    def get_train_dataloader(self) -> Loader:
        """The batches of this process."""
        last = self.plan.schedule.steps - 1

        def texts(step: int, count: int) -> Sequence[int]:
            retention = self.plan.retention
            return retention.numbers(step, count, is_last=step == last) if retention else ()

        accumulation = self.plan.config.training.gradient_accumulation_steps  # also where single micro-steps are timed
        sampler = DistributedBatchSampler(
            len(self.layout.items), self.layout.size, self.args.seed, self.group, accumulation, texts
        )
        return Loader(self.items, sampler, self.layout.collate, pin_memory=self.args.dataloader_pin_memory)

    # Before and after the steps

    def before_first_step(self) -> None:
        """Check that steps are left, dry-run the largest batches if requested, and evaluate if an evaluation is due.

        An evaluation is due if the run was stopped during one. A dry run has no lasting effect.

        Raises:
            ResumeError: More steps were taken than configured, or no step is left for a new learning rate.
            NoStepLeft: All steps were taken, the run ended by patience, or the evaluation was stopped.
        """
        done, steps, point = self.state.global_step, self.state.max_steps, self.plan.resume_point
        if done > steps:
            what = f"the run has taken {done} steps, but only {steps} are set"
            fix = "set more, or use `overwrite=True`"
            raise ResumeError(Problem(Code.RESUME_CHANGED, what, key="training", fix=fix))
        if point is not None:
            self.best.load(point.checkpoint, done)
            if point.has_other_validation(self.plan.checkpoints.record):
                self._forget_evaluations()
        if done == steps or self.best.is_exhausted:
            raise self._end(done, steps)
        if done == 0:
            self.step_loss.objective.check_start(self.model, self._first_batch)
        if self.oom_dry_run:
            first, texts = len(self.layout.items), self.plan.retention.of_batch if self.plan.retention else 0
            heaviest = [*self.layout.heaviest(), *range(first, min(first + texts, len(self.items)))]
            batch = self.layout.collate([self.items[number] for number in heaviest])
            with accelerator.same_random_numbers(self.args.device):
                self.dry_run_step(batch)
        if (validation := self.plan.batches.held_out) is not None:
            self._evaluate_if_due(validation, done, steps)

    def _evaluate_if_due(self, validation: ScoringPass, done: int, steps: int) -> None:
        """Dry-run the largest validation batch if requested, and evaluate if due. Raises NoStepLeft."""
        if self.oom_dry_run:
            self._held_out_loss(validation.heaviest())
        if self.args.eval_strategy == "steps" and done and done % self.state.eval_steps == 0:
            self.evaluate_once()
            if self.stop.is_requested():
                raise NoStepLeft
            if self.best.is_exhausted:
                raise self._end(done, steps)

    def _first_batch(self) -> dict[str, Any]:
        """The first batch of the run; no random number is drawn for it."""
        with accelerator.same_random_numbers(self.args.device):
            batch: dict[str, Any] = next(iter(self.get_train_dataloader()))
            batch.pop("teacher", None)
            return batch

    def _forget_evaluations(self, step: int | None = None) -> None:
        """Remove the held-out loss of a step from the reports, or of all steps if none is given."""
        history = self.state.log_history
        self.state.log_history = [
            entry for entry in history if "eval_loss" not in entry or step not in (None, entry["step"])
        ]

    def _end(self, done: int, steps: int) -> Exception:
        """The exception that ends a run resumed after its last step: an error if a new learning rate was set."""
        if self.rate_factor == 1:
            return NoStepLeft()
        what = f"the run has taken all its {steps} steps, so a new learning rate has no effect"
        fix = "change it back, or set more steps with training.num_train_epochs or training.max_steps"
        if done < steps:
            what = f"patience ended the run at step {done} of {steps}, so a new learning rate has no effect"
            fix = "change it back, or raise training.patience as well"
        return ResumeError(Problem(Code.RESUME_CHANGED, what, key="training.learning_rate", fix=fix))

    @property
    def rate_factor(self) -> float:
        """What a resumed run multiplies its learning rates by."""
        return self.plan.resume_point.learning_rate_factor if self.plan.resume_point else 1.0

    def check_final_loss(self) -> None:
        """Check that the loss is finite after the last step, as no later step checks it. Raises NumericError: the loss
        of the first rows is NaN or inf. The checkpoint of the step is then removed."""
        first = range(min(self.layout.size, len(self.layout.items)))
        objective, rows = self.step_loss.objective, ScoringPass(self.layout, [first], {})
        loss = objective.row_losses(objective.read(self.model, rows)).loss
        if not loss < float("inf"):
            what, fix = f"after the last step the loss is {loss}", "lower training.learning_rate"
            problem = Problem(Code.TRAINING_NOT_FINITE, what, key="training.learning_rate", fix=fix)
            raise diverged_error(problem, self.plan.checkpoints, self.state.global_step)

    @property
    def seconds(self) -> float:
        """The duration of training, including the time up to the checkpoint from which it was resumed."""
        before = self.plan.resume_point.record.seconds if self.plan.resume_point else 0.0
        return before + time.monotonic() - self.began

    def trained(self, seconds: float) -> TrainedAdapter:
        """The result of the run. seconds: its duration."""
        return TrainedAdapter(
            config=self.plan.config,
            steps=self.state.global_step,
            planned_steps=self.state.max_steps,
            evaluations=self.best.record,
            tokens=int(self.state.num_input_tokens_seen),
            seconds=seconds,
            tokens_per_second=self.pace.overall(self.state),
            curve=thinned(self.state.log_history),
        )

    @contextmanager
    def out_of_memory_placed(self) -> Iterator[None]:
        """Raises OutOfMemory: memory ran out inside; the error says at which batch."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            where, shape = "in the evaluation after" if self.evaluating else "at", " x ".join(map(str, self.shape))
            where += f" step {self.state.global_step + (not self.evaluating)}, on a batch of {shape} tokens"
            raise OutOfMemory(where, evaluating=self.evaluating) from None

    # Evaluations

    def evaluate_once(self) -> None:
        """Evaluate, unless there is a valid evaluation at this step."""
        evaluation_steps = (entry["step"] for entry in self.state.log_history if "eval_loss" in entry)
        if self.best.record is None or self.state.global_step not in evaluation_steps:
            self.evaluate()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Compute the held-out loss, and record it. Raises NumericError: it is not finite."""
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
            raise diverged_error(problem, self.plan.checkpoints, self.state.global_step)
        found = {"loss": loss, **self.step_loss.objective.logged()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._forget_evaluations(self.state.global_step)
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.best.add(self.state.global_step, loss, partial(tensors.full_weights, self.model))
        if self.best.is_exhausted:
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _held_out_loss(self, rows: ScoringPass) -> RowLosses:
        self.evaluating = True
        losses = self.step_loss.objective.score(self.model, rows, self._before_batch, self.group)
        self.evaluating = False
        return losses

    def _before_batch(self, batch: dict[str, torch.Tensor]) -> None:
        if self.stop.is_requested():
            self.evaluating = False
            raise _EvaluationStopped
        self.shape = tuple(batch["input_ids"].shape)

    # Steps

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: upstream traverses the whole model at each micro-step for an unused number."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report metrics, and how many tokens were read; no loss if all rows since the last report have weight 0."""
        logs = {name: value for name, value in logs.items() if name != "loss" or self.step_loss.losses.steps}
        means = {"loss": self.step_loss.losses.take_mean()} if "loss" in logs else {}
        means |= self.step_loss.objective.logged(of_step=True) if means else {}
        means |= self.step_loss.retention.logged() if means and self.step_loss.retention else {}
        super().log(logs | means | self.pace.metrics(logs, self.state), start_time)

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the model for a batch, without a cache, with which packed rows would be treated as one row."""
        prepared: dict[str, Any] = kernels.to_device(batch, self.args.device)
        self.shape = tuple(prepared["input_ids"].shape)
        self.step_loss.objective.set_loss_targets(self.model, prepared)
        texts = self.step_loss.retention.set_teacher(self.model, prepared) if self.step_loss.retention else 0
        self.step_loss.tokens += max(0, count_tokens(batch) - texts)
        return prepared | {"use_cache": False}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-steps of an optimizer step, and the divisor of its loss, for a single process on the CPU."""
        device = device if self.group.count > 1 else torch.device("cpu")
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = self.step_loss.objective.begin_step(self.model, batches, count, self.group)
        self.step_loss.has_rows = bool(count != 0)
        if self.step_loss.retention is not None and self.plan.retention is not None:
            step = self.state.global_step
            weight = self.plan.retention.weight(step) if step and self.step_loss.has_rows else 0.0
            self.step_loss.retention.begin_step(batches, weight)
        return batches, 1 if isinstance(count, float) and not count else count

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, and no pickled arguments beside them. Raises NumericError: one is NaN or inf."""
        state = tensors.full_weights(self.model)
        callbacks.check_finite(state.values(), self.state.global_step)
        if self.group.main:
            attach.write(self.model, Path(str(output_dir)), state)

    @property
    def checkpoint_directory(self) -> Path:
        """Where a checkpoint is written until it is whole."""
        return self.plan.checkpoints.unfinished

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Write a checkpoint inside, which is whole or does not exist."""
        step, checkpoints = self.state.global_step, self.plan.checkpoints
        progress = {"best": self.best.record, "unreported": self.step_loss.losses, "seconds": round(self.seconds, 3)}
        progress |= {"divergences": self.step_loss.retention.steps} if self.step_loss.retention else {}
        with checkpoints.writing(step, progress, is_kept=self.keeps_checkpoints) as directory:
            yield
            if checkpoints.is_writer:
                self.best.save(directory, step)
        if self.group.main:
            self.plan.base.files.check_unchanged_in_run()

    def checkpoint_seconds(self) -> float:
        """How long it takes to write a checkpoint, which is removed again."""
        start, self.keeps_checkpoints = time.monotonic(), False
        self.save_checkpoint()
        return time.monotonic() - start

    def restore_weights(self, checkpoint: Path) -> None:
        """Restore the trained weights. Raises ResumeError: the checkpoint holds other ones; PEFT would load those that
        fit."""
        found = tensors.read_weights(checkpoint / WEIGHTS_FILE)
        own = tensors.weights(self.model)
        differing = [name for name, tensor in own.items() if name not in found or found[name].shape != tensor.shape]
        differing += [name for name in found if name not in own and ".lora_" in name]  # PEFT may add embeddings
        if differing:
            what = f"{len(differing)} tensors are not those that the run trains, among them {differing[0]}"
            fix = "its record is not the one that it was written with; start afresh with `overwrite=True`"
            raise ResumeError(Problem(Code.RESUME_CHANGED, what, str(checkpoint), fix=fix))
        tensors.restore(self.model, found)
