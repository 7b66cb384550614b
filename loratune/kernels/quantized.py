"""Linear layers in 8 bit on a CPU, which multiply with dequantized weights, in training and in evaluation alike.

In evaluation, bitsandbytes rounds activations to 8 bits but for columns with outliers, which all rows of a batch
decide; on a CPU that takes longer, and what a row gives depends on the others. In training it dequantizes as well, in
several passes over memory, and keeps the inputs, which nothing needs.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

from loratune.kernels.compiled.fused_ops import fused_ops

_LARGEST = 127
"""The 8-bit number that stands for the largest weight of an output."""


class DequantizedLinear(Linear8bitLt):
    """The layer of bitsandbytes, computed in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        weight, scales = self.state.CB, self.state.SCB * (1 / _LARGEST)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled():
            result: Tensor = _Product.apply(x, weight, scales, bias)  # type: ignore[no-untyped-call]
            return result
        y: Tensor = fused_ops(x).linear_8bit(x.reshape(-1, x.shape[-1]), weight, scales).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight, scales
        return functional.linear(x, _dequantized(x, weight, scales), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        dx = dy @ _dequantized(dy, *ctx.weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


def _dequantized(like: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """A weight in the dtype of a tensor. weight: (out, in), int8; scales: (out,), float32."""
    result = like.new_empty(weight.shape)
    fused_ops(like).dequantize(result, weight, scales)
    return result


def dequantize_in_use(model: nn.Module) -> None:
    """Make the 8-bit layers of a model that are on a CPU `DequantizedLinear`s. Their weights stay as they are."""
    layers: list[Any] = [module for module in model.modules() if type(module) is Linear8bitLt]
    for layer in layers:
        if layer.weight.device.type == "cpu" and not layer.state.has_fp16_weights:
            layer.__class__ = DequantizedLinear
