"""Undocumented parts of other libraries that this package uses.

Each such name stands here once, with the reason why no documented one serves; tests/test_upstream_training.py names
those that a release takes away.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback


def exclude_from_ddp(model: nn.Module, names: list[str]) -> None:
    """Leave parameters and buffers, by their names, out of what `DistributedDataParallel` sends to other processes.

    The frozen base is the same in all of them. DDP has no argument for it; its source calls this a preliminary API.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, names
    )


def default_store() -> Any:
    """The store in which the processes of the default group have met.

    Values can be looked at in it without a collective. Its address is documented, its prefix is not.
    """
    return distributed_c10d._get_default_store()


def set_collective_timeout(timeout: timedelta) -> None:
    """Set the timeout of collectives of the default group, which is made before the configuration is known.

    The documented argument is one of `init_process_group`.
    """
    distributed_c10d._set_pg_timeout(timeout)


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep Trainer from wrapping the model in `DataParallel` where a process sees several GPUs.

    `n_gpu` is documented, but as a property that cannot be set.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def scale_learning_rates(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply all learning rates of an optimizer, and of the scheduler that was loaded with it, by a factor.

    A scheduler computes its rates from `initial_lr` and `base_lrs`, which are documented as attributes only. It returns
    the list of its last rates itself, not a copy of it.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] *= factor
        group["lr"] *= factor
    for rates in (scheduler.base_lrs, scheduler.get_last_lr()):
        rates[:] = [rate * factor for rate in rates]


def discard_deepspeed_step(engine: Any) -> None:
    """Forget the gradients of the last micro-step of a DeepSpeed engine, and that there was one.

    The engine counts micro-steps to know when gradients are accumulated, and has no documented way back.
    """
    engine.optimizer.zero_grad()
    engine.micro_steps -= 1


class TensorBoard(TensorBoardCallback):
    """The integration of TensorBoard, with a directory for its files.

    Upstream's own is within that of the checkpoints, which are removed. Its documented argument is a writer, but that
    is made once it is known from which step on a resumed run replaces what was written.
    """

    logging_dir: str | None

    def __init__(self, directory: Path):
        """directory: for the files; TENSORBOARD_LOGGING_DIR takes precedence."""
        super().__init__()
        self.logging_dir = self.logging_dir or str(directory)
        self._next_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, also of a resumed run."""
        self._next_step = state.global_step + 1 if state.global_step else None
        super().on_train_begin(args, state, control, **kwargs)

    def _init_summary_writer(self, args: Any) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self._next_step)


class HookedTrainer(Trainer):
    """A Trainer whose private steps have public names, which subclasses override.

    Trainer has no documented way to write a checkpoint elsewhere, or in another form. Its callbacks are called around
    these steps, and cannot replace them.
    """

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed trains the model."""
        return bool(self.is_deepspeed_enabled)

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP shards the model."""
        return bool(self.is_fsdp_enabled)

    def notify_evaluation(self, metrics: dict[str, float]) -> None:
        """Call `on_evaluate` of all callbacks, as an `evaluate` that replaces Trainer's has to do."""
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of the data loader as it goes into the model."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.prepare_inputs(inputs)

    def checkpoint_parent(self) -> str:
        """The directory in which a checkpoint is written under its name."""
        return str(super()._get_output_dir(None))

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoint_parent()

    def save_checkpoint(self, model: Any) -> None:
        """Write a whole checkpoint."""
        super()._save_checkpoint(model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint(model)

    def save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the states of the optimizer and the scheduler to a checkpoint."""
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_optimizer_and_scheduler(output_dir)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the states of the optimizer and the scheduler; without a checkpoint, nothing is done."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer_and_scheduler(checkpoint)

    def save_random_state(self, output_dir: str) -> None:
        """Write the state of the random generators of this process to a checkpoint."""
        super()._save_rng_state(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self.save_random_state(output_dir)

    def load_random_state(self, checkpoint: str | None) -> None:
        """Restore the state of the random generators; without a checkpoint, nothing is done."""
        super()._load_rng_state(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_random_state(checkpoint)

    def load_weights(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Restore the trained weights."""
        super()._load_from_checkpoint(checkpoint, model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint, model)
