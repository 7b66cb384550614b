"""Section + model + datasets → `transformers.Trainer`, its callbacks and checkpoints."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from loratune.config import TrainingSection
from loratune.errors import Problem, ResourceError, ResumeError, is_out_of_memory
from loratune.kernels import expect
from loratune.system import launcher
from loratune.system.launcher import SINGLE_PROCESS, Group
from loratune.system.signals import Interruption, Stop, Termination
from loratune.training.callbacks import NonFiniteGuard, OomDryRun, Progress, ProgressCallback, Stopper, diverged_error
from loratune.training.checkpoints import Checkpoints
from loratune.training.sampler import DistributedBatchSampler, Loader
from loratune.training.scoring import Batches, Loss, held_out_loss
from loratune.training.sharded_trainer import ShardedTrainer


@dataclass(frozen=True)
class Run:
    """What a run is kept in and led by.

    group: the processes that share it; resume_from: a whole checkpoint; rescaled: by what its learning rates are
    multiplied; after_checkpoint: called in all processes once a checkpoint is whole, and may raise what ends the run.
    """

    checkpoints: Checkpoints
    progress: Progress
    stop: Stop = field(default_factory=Stop)
    group: Group = SINGLE_PROCESS
    resume_from: Path | None = None
    rescaled: float = 1.0
    after_checkpoint: Callable[[], None] = lambda: None

    def stopping(self) -> bool:
        """Whether any process was asked to stop. All ask at the same moment, and all of them know from then on."""
        requested = self.stop.requested
        told = self.group.total([requested is kind for kind in (Interruption, Termination)])
        self.stop.requested = Termination if told[1] else Interruption if told[0] else None
        return self.stop.requested is not None


class OutOfMemory(ResourceError):
    """A step, or an evaluation, asked for more memory than there is."""

    def __init__(self, place: str, *, evaluating: bool):
        super().__init__(Problem(f"out of memory {place}"))
        self.evaluating = evaluating


OptimizerChoice = tuple[type[torch.optim.Optimizer], dict[str, Any]]
"""A class and its keywords."""


@dataclass
class Outcome:
    """What a run came to. loss: per learnt token in nats; tokens: read in training, without padding."""

    steps: int
    first_loss: float
    last_loss: float
    held_out_loss: float | None
    tokens: int
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """Everything but the curve."""
        return {name: value for name, value in vars(self).items() if name != "curve"}


def arguments(
    section: TrainingSection, checkpoints: Path, *, evaluated: bool, experts: bool = False, bfloat16: bool = False
) -> TrainingArguments:
    """The upstream arguments of a run. evaluated: there are rows to evaluate on; experts: a step may leave some of the
    trained weights out; bfloat16: DeepSpeed is to leave the base in it, which it would otherwise make float32."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        **section.model_dump(),
        per_device_eval_batch_size=section.per_device_train_batch_size,
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        eval_strategy="steps" if evaluated and section.eval_steps else "no",
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show a NaN loss as 0.0
        ddp_find_unused_parameters=experts,
        ddp_broadcast_buffers=False,  # angles of rotations and the like, which are the same everywhere
        remove_unused_columns=False,
        bf16=bfloat16,
        use_cpu=not torch.accelerator.is_available(),  # or accelerate takes many processes for one
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def fit(
    section: TrainingSection,
    model: PreTrainedModel,
    train: Batches,
    validation: Batches | None,
    run: Run,
    optimizer: Callable[[OptimizerChoice], OptimizerChoice] = lambda plain: plain,
    *,
    rehearsed: bool = True,
) -> Outcome:
    """Train the trainable weights of `model` in place.

    rehearsed: the largest batch is tried before all others, so that memory that is short shows at once. optimizer: from
    the optimizer that the section names to the one that is used, for variants with parameter groups of their own.
    Raises NumericError: a loss, gradient or weight that is not finite, within one step of it. Raises OutOfMemory;
    ResourceError: the disk is full. Raises KeyboardInterrupt: the run was stopped, after a checkpoint.
    """
    trainer = _made(section, model, train, validation, run, optimizer, rehearsed=rehearsed)
    start = time.monotonic()
    try:
        with suppress(_Done):
            trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
        seconds = time.monotonic() - start
        if validation is not None and run.stop.requested is None:
            trainer.catch_up()
        if run.stop.requested is not None:
            raise run.stop.requested
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(trainer.place(), evaluating=trainer.evaluating) from None
    finally:
        run.progress.stop()
    return _outcome(trainer, seconds)


