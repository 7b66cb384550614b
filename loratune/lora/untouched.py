"""The base beside its adapter, as it was before PEFT changed it.

`PeftModel.disable_adapter` leaves out the adapter's own layers only. Biases that were trained are parameters of the
base and stay as they are; PiSSA, OLoRA and CorDA take a part of each adapted weight out of the base for good.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists  # undocumented; PEFT's own reading of target_modules
from torch import nn

from loratune.errors import AdapterError, Problem
from loratune.lora.initialize import AdapterInit
from loratune.lora.sharded import restore

_KEEPING = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
"""Values of init_lora_weights with which PEFT leaves the base as it is when it loads a saved adapter."""


@dataclass(frozen=True)
class Untouched:
    """Parameters of a base that PEFT may change with an adapter, each with its value from before.

    refusal: why the base cannot be had beside the adapter; empty if it can.
    """

    values: tuple[tuple[nn.Parameter, torch.Tensor], ...]
    refusal: str = ""

    @contextmanager
    def alone(self, model: PeftModel, where: str) -> Iterator[None]:
        """Inside, the model computes what its base does. Raises AdapterError: it cannot be made to; where: the path of
        the adapter."""
        if self.refusal:
            raise AdapterError(Problem(f"its base cannot be computed beside it: {self.refusal}", where))
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
    """Copy what PEFT may change of a base as it attaches a saved adapter of this configuration, and loads its tensors.

    Biases are small; the weights of adapted layers are copied only for the starts that change them.
    """
    if config.layer_replication:
        return Untouched((), "lora.layer_replication repeats layers of it")
    kept = []
    for path, module in base.named_modules():
        taken = config.init_lora_weights not in _KEEPING and check_target_module_exists(config, path)
        for name, parameter in module.named_parameters(recurse=False):
            if (taken and parameter.dim() > 1) or (config.bias != "none" and "bias" in name):
                kept.append((parameter, parameter.detach().clone()))
    return Untouched(tuple(kept))


@contextmanager
def as_begun(model: PeftModel, start: AdapterInit, trained: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a model that was trained computes what it did before its first step, which is what its base does.

    start: see `begin`; trained: its tensors, see `sharded.whole`, which it has again afterwards. A start that took a
    part out of the base (PiSSA, OLoRA) equals it up to rounding, so that the adapter as it started stands for the base;
    any other is left out, and only biases that were trained are set back. Where processes share the weights out, all
    must take part.
    """
    swapped = start.to_plain_lora or model.peft_config["default"].bias != "none"
    if swapped:
        restore(model, start.tensors)
    try:
        if start.to_plain_lora:
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if swapped:
            restore(model, trained)
