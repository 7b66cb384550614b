"""A Trainer whose checkpoints are the same files however weights are sharded, all written by the main process."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from loratune.kernels import full_tensor, global_norm
from loratune.lora import attach, tensors
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.tensors import distribute_like
from loratune.system.launcher import Group
from loratune.training.callbacks import check_finite
from loratune.training.upstream import HookedTrainer, discard_deepspeed_step

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # upstream's names


class ShardedTrainer(HookedTrainer):
    """A Trainer whose checkpoints are whole files; with ZeRO-3, DeepSpeed's own files stand beside them.

    Attributes:
        group: The processes of the run.
    """

    group: Group

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, and no pickled arguments beside them.

        Raises:
            NumericError: A weight is NaN or inf.
        """
        state = tensors.full_weights(self.model)
        check_finite(state.values(), self.state.global_step)
        if self.group.main:
            attach.write(self.model, Path(str(output_dir)), state)

    def gradient_norm(self) -> torch.Tensor:
        """The norm over all gradients of an optimizer step, as a scalar."""
        if self.uses_deepspeed:  # which does not leave the gradients at the parameters
            return torch.tensor(float(self.model_wrapped.get_global_grad_norm()), device=self.args.device)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return global_norm([gradient for gradient in gradients if gradient is not None])

    def dry_run_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Compute forward and backward of a batch, and discard the gradients."""
        if not self.uses_deepspeed:
            self.training_step(self.model_wrapped, batch, None)
            self.model.zero_grad()
            return
        self.accelerator.sync_gradients = False  # or accelerate's backward would take an optimizer step
        self.training_step(self.model_wrapped, batch, None)
        discard_deepspeed_step(self.model_wrapped)
        self.accelerator.sync_gradients = True

    def save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the states of optimizer and scheduler, gathered from all processes."""
        if self.uses_deepspeed:
            self._gather_files(output_dir, super().save_optimizer_and_scheduler)
        elif not self.uses_fsdp:
            super().save_optimizer_and_scheduler(output_dir)
        else:
            state = self.optimizer.state_dict()
            values = {number: _whole(entry) for number, entry in state["state"].items()}
            if self.group.main:
                torch.save(state | {"state": values}, Path(output_dir) / OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def save_random_state(self, output_dir: str) -> None:
        """Write the random states of all processes."""
        if self.group.count == 1:
            super().save_random_state(output_dir)
        else:
            self._gather_files(output_dir, super().save_random_state)

    def load_random_state(self, checkpoint: str | None) -> None:
        """Restore the random states if the run has as many processes as before; otherwise seed new ones."""
        if checkpoint is not None and len(list(Path(checkpoint).glob("rng_state*.pth"))) != self.group.count:
            torch.manual_seed(self.args.seed + self.group.rank + (self.state.global_step << 16))
            return
        super().load_random_state(checkpoint)

    def _gather_files(self, output_dir: str, save: Callable[[str], None]) -> None:
        """Let each process save to a temporary directory of its own, and the main process write the files of all."""
        with TemporaryDirectory() as directory:
            save(directory)
            files = self.group.all_gather(list(_encoded_files(Path(directory))))
        for name, content in chain.from_iterable(files) if self.group.main else ():
            path = Path(output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b64decode(content))

    def load_weights(self, checkpoint: str, model: Any = None) -> None:
        """Restore the trained weights, each process its shard of them."""
        if self.uses_fsdp:
            tensors.restore(self.model, load_file(Path(checkpoint) / WEIGHTS_FILE))
        else:
            super().load_weights(checkpoint, model)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the states of optimizer and scheduler, each process its shard of them."""
        if checkpoint is None or not self.uses_fsdp:
            super().load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, entry in state["state"].items():
            entry |= {
                name: distribute_like(value, parameters[number])
                for name, value in entry.items()
                if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            }
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))


def _whole(entry: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of one parameter, with whole tensors on the CPU."""
    return {
        name: full_tensor(value).cpu() if isinstance(value, torch.Tensor) else value for name, value in entry.items()
    }


def _encoded_files(directory: Path) -> Iterable[list[str]]:
    """Name, and content in base64, of each file below a directory."""
    return (
        [str(path.relative_to(directory)), b64encode(path.read_bytes()).decode()]
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
