"""Computing what the base computes with a model that has an adapter, to compare the two.

`PeftModel.disable_adapter` disables only the adapter's own layers. Trained biases are parameters of the base and keep
their trained values; PiSSA, OLoRA and CorDA take a part of each adapted weight out of the base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.lora import upstream
from loratune.lora.initialize import AdapterInit
from loratune.lora.sharded import restore

_UNCHANGING = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
"""Values of init_lora_weights with which PEFT does not change the base when it loads a saved adapter."""


@dataclass(frozen=True)
class Untouched:
    """Parameters of a base that PEFT may change with an adapter, with their values before that.

    Attributes:
        values: Parameter and value.
        refusal: Why the base's output cannot be computed beside the adapter; empty if it can.
    """

    values: tuple[tuple[nn.Parameter, torch.Tensor], ...]
    refusal: str = ""

    @contextmanager
    def alone(self, model: PeftModel, where: str) -> Iterator[None]:
        """Inside, the model computes what its base computes.

        Args:
            model: The base with the adapter.
            where: The path of the adapter.

        Raises:
            AdapterError: That is not possible.
        """
        if self.refusal:
            what = f"the base cannot be compared with this adapter: {self.refusal}"
            raise AdapterError(Problem(Code.ADAPTER_NO_COMPARISON, what, where))
        changed = [parameter.data for parameter, _ in self.values]
        try:
            for parameter, value in self.values:
                parameter.data = value
            with model.disable_adapter():
                yield
        finally:
            for (parameter, _), value in zip(self.values, changed, strict=True):
                parameter.data = value


def untouched(base: nn.Module, config: LoraConfig) -> Untouched:
    """Copy what PEFT may change in a base as it attaches a saved adapter of this configuration, and loads its tensors.

    Biases are small; the weights of adapted layers are copied only for initializations that change them.
    """
    if config.layer_replication:
        return Untouched((), "lora.layer_replication repeats its layers")
    values = []
    for path, module in base.named_modules():
        is_changed = config.init_lora_weights not in _UNCHANGING and upstream.is_target(config, path)
        for name, parameter in module.named_parameters(recurse=False):
            if (is_changed and parameter.dim() > 1) or (config.bias != "none" and "bias" in name):
                values.append((parameter, parameter.detach().clone()))
    return Untouched(tuple(values))


@contextmanager
def as_initialized(model: PeftModel, start: AdapterInit, trained: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a trained model computes what it did before its first step, which is what its base computes.

    An initialization that took a part out of the base (PiSSA, OLoRA) equals the base up to rounding, so the initial
    adapter replaces the trained one; otherwise the adapter is disabled, and only trained biases are set back. Where
    processes share the weights, all must call this.

    Args:
        model: The trained model.
        start: The adapter as it was initialized.
        trained: The trained tensors, see `sharded.whole`; the model has them again afterwards.
    """
    is_replaced = start.to_plain_lora or model.peft_config["default"].bias != "none"
    if is_replaced:
        restore(model, start.tensors)
    try:
        if start.to_plain_lora:
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if is_replaced:
            restore(model, trained)