def _made(
    section: TrainingSection,
    model: PreTrainedModel,
    train: Batches,
    validation: Batches | None,
    run: Run,
    optimizer: Callable[[OptimizerChoice], OptimizerChoice],
    *,
    rehearsed: bool,
) -> "_Trainer":
    guard = NonFiniteGuard(run.checkpoints, run.group)
    rehearsal = OomDryRun(guard)
    settings = _settings(section, model, train, run, evaluated=validation is not None)
    _keep_apart(model)
    trainer = _Trainer(
        run,
        train,
        guard,
        model=model,
        args=settings,
        optimizer_cls_and_kwargs=optimizer(Trainer.get_optimizer_cls_and_kwargs(settings, model)),
        train_dataset=train.items,
        eval_dataset=validation,
        data_collator=train.collate,
        compute_loss_func=guard.loss,
        callbacks=[guard, rehearsal, Stopper(run.stopping), ProgressCallback(run.progress)],
    )
    trainer.remove_callback(PrinterCallback)  # Trainer adds it where its own bars are off; `progress` shows the run
    guard.norm = trainer.gradient_norm
    rehearsal.rehearse = partial(trainer.rehearse, validation, rehearsed)
    if run.group.rank:
        torch.manual_seed(section.seed + run.group.rank)  # or all would drop the same of different rows
    return trainer


