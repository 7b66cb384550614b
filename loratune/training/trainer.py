"""The training loop: `transformers.Trainer` with this package's batches, callbacks and checkpoints."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loratune.codes import Code
from loratune.config import AUTO, TrainingSection
from loratune.errors import Problem, ResourceError, is_out_of_memory
from loratune.events import TrainingEvent, emit
from loratune.lora import tensors
from loratune.lora.parameters import choose_optimizer
from loratune.system import launcher
from loratune.training.best_step import BestStep
from loratune.training.callbacks import (
    CheckpointCallback,
    EventCallback,
    NonFiniteGuard,
    OomDryRun,
    StepTimer,
    StopCallback,
    check_final_loss,
)
from loratune.training.outcome import Outcome
from loratune.training.run_context import RunContext, TrainingJob
from loratune.training.run_trainer import NoStepLeft, RunTrainer
from loratune.training.upstream import exclude_from_ddp, use_one_gpu

_NEVER = 2**31 - 1
"""More steps than are ever taken."""
_HARMLESS_RATE = 1e-9
"""A learning rate at which a few steps change next to nothing."""


class OutOfMemory(ResourceError):
    """A step, or an evaluation, needs more memory than there is."""

    def __init__(self, position: str, *, evaluating: bool):
        super().__init__(Problem(Code.SYSTEM_OUT_OF_MEMORY, f"out of memory {position}"))
        self.evaluating = evaluating


def training_arguments(
    section: TrainingSection, checkpoints: Path, *, has_validation: bool, experts: bool = False, bfloat16: bool = False
) -> TrainingArguments:
    """The upstream arguments of a run.

    Args:
        section: The config.
        checkpoints: Where checkpoints go.
        has_validation: Whether there are validation rows.
        experts: Whether a step may leave some of the trained weights unused.
        bfloat16: Whether DeepSpeed is to keep the base in bfloat16; otherwise it makes it float32.
    """
    unused = ["num_train_epochs"] if section.num_train_epochs == AUTO else []  # max_steps sets the length
    return TrainingArguments(
        output_dir=str(checkpoints),
        **section.model_dump(exclude={"keep", "max_minutes", "objective", "patience", "report_to", *unused}),
        per_device_eval_batch_size=section.per_device_train_batch_size,
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        eval_strategy="steps" if has_validation and section.eval_steps else "no",
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show a NaN loss as 0.0
        ddp_find_unused_parameters=experts,
        ddp_broadcast_buffers=False,  # buffers such as rotation angles are the same in all processes
        remove_unused_columns=False,
        bf16=bfloat16,
        use_cpu=not torch.accelerator.is_available(),  # otherwise accelerate takes many processes for one
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def fit(job: TrainingJob, context: RunContext, *, oom_dry_run: bool = True) -> Outcome:
    """Train the trainable weights of the job's model in place.

    Args:
        job: What is trained.
        context: Checkpoints and processes.
        oom_dry_run: Whether the largest batch is computed before all others, so that a lack of memory shows at once.

    Raises:
        NumericError: A loss, gradient or weight is not finite; at most one step after it became so.
        OutOfMemory: A batch needs more memory than there is.
        ResourceError: The disk is full.
        KeyboardInterrupt: The run was stopped, after a checkpoint.
    """
    watchers = [
        EventCallback(at_evaluations=job.training.patience is not None),
        StopCallback(context.stopping),
        CheckpointCallback(context.after_checkpoint),
        *context.trackers,
    ]
    trainer = _build(job, context, watchers, oom_dry_run=oom_dry_run)
    trainer.began = time.monotonic()
    try:
        with _out_of_memory_placed(trainer):
            with suppress(NoStepLeft):
                trainer.train(resume_from_checkpoint=str(context.resume_from) if context.resume_from else None)
            seconds = trainer.seconds
            if job.validation is not None and not context.stopping():
                trainer.evaluate_once()
        context.check_not_stopping()
    finally:
        emit(TrainingEvent(trainer.state.max_steps, trainer.state.global_step, finished=True))
        for tracker in context.trackers:
            tracker.end()
    trainer.put_back_best()
    if not context.stopping():  # The model is still accelerated here; afterwards its logits can need more memory.
        check_final_loss(job.model, job.train, job.objective, context.checkpoints, trainer.state.global_step)
    return trainer.outcome(seconds)


def time_steps(job: TrainingJob, context: RunContext, timer: StepTimer, *, oom_dry_run: bool) -> None:
    """Time the first micro-steps of a run and one checkpoint, then restore everything.

    The learning rate is next to nothing, so that no step can diverge. Trained weights are put back; optimizer and
    checkpoint are dropped; the next trainer seeds the random generators anew.

    Args:
        job: What is trained; of the validation batches only the largest is computed, in the dry run.
        context: Checkpoints and processes. Nothing of it reports.
        timer: Takes the times, and ends the steps.
        oom_dry_run: As in `fit`.

    Raises:
        NumericError, OutOfMemory, ResourceError: As `fit`, because of the base or the batches.
    """
    unwatched = {"eval_steps": None, "patience": None, "save_steps": _NEVER, "logging_steps": _NEVER}
    short = {
        "max_steps": _NEVER,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.0,
    }
    changed = job.training.model_copy(update={"learning_rate": _HARMLESS_RATE, **unwatched, **short})
    before, start = tensors.full_weights(job.model), time.monotonic()
    trainer = _build(replace(job, training=changed), context, [timer], oom_dry_run=oom_dry_run)
    timer.setup = time.monotonic() - start
    with _out_of_memory_placed(trainer):
        trainer.train()
    if not context.stopping():
        timer.checkpoint = trainer.checkpoint_seconds()
    trainer.accelerator.free_memory()
    tensors.restore(job.model, before)


@contextmanager
def _out_of_memory_placed(trainer: RunTrainer) -> Iterator[None]:
    """Raises OutOfMemory: memory ran out inside; the error says at which batch."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(trainer.position(), evaluating=trainer.evaluating) from None


