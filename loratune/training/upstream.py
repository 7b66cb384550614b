"""Trainer's arguments, and undocumented names of other libraries that training uses, each with the reason why no
documented one is sufficient.

tests/test_upstream_training.py fails if a release removes one.
"""

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from loratune.config import AUTO, TrainingSection
from loratune.kernels import full_tensor, global_norm
from loratune.lora import tensors
from loratune.system import accelerator
from loratune.system.launcher import Group

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""The names that Trainer gives these files."""


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


_OWN_KEYS = {"keep", "max_minutes", "objective", "patience", "report_to"}
"""Keys of the section that are not arguments of upstream's, or are passed in another way."""


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
    unused = {"num_train_epochs"} if section.num_train_epochs == AUTO else set()  # max_steps sets the length
    return TrainingArguments(
        output_dir=str(checkpoints),
        **section.model_dump(exclude=_OWN_KEYS | unused),
        per_device_eval_batch_size=section.per_device_train_batch_size,
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        eval_strategy="steps" if has_validation and section.eval_steps else "no",
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show a NaN loss as 0.0
        ddp_find_unused_parameters=experts,
        ddp_broadcast_buffers=False,  # buffers such as rotation angles are the same in all processes
        remove_unused_columns=False,
        bf16=bfloat16,
        use_cpu=not accelerator.has_gpu(),  # otherwise accelerate takes many processes for one
        dataloader_pin_memory=accelerator.has_gpu(),
        disable_tqdm=True,
        log_level_replica="passive",  # its default would let the other processes log warnings
        report_to="none",
    )


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


class CheckpointTrainer(Trainer, ABC):
    """A Trainer whose batches and checkpoints are those of the run, with the same files however weights are sharded.

    Trainer has no documented way to do so: its callbacks are called around the steps that are overridden here. The main
    process writes all files; with ZeRO-3, DeepSpeed's own are beside them.

    Attributes:
        group: The processes of the run.
    """

    group: Group

    @property
    @abstractmethod
    def rate_factor(self) -> float:
        """What a resumed run multiplies its learning rates by."""

    @abstractmethod
    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the model for a batch."""

    @abstractmethod
    def writing_checkpoint(self) -> AbstractContextManager[Any]:
        """A context inside of which the files of a checkpoint are written to `checkpoint_directory`."""

    @abstractmethod
    def restore_weights(self, checkpoint: Path) -> None:
        """Restore the trained weights from a checkpoint, each process its shard of them; not called with DeepSpeed."""

    @property
    @abstractmethod
    def checkpoint_directory(self) -> Path:
        """Where a checkpoint is written until it is whole."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.model_inputs(inputs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_directory)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.writing_checkpoint():
            super()._save_checkpoint(model, trial)

    def save_checkpoint(self) -> None:
        """Write a checkpoint now; documented are only the steps after which Trainer does so."""
        self._save_checkpoint(self.model_wrapped, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore_weights(Path(resume_from_checkpoint))

    # Gradients

    def gradient_norm(self) -> torch.Tensor:
        """The norm over all gradients of an optimizer step, as a scalar."""
        if self.is_deepspeed_enabled:  # which does not leave the gradients at the parameters
            return torch.tensor(float(self.model_wrapped.get_global_grad_norm()), device=self.args.device)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return global_norm([gradient for gradient in gradients if gradient is not None])

    def dry_run_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Compute forward and backward of a batch, and discard the gradients."""
        if not self.is_deepspeed_enabled:
            self.training_step(self.model_wrapped, batch, None)
            self.model.zero_grad()
            return
        self.accelerator.sync_gradients = False  # or accelerate's backward would take an optimizer step
        self.training_step(self.model_wrapped, batch, None)
        self.model_wrapped.optimizer.zero_grad()
        self.model_wrapped.micro_steps -= 1  # DeepSpeed counts them, and has no documented way back
        self.accelerator.sync_gradients = True

    # Optimizer and scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the states of optimizer and scheduler, gathered from all processes."""
        if self.is_deepspeed_enabled:
            self._gather_files(output_dir, super()._save_optimizer_and_scheduler)
        elif not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            state = self.optimizer.state_dict()
            values = {number: _whole(entry) for number, entry in state["state"].items()}
            if self.group.main:
                torch.save(state | {"state": values}, Path(output_dir) / OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the states of optimizer and scheduler, each process its shard of them. Nothing is done for None."""
        if self.is_fsdp_enabled and checkpoint is not None:
            self._load_shards(checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.rate_factor != 1:
            scale_learning_rates(self.optimizer, self.lr_scheduler, self.rate_factor)

    def _load_shards(self, checkpoint: str) -> None:
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, entry in state["state"].items():
            entry |= {
                name: tensors.distribute_like(value, parameters[number])
                for name, value in entry.items()
                if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            }
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    # Random states

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random states of all processes."""
        if self.group.count == 1:
            super()._save_rng_state(output_dir)
        else:
            self._gather_files(output_dir, super()._save_rng_state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random states if the run has as many processes as before; otherwise seed new ones."""
        if checkpoint is not None and len(list(Path(checkpoint).glob("rng_state*.pth"))) != self.group.count:
            torch.manual_seed(self.args.seed + self.group.rank + (self.state.global_step << 16))
            return
        super()._load_rng_state(checkpoint)

    def _gather_files(self, output_dir: str, save: Callable[[str], None]) -> None:
        """Let each process save to a temporary directory of its own, and the main process write the files of all."""
        with TemporaryDirectory() as directory:
            save(directory)
            paths = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()]
            own = [[str(path.relative_to(directory)), b64encode(path.read_bytes()).decode()] for path in paths]
            files = self.group.all_gather(own)
        for name, content in chain.from_iterable(files) if self.group.main else ():
            path = Path(output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b64decode(content))


def _whole(entry: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of one parameter, with whole tensors on the CPU."""
    return {
        name: full_tensor(value).cpu() if isinstance(value, torch.Tensor) else value for name, value in entry.items()
    }
