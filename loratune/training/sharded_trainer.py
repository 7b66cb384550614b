"""Checkpoints of a run, also where its processes share out the weights: written whole, by the main process alone."""

from base64 import b64decode, b64encode
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map
from transformers import Trainer

from loratune.kernels import full, global_norm
from loratune.lora import attach, sharded
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.lora.sharded import alike
from loratune.system.launcher import Group
from loratune.training.callbacks import check_finite

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # upstream's names


class ShardedTrainer(Trainer):
    """Trainer whose checkpoints are the same files however the weights are spread; with ZeRO-3, DeepSpeed's own beside
    them. group: the processes."""

    group: Group

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights, and no pickled arguments beside them. Raises NumericError: one of them is NaN or inf."""
        state = sharded.whole(self.model)
        check_finite(state.values(), self.state.global_step)
        if self.group.main:
            attach.write(self.model, Path(str(output_dir)), state)

    def gradient_norm(self) -> torch.Tensor:
        """The norm over all gradients of an optimizer step, as a scalar."""
        if self.is_deepspeed_enabled:  # which keeps them to itself
            return torch.tensor(float(self.model_wrapped.get_global_grad_norm()), device=self.args.device)
        return global_norm([one.grad for one in self.model.parameters() if one.grad is not None])

    def rehearsal_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward and backward of a batch, of which nothing stays."""
        if not self.is_deepspeed_enabled:
            self.training_step(self.model_wrapped, batch, None)
            self.model.zero_grad()
            return
        due = self.accelerator.gradient_state
        due._set_sync_gradients(False)  # accelerate's backward would take DeepSpeed's optimizer step as well
        self.training_step(self.model_wrapped, batch, None)
        self.model_wrapped.optimizer.zero_grad()
        self.model_wrapped.micro_steps -= 1
        due._set_sync_gradients(True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self._collected(output_dir, super()._save_optimizer_and_scheduler)
        elif not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            state = tree_map(
                lambda one: full(one).cpu() if isinstance(one, torch.Tensor) else one, self.optimizer.state_dict()
            )
            if self.group.main:
                torch.save(state, Path(output_dir) / OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        """The random states of all processes."""
        if self.group.count == 1:
            super()._save_rng_state(output_dir)
        else:
            self._collected(output_dir, super()._save_rng_state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As upstream, where a run goes on with as many processes; else they draw from new states."""
        if checkpoint is not None and len(list(Path(checkpoint).glob("rng_state*.pth"))) != self.group.count:
            torch.manual_seed(self.args.seed + self.group.rank + (self.state.global_step << 16))
            return
        super()._load_rng_state(checkpoint)

    def _collected(self, output_dir: str, save: Any) -> None:
        """Have each process save into a directory of its own, and the main one write the files of all."""
        with TemporaryDirectory() as own:
            save(own)
            found = self.group.all_gather(list(_files(Path(own))))
        for name, content in chain.from_iterable(found) if self.group.main else ():
            path = Path(output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b64decode(content))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            sharded.restore(self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        for number, entry in state["state"].items():
            entry |= {
                name: alike(value, trained[number])
                for name, value in entry.items()
                if isinstance(value, torch.Tensor) and value.shape == trained[number].shape
            }
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))


def _files(directory: Path) -> Iterable[list[str]]:
    """Name, and content in base64, of each file below a directory."""
    return (
        [str(path.relative_to(directory)), b64encode(path.read_bytes()).decode()]
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
