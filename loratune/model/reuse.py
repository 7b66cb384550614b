"""A base that several adapters are put on in turn: whether it is the same again once one is taken off.

Adapters change more than they show: some initializations take a part out of the weights, biases are trained in place,
checkpointing and hooks stay on. What can be set back is set back; the rest is found here, bit by bit, and the base is
then loaded again.
"""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from loratune.model import upstream
from loratune.model.fingerprints import block_sums


class BaseState:
    """A base as it was loaded."""

    def __init__(self, base: PreTrainedModel):
        self._trainable = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        self._modules, self._values = _modules(base), _values(base)

    def restore(self, base: PreTrainedModel) -> bool:
        """Set back what training sets, after the adapter was taken off. Returns whether the base is the same again.

        base: the same object; its modules, their hooks and every bit of its tensors are compared.
        """
        if getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
            base.disable_input_require_grads()
        base.eval()
        if [name for name, _ in base.named_parameters()] != [*self._trainable]:
            return False
        for name, parameter in base.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._trainable[name])
        return _modules(base) == self._modules and _values(base) == self._values


def _modules(base: PreTrainedModel) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            id(module),
            module.training,
            upstream.hooks(module),
            "forward" in vars(module),
            bool(vars(module).get("gradient_checkpointing")),
        )
        for name, module in base.named_modules()
    ]


@torch.no_grad()
def _values(base: PreTrainedModel) -> str:
    """SHA-256 of names, types and values of all tensors, those that are not saved among them."""
    digest = hashlib.sha256()
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device} ".encode())
        digest.update(block_sums(tensor, rounded=False))
    return digest.hexdigest()
