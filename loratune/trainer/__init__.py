"""Section + model + datasets → `transformers.Trainer`, its callbacks and checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from loratune.config import TrainingSection
from loratune.errors import NumericError, Problem, ResourceError, is_out_of_memory
from loratune.interrupts import Stop
from loratune.kernels import next_token_loss
from loratune.trainer.callbacks import Guard, Rehearsal, Reporter, Stopper, check_finite
from loratune.trainer.callbacks import Progress as Progress
from loratune.trainer.checkpoints import Checkpoints as Checkpoints


class Batches(Protocol):
    """A set of rows as it is iterated. items: rows, or lists of them; size: items of a batch; collate: items → a batch
    of tensors; flat: the rows of a batch stand end to end, without padding."""

    items: Any
    size: int
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    flat: bool

    def heaviest(self) -> Sequence[int]:
        """The numbers of the items that make the batch with the most tokens."""


@dataclass(frozen=True)
class Run:
    """What a run is kept in and led by.

    resume_from: a whole checkpoint; rescaled: by what its learning rates are multiplied.
    """

    checkpoints: Checkpoints
    progress: Progress
    stop: Stop = field(default_factory=Stop)
    resume_from: Path | None = None
    rescaled: float = 1.0


class OutOfMemory(ResourceError):
    """A step asked for more memory than there is."""


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


@dataclass(frozen=True)
class Loss:
    """Cross-entropy summed over `tokens` learnt tokens, in nats."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per learnt token."""
        return self.total / self.tokens


def arguments(
    section: TrainingSection, checkpoints: Path, *, evaluated: bool, padded: bool = True
) -> TrainingArguments:
    """The upstream arguments of a run. evaluated: there are rows to evaluate on; padded: batches have a mask."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        **section.model_dump(),
        per_device_eval_batch_size=section.per_device_train_batch_size,
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        eval_strategy="steps" if evaluated and section.eval_steps else "no",
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show a NaN loss as 0.0
        include_num_input_tokens_seen="non_padding" if padded else "all",
        remove_unused_columns=False,
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
) -> Outcome:
    """Train the trainable weights of `model` in place; the largest batch is tried before all others.

    optimizer: from the optimizer that the section names to the one that is used, for variants with parameter groups of
    their own. Raises NumericError: a loss, gradient or weight that is not finite, within one step of it. Raises
    OutOfMemory; ResourceError: the disk is full. Raises KeyboardInterrupt: the run was stopped, after a checkpoint.
    """
    guard = Guard(run.checkpoints)
    rehearsal = Rehearsal(guard)
    drawn = section.model_copy(update={"per_device_train_batch_size": train.size})
    settings = arguments(drawn, run.checkpoints.directory, evaluated=validation is not None, padded=not train.flat)
    trainer = _Trainer(
        run,
        model=model,
        args=settings,
        optimizer_cls_and_kwargs=optimizer(Trainer.get_optimizer_cls_and_kwargs(settings, model)),
        train_dataset=train.items,
        eval_dataset=validation,
        data_collator=train.collate,
        compute_loss_func=guard.loss,
        callbacks=[guard, rehearsal, Stopper(run.stop), Reporter(run.progress)],
    )
    trainer.remove_callback(PrinterCallback)  # Trainer adds it where its own bars are off; `progress` shows the run
    rehearsal.rehearse = partial(trainer.rehearse, train)
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
        seconds = time.monotonic() - start
        final = trainer.evaluate() if validation is not None and run.stop.asked is None else None
        if run.stop.asked is not None:
            raise run.stop.asked
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(Problem(f"out of memory at {trainer.place()}")) from None
    finally:
        run.progress.stop()
    return _outcome(trainer, final["eval_loss"] if final else None, seconds)


def _outcome(trainer: Trainer, held_out_loss: float | None, seconds: float) -> Outcome:
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    return Outcome(
        steps=trainer.state.global_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        held_out_loss=held_out_loss,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        curve=curve,
    )


def check_sound(model: PreTrainedModel, train: Batches) -> None:
    """See whether what the last step made still gives a loss, which no step after it has shown.

    Raises NumericError: the loss of the first rows is NaN or inf.
    """
    loss = held_out_loss(model, train, most=8)
    if not loss.total < float("inf"):
        fix = "lower training.learning_rate"
        raise NumericError(
            Problem(f"after the last step the loss is {loss.mean}", key="training.learning_rate", fix=fix)
        )


@torch.inference_mode()
def held_out_loss(
    model: PreTrainedModel, rows: Batches, most: int | None = None, before_batch: Callable[[], None] = lambda: None
) -> Loss:
    """The loss over all learnt tokens of the first `most` items, each token counting once however they are batched.

    Raises what `before_batch` raises.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    items = len(rows.items) if most is None else min(most, len(rows.items))
    for start in range(0, items, rows.size):
        before_batch()
        batch = rows.collate([rows.items[number] for number in range(start, min(start + rows.size, items))])
        labels = batch.pop("labels").to(model.device)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
        loss, count = next_token_loss(logits, labels)
        total, tokens = total + loss.item(), tokens + int(count)
    model.train(was_training)
    return Loss(total, tokens)


class _Stopped(Exception):
    """The user does not want to wait for the rest of an evaluation."""


class _Trainer(Trainer):
    """Trainer that writes whole checkpoints, and evaluates to a mean over tokens; upstream's is a mean over batches."""

    def __init__(self, run: Run, **arguments: Any):
        self.run = run
        self.shape: tuple[int, ...] = ()
        super().__init__(**arguments)

    def rehearse(self, train: Batches) -> None:
        """Forward and backward of the largest batch, of which nothing stays."""
        batch = train.collate([train.items[number] for number in train.heaviest()])
        with torch.random.fork_rng():
            self.training_step(self.model_wrapped, batch, None)
        self.model.zero_grad()

    def place(self) -> str:
        """The step that is being taken, and the shape of its batch."""
        return f"step {self.state.global_step + 1}, on a batch of {' x '.join(map(str, self.shape))} tokens"

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        try:
            loss = held_out_loss(self.model, rows, before_batch=self._go_on)
        except _Stopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {f"{metric_key_prefix}_loss": loss.mean}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _go_on(self) -> None:
        if self.run.stop.asked is not None:
            raise _Stopped

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without a cache, which a model would otherwise make, and then take rows that stand end to end for one."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        self.shape = tuple(prepared["input_ids"].shape)
        return prepared | {"use_cache": False}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.checkpoints.unfinished)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_finite(self.model.parameters(), self.state.global_step)
        with self.run.checkpoints.writing(self.state.global_step):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The trained weights, and no pickled arguments beside them."""
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.run.rescaled != 1:
            for group in self.optimizer.param_groups:
                group["initial_lr"] *= self.run.rescaled
                group["lr"] *= self.run.rescaled
            for rates in (self.lr_scheduler.base_lrs, self.lr_scheduler.get_last_lr()):
                rates[:] = [rate * self.run.rescaled for rate in rates]