def _build(
    job: TrainingJob, context: RunContext, watchers: Sequence[TrainerCallback], *, oom_dry_run: bool
) -> RunTrainer:
    section, model, train, validation = job.training, job.model, job.train, job.validation
    guard = NonFiniteGuard(context.checkpoints, context.group, replace(context.unreported), job.objective)
    dry_run = OomDryRun(guard)
    arguments = training_arguments(
        section.model_copy(update={"per_device_train_batch_size": train.size}),
        context.checkpoints.directory,
        has_validation=validation is not None,
        experts=any("expert" in name for name, parameter in model.named_parameters() if parameter.requires_grad),
        bfloat16=launcher.sharding() == "deepspeed" and model.dtype == torch.bfloat16,
    )
    use_one_gpu(arguments)
    default = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    exclude_from_ddp(model, [*frozen, *(name for name, _ in model.named_buffers())])
    trainer = RunTrainer(
        context,
        train,
        guard,
        BestStep(keep=section.keep == "best", patience=section.patience, record=context.evaluations),
        model=model,
        args=arguments,
        optimizer_cls_and_kwargs=choose_optimizer(model, job.lora, default, section.weight_decay),
        train_dataset=train.items,
        eval_dataset=validation,
        data_collator=train.collate,
        compute_loss_func=partial(guard.loss, model),
        callbacks=[guard, dry_run, *watchers],
    )
    trainer.remove_callback(PrinterCallback)  # Trainer adds it where its own progress bar is off
    guard.norm = trainer.gradient_norm
    dry_run.run = partial(trainer.before_first_step, validation, oom_dry_run)
    if context.group.rank:
        torch.manual_seed(section.seed + context.group.rank)  # processes draw different dropout masks
    return trainer
