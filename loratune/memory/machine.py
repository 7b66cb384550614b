"""Memory that is needed for the whole run, weights and optimizer states, and how much memory is free."""

import logging
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.memory.upstream import get_keys_to_not_convert

_log = logging.getLogger(__name__)

WeightFormat = Literal["none", "8bit", "4bit"]
"""How the linear layers of the base are quantized."""
_CGROUP = Path("/sys/fs/cgroup")


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def format_of(model: nn.Module) -> WeightFormat:
    """How a loaded model is quantized."""
    classes = {type(module) for module in model.modules()}
    return "4bit" if Linear4bit in classes else "8bit" if Linear8bitLt in classes else "none"


def quantizable(model: Any) -> set[str]:
    """Names of the modules of a `PeftModel` that bitsandbytes quantizes: linear layers, except the output layer.

    transformers' `get_keys_to_not_convert` says which are left out; LoRA's own layers are no part of the base.
    """
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base)
    unquantized = get_keys_to_not_convert(base)
    return {
        f"{prefix}.{name}"
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
        and name.removesuffix(".base_layer") not in unquantized
        and not module.weight.requires_grad
        and "lora_" not in name
    }


def weights(model: nn.Module, weight_format: WeightFormat) -> int:
    """Bytes of the frozen base, with the scales of quantized weights.

    weight_format: how the linear layers are quantized, or would be if they are not yet.
    """
    frozen = {
        id(tensor): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not tensor.requires_grad and "lora_" not in name and not name.endswith(_NO_WEIGHTS)
    }
    total = size(frozen.values())
    if weight_format == format_of(model):
        return total
    for name in quantizable(model):
        module: Any = model.get_submodule(name)
        total += _quantized_size(module, weight_format) - size([module.weight])
    return total


_NO_WEIGHTS = ("weight_format", "bitsandbytes__nf4", "bitsandbytes__fp4")
"""How entries of a state dict end that bitsandbytes adds to describe a layer, and that are no weights."""


def _quantized_size(module: Any, weight_format: WeightFormat) -> int:
    """Bytes of the weight of a linear layer with its scales.

    8bit: one byte per element, and a float32 per output. 4bit: nf4 in blocks of 64 elements, which have a scale of one
    byte each; the scales are in blocks of 256 with a float32 each; and each layer has two tables (QLoRA,
    arXiv:2305.14314).
    """
    count: int = module.weight.numel()
    if weight_format == "8bit":
        outputs: int = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        return count + 4 * outputs
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256)


def moments(parameter: Tensor, optim: str) -> int:
    """Bytes of the states that an optimizer has for a parameter that it has updated.

    AdamW has two tensors like the parameter. In 8 bit (arXiv:2110.02861) it has, from 4,096 elements on, two bytes per
    element and two float32 scales per block of 256. Adafactor (arXiv:1804.04235) has a float32 per row and per column,
    SGD nothing.
    """
    count = parameter.numel()
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        factors = [count // parameter.shape[-1], count // parameter.shape[-2]] if parameter.dim() > 1 else [count]
        return 4 * sum(factors)
    if optim in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        return 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 8 * count
    return 2 * count * parameter.element_size()


def available(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU, in the machine and within the limits of process and container."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    bounds = [int(psutil.virtual_memory().available)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - int(psutil.Process().memory_info().vms))
    try:
        maximum = (_CGROUP / "memory.max").read_text().strip()
        if maximum != "max":
            bounds.append(int(maximum) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # There is no container, or the kernel is older.
        _log.debug("no limit of a container is known", exc_info=True)
    return max(0, min(bounds))
