"""Copies batches to a GPU without waiting for it, and keeps the originals for code that needs their values.

To read a value back from a GPU, or to copy from memory that is not pinned, waits until all work before it is done. The
values that decide shapes (where rows begin, which tokens are supervised) are therefore read from the originals.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ORIGINAL = "loratune_original"
"""The attribute of the storage of a copy that holds its original."""


def to_device(value: Any, device: torch.device) -> Any:
    """A batch on a device: a tensor, or dicts, lists and tuples of tensors. Scalars and other values stay as they are,
    as torch takes scalars from the CPU."""
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return send(value, device) if isinstance(value, Tensor) and value.dim() else value


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, whose original `on_host` returns. The copy does not wait for the device."""
    if tensor.device == device or tensor.device.type != "cpu":
        return tensor.to(device)
    source = tensor.pin_memory() if torch.accelerator.is_available() else tensor
    sent = source.to(device, non_blocking=True)
    vars(sent.untyped_storage())[_ORIGINAL] = tensor
    return sent


def on_host(tensor: Tensor) -> Tensor:
    """A tensor in the memory of the machine: itself, the original of a copy, or else a copy, which waits.

    Some models give the positions another shape first; a view of all values of a copy has its original.
    """
    if tensor.device.type == "cpu":
        return tensor
    original: Tensor | None = vars(tensor.untyped_storage()).get(_ORIGINAL)
    if original is None or not tensor.is_contiguous() or tensor.numel() != original.numel():
        return tensor.cpu()
    return original if original.shape == tensor.shape else original.reshape(tensor.shape)
