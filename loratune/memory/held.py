"""Bytes that stay for the whole run: weights as they are held, and what the optimizer keeps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert


@dataclass(frozen=True)
class Held:
    """How frozen weights would be held. dtype: of those that are not quantized, and of computing."""

    dtype: torch.dtype
    quantization: Literal["none", "8bit", "4bit"] = "none"


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantization(model: nn.Module) -> Literal["none", "8bit", "4bit"]:
    """How a loaded model is quantized."""
    kinds = {type(module) for module in model.modules()}
    return "4bit" if Linear4bit in kinds else "8bit" if Linear8bitLt in kinds else "none"


def quantizable(model: Any) -> set[str]:
    """Names of the modules of a PeftModel that bitsandbytes holds in 8 or 4 bit: linear ones, but not the output head.

    transformers' `get_keys_to_not_convert` says which stay; LoRA's own are no part of the base.
    """
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base)
    kept = get_keys_to_not_convert(base)
    return {
        f"{prefix}.{name}"
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
        and name.removesuffix(".base_layer") not in kept
        and not module.weight.requires_grad
        and "lora_" not in name
    }


def as_held(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name → parameter as it will lie: what has the dtype of the base gets `dtype`, unless it is LoRA's.

    dtype: None for a loaded model, whose weights stay as they are.
    """
    found: dict[str, Tensor] = dict(model.named_parameters())
    if dtype is None:
        return found
    before = base_dtype(found)
    return {
        name: p.detach().to(dtype) if p.dtype == before and "lora_" not in name else p.detach()
        for name, p in found.items()
    }


def base_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """Of the base's weights, those aside that are quantized."""
    return next(p.dtype for name, p in parameters.items() if p.is_floating_point() and "lora_" not in name)


def weights(model: nn.Module, held: Held | None, quantized: set[str]) -> int:
    """Bytes of the frozen base with the scales of quantized weights: as it lies in memory, or as `held` says.

    quantized: names of the modules that `held.quantization` is about.
    """
    parameters = as_held(model, held.dtype if held else None)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and "lora_" not in name}
    if held is None or held.quantization == "none":
        return size(parameters[name] for name in frozen) + sum(map(_scales, model.modules()))
    small = {name: model.get_submodule(name) for name in quantized}
    rest = frozen - {f"{name}.weight" for name in small}
    return size(parameters[name] for name in rest) + sum(
        _quantized(module, held.quantization) for module in small.values()
    )


def moments(parameter: Tensor, optim: str) -> int:
    """Bytes that an optimizer keeps for a parameter that it has updated.

    AdamW: two tensors like the parameter. In 8 bit (arXiv:2110.02861): from 4,096 elements on two bytes each and two
    float32 scales per block of 256. Adafactor (arXiv:1804.04235): rows and columns in float32. SGD: nothing.
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


def _scales(module: nn.Module) -> int:
    """What a quantized layer holds beside its weight."""
    if isinstance(module, Linear8bitLt):
        scales = module.weight.SCB  # bitsandbytes moves them in the first forward
        return size([module.state.SCB if scales is None else scales])
    if not isinstance(module, Linear4bit):
        return 0
    state = module.weight.quant_state
    return size([state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset])


def _quantized(module: Any, kind: str) -> int:
    """A linear layer's weight with its scales.

    8bit: a byte per element and a float32 per output. 4bit: nf4 in blocks of 64 with a byte of scale each, these again
    in blocks of 256 with a float32 each, and per layer two tables and an offset (QLoRA, arXiv:2305.14314).
    """
    count: int = module.weight.numel()
    if kind == "8bit":
        outputs: int = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        return count + 4 * outputs
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
