"""PEFT's linear layers in the form that the kernels compute with."""

from typing import Any

from peft.tuners.lora import Linear
from torch import nn

from loratune.kernels import Adapted


def linear(module: Any) -> Adapted | None:
    """A frozen linear layer, with plain LoRA, or without any, as where adapters are disabled.

    Args:
        module: Any module of a model.

    Returns:
        Its frozen layer, A and B, scaling and dropout; None for every other kind of module, such as DoRA and quantized
        layers.
    """
    if type(module) is nn.Linear:
        return None if _is_trained(module) else Adapted(module)
    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or _is_trained(module.base_layer):
        return None
    if module.disable_adapters:
        return Adapted(module.base_layer)
    if list(module.active_adapters) != list(module.lora_A) or len(module.lora_A) != 1 or module.merged:
        return None
    (name,) = module.lora_A
    if module.lora_variant or module.fan_in_fan_out or module.lora_bias[name]:
        return None
    dropout = module.lora_dropout[name]
    probability = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return Adapted(module.base_layer, down, up, float(module.scaling[name]), probability)


def _is_trained(layer: nn.Linear) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
