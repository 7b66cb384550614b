"""The adapter's tensors, also where each process holds a part of them only: DTensors of FSDP2, partitions of ZeRO-3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from loratune.kernels import full

Weights = dict[str, torch.Tensor]
"""The tensors of an adapter under the names they are saved by."""


def weights(model: PeftModel) -> Weights:
    """The adapter's tensors under the names they are saved by."""
    state: Weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def whole(model: PeftModel) -> Weights:
    """The same, put together from all processes that hold a part of them; all must take part."""
    with _gathered(model):
        return {name: full(tensor).detach().clone() for name, tensor in weights(model).items()}


def alike(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over the processes as `target` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def restore(model: PeftModel, saved: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors into a model that may hold a part of them; then all processes must take part. Raises KeyError:
    they are of another adapter."""
    with _gathered(model, changed=True):
        for name, target in weights(model).items():
            target.copy_(alike(saved[name].to(target.device), target))


@contextmanager
def _gathered(model: Any, *, changed: bool = False) -> Iterator[None]:
    """Inside, what ZeRO-3 has partitioned of the adapter is whole (deepspeed.readthedocs.io, GatheredParameters).

    changed: what the main process makes of it is kept.
    """
    parts = [one for one in model.parameters() if one.requires_grad and hasattr(one, "ds_id")]
    if not parts:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        yield
