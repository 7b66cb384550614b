"""Section + model + datasets → `transformers.Trainer`, its callbacks and checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loratune.config import TrainingSection
from loratune.errors import NumericError, Problem
from loratune.kernels import global_norm, next_token_loss
from loratune.trainer.checkpoints import seal


class Batches(Protocol):
    """A set of rows as it is iterated. items: rows, or lists of them; size: items of a batch; collate: items → a batch
    of tensors; flat: the rows of a batch stand end to end, without padding."""

    items: Any
    size: int
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    flat: bool


OptimizerChoice = tuple[type[torch.optim.Optimizer], dict[str, Any]]
"""A class and its keywords."""


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
        save_total_limit=2,
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
    checkpoints: Path,
    progress: Progress,
    resume_from: Path | None = None,
    optimizer: Callable[[OptimizerChoice], OptimizerChoice] = lambda plain: plain,
) -> Outcome:
    """Train the trainable weights of `model` in place.

    optimizer: from the optimizer that the section names to the one
    that is used, for variants with parameter groups of their own. Raises NumericError: a loss, gradient or weight that
    is not finite, within one step of it.
    """
    guard = _Guard()
    drawn = section.model_copy(update={"per_device_train_batch_size": train.size})
    settings = arguments(drawn, checkpoints, evaluated=validation is not None, padded=not train.flat)
    trainer = _Trainer(
        model=model,
        args=settings,
        optimizer_cls_and_kwargs=optimizer(Trainer.get_optimizer_cls_and_kwargs(settings, model)),
        train_dataset=train.items,
        eval_dataset=validation,
        data_collator=train.collate,
        compute_loss_func=guard.loss,
        callbacks=[guard, _Sealer(checkpoints), _Reporter(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # Trainer adds it where its own bars are off; `progress` shows the run
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = time.monotonic() - start
        final = trainer.evaluate() if validation is not None else None
    finally:
        progress.stop()
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    return Outcome(
        steps=trainer.state.global_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        held_out_loss=final["eval_loss"] if final else None,
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
def held_out_loss(model: PreTrainedModel, rows: Batches, most: int | None = None) -> Loss:
    """The loss over all learnt tokens of the first `most` items, each token counting once however they are batched."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    items = len(rows.items) if most is None else min(most, len(rows.items))
    for start in range(0, items, rows.size):
        batch = rows.collate([rows.items[number] for number in range(start, min(start + rows.size, items))])
        labels = batch.pop("labels").to(model.device)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
        loss, count = next_token_loss(logits, labels)
        total, tokens = total + loss.item(), tokens + int(count)
    model.train(was_training)
    return Loss(total, tokens)


class _Trainer(Trainer):
    """Trainer whose evaluation is a mean over tokens; upstream's is a mean over batches."""

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        loss = held_out_loss(self.model, eval_dataset if eval_dataset is not None else self.eval_dataset)
        metrics = {f"{metric_key_prefix}_loss": loss.mean}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without a cache, which a model would otherwise make, and then take rows that stand end to end for one."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared | {"use_cache": False}


class _Guard(TrainerCallback):
    """The loss of every micro-step, and the stop as soon as a number is not finite."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """The summed loss over the learnt tokens of the whole optimizer step: accumulation changes nothing."""
        total, count = next_token_loss(outputs.logits, labels)
        value = total / (count if num_items_in_batch is None else num_items_in_batch)
        self.sum = value.detach() if self.sum is None else self.sum + value.detach()
        return value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the weights take anything on. One transfer from the device per optimizer step."""
        norm = global_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert self.sum is not None
        loss, norm = torch.stack([self.sum.float(), norm.to(self.sum.device).float()]).tolist()
        self.sum = None
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not abs(value) < float("inf"):
                fix = "lower training.learning_rate, or train in float32" if state.global_step else "is the base sound?"
                raise NumericError(Problem(f"the {name} of step {state.global_step + 1} is {value}", fix=fix))


class _Sealer(TrainerCallback):
    """Marks each checkpoint as whole once its last file is written."""

    def __init__(self, checkpoints: Path):
        self.checkpoints = checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(self.checkpoints / f"checkpoint-{state.global_step}")


class _Reporter(TrainerCallback):
    """Tells a `Progress` what the trainer does."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen_before = int(state.num_input_tokens_seen)
        self.progress.start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss is the one that the run is known by
        self.progress.step(state.global_step, int(state.num_input_tokens_seen) - self.seen_before)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.progress.log(state.global_step, logs or {})