def _settings(
    section: TrainingSection, model: PreTrainedModel, train: Batches, run: Run, *, evaluated: bool
) -> TrainingArguments:
    settings = arguments(
        section.model_copy(update={"per_device_train_batch_size": train.size}),
        run.checkpoints.directory,
        evaluated=evaluated,
        experts=any("expert" in name for name, one in model.named_parameters() if one.requires_grad),
        bfloat16=launcher.sharding() == "deepspeed" and model.dtype == torch.bfloat16,
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # Trainer would share batches out among all GPUs of a process
    return settings


def _outcome(trainer: Trainer, seconds: float) -> Outcome:
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    return Outcome(
        steps=trainer.state.global_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        held_out_loss=next((entry["eval_loss"] for entry in reversed(curve) if "eval_loss" in entry), None),
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        curve=curve,
    )


def _keep_apart(model: PreTrainedModel) -> None:
    """Leave what is frozen out of what DDP sends around: every process has loaded it."""
    names = [name for name, one in model.named_parameters() if not one.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


def check_sound(model: PreTrainedModel, train: Batches, checkpoints: Checkpoints, step: int) -> None:
    """See whether what the last step made still gives a loss, which no step after it has shown.

    Raises NumericError: the loss of the first rows is NaN or inf; the checkpoint of the step is gone then.
    """
    loss = held_out_loss(model, train, range(min(train.size, len(train.items))))
    if not loss.total < float("inf"):
        fix = "lower training.learning_rate"
        problem = Problem(f"after the last step the loss is {loss.mean}", key="training.learning_rate", fix=fix)
        raise diverged_error(problem, checkpoints, step)


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch without padding, and none of one that stands in for no rows, see `Loader`. The batch still lies
    in the machine's memory, so no device is waited for."""
    if not (batch["labels"] >= 0).any():
        return 0
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else int(mask.sum())


class _Done(Exception):
    """The checkpoint is that of the last step. Trainer would take one more if that is in the middle of an epoch."""


class _Stopped(Exception):
    """The user does not want to wait for the rest of an evaluation."""


class _Trainer(ShardedTrainer):
    """Trainer that writes whole checkpoints, and evaluates to a mean over tokens; upstream's is a mean over batches."""

    def __init__(self, run: Run, rows: Batches, guard: NonFiniteGuard, **arguments: Any):
        self.run, self.rows, self.guard, self.group = run, rows, guard, run.group
        self.shape: tuple[int, ...] = ()
        self.evaluating = False
        super().__init__(**arguments)

    def get_train_dataloader(self) -> Loader:
        """The batches of this process."""
        order = DistributedBatchSampler(len(self.rows.items), self.rows.size, self.args.seed, self.run.group)
        return Loader(self.rows.items, order, self.rows.collate, pinned=self.args.dataloader_pin_memory)

    def rehearse(self, validation: Batches | None, wanted: bool) -> None:
        """If it is wanted, forward and backward of the largest batch, and the largest evaluation; nothing of it stays.

        A run that was stopped in an evaluation takes it now. Raises ResumeError: more steps were taken than are asked,
        or none is left for a new learning rate. Raises _Done: all were taken.
        """
        done, steps = self.state.global_step, self.state.max_steps
        if done > steps:
            what = f"the run has taken {done} steps, and is to take {steps}"
            raise ResumeError(Problem(what, key="training", fix="ask for more, or start afresh with --overwrite"))
        if done == steps and self.run.rescaled != 1:
            what = f"the run has taken all its {steps} steps, and none is left that could take another one"
            fix = "change it back, or ask for more with training.num_train_epochs or training.max_steps"
            raise ResumeError(Problem(what, key="training.learning_rate", fix=fix))
        if done == steps:
            raise _Done
        if wanted:
            batch = self.rows.collate([self.rows.items[number] for number in self.rows.heaviest()])
            with torch.random.fork_rng():
                self.rehearsal_step(batch)
        if validation is None:
            return
        if wanted:
            self._loss(validation, validation.heaviest())
        if self.args.eval_strategy == "steps" and done and done % self.state.eval_steps == 0:
            self.catch_up()

    def catch_up(self) -> None:
        """Evaluate, unless that was done at this step."""
        known = (entry["step"] for entry in self.state.log_history if "eval_loss" in entry)
        if self.state.global_step not in known:
            self.evaluate()

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody asks; upstream's walks over the whole model at each micro-step."""
        return 0

    def place(self) -> str:
        """What is being done, and the shape of its batch."""
        what = "in the evaluation after" if self.evaluating else "at"
        step = self.state.global_step + (not self.evaluating)
        return f"{what} step {step}, on a batch of {' x '.join(map(str, self.shape))} tokens"

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        try:
            loss = self._loss(rows)
        except _Stopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if not abs(loss.mean) < float("inf"):
            what = f"the held-out loss after step {self.state.global_step} is {loss.mean}"
            problem = Problem(what, key="data.validation", fix="lower training.learning_rate")
            raise diverged_error(problem, self.run.checkpoints, self.state.global_step)
        metrics = {f"{metric_key_prefix}_loss": loss.mean}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loss(self, rows: Batches, numbers: Sequence[int] | None = None) -> Loss:
        self.evaluating = True
        loss = held_out_loss(self.model, rows, numbers, before_batch=self._go_on, group=self.run.group)
        self.evaluating = False
        return loss

    def _go_on(self, batch: dict[str, torch.Tensor]) -> None:
        if self.run.stopping():
            self.evaluating = False
            raise _Stopped
        self.shape = tuple(batch["input_ids"].shape)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without a cache, which a model would otherwise make, and then take rows that stand end to end for one."""
        self.guard.tokens += _tokens(inputs)
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        self.shape = tuple(prepared["input_ids"].shape)
        expect(self.model, prepared["labels"])
        return prepared | {"use_cache": False}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.checkpoints.unfinished)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.run.checkpoints.writing(self.state.global_step):
            super()._save_checkpoint(model, trial)
        self.run.after_checkpoint()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.run.rescaled != 1:
            for group in self.optimizer.param_groups:
                group["initial_lr"] *= self.run.rescaled
                group["lr"] *= self.run.rescaled
            for rates in (self.lr_scheduler.base_lrs, self.lr_scheduler.get_last_lr()):
                rates[:] = [rate * self.run.rescaled for rate in rates]
