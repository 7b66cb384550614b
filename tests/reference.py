"""A textbook implementation of LoRA, which `loratune.lora` has to agree with.

Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """y = Wx + (alpha / r) B A x. W is frozen; A starts random, B at zero."""

    def __init__(self, frozen: nn.Linear, r: int, alpha: int):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, frozen.in_features))
        self.B = nn.Parameter(torch.zeros(frozen.out_features, r))
        self.scale = alpha / r
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * (x @ self.A.T @ self.B.T)


def attach(model: nn.Module, names: Iterable[str], r: int, alpha: int) -> nn.Module:
    """Freeze `model` and replace each named submodule by a LoraLinear."""
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(model.get_submodule(name), r, alpha))
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What is saved: only A and B."""
    return {name: value for name, value in model.state_dict().items() if name.endswith((".A", ".B"))}
