"""The adapter's tensors, also where each process holds only a part of them: DTensors of FSDP2, partitions of ZeRO-3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from loratune.kernels import full
from loratune.lora import upstream

Weights = dict[str, torch.Tensor]
"""Name in the adapter file → tensor."""


def weights(model: PeftModel) -> Weights:
    """The adapter's tensors under their names in the adapter file."""
    state: Weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def whole(model: PeftModel) -> Weights:
    """The same, whole, collected from all processes that hold a part of them, which all must call this."""
    with _gathered(model):
        return {name: full(tensor).detach().clone() for name, tensor in weights(model).items()}


def alike(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor, distributed over the processes as `target` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def restore(model: PeftModel, saved: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into a model that may hold only a part of them; then all processes must call this.

    Raises:
        KeyError: They belong to another adapter.
    """
    with _gathered(model, write=True):
        for name, target in weights(model).items():
            target.copy_(alike(saved[name].to(target.device), target))


@contextmanager
def _gathered(model: Any, *, write: bool = False) -> Iterator[None]:
    """Inside, parameters of the adapter that ZeRO-3 has partitioned are whole (deepspeed.readthedocs.io,
    GatheredParameters). With `write`, their values in the main process are distributed at the end."""
    partitioned = [p for p in model.parameters() if p.requires_grad and upstream.is_partitioned(p)]
    if not partitioned:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield
