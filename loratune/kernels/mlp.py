"""Norms and gated feed-forward layers of fused operations, which save few tensors for the backward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.lora_linear import Projection, SavedLora
from loratune.kernels.reference import FusedOps


@dataclass(frozen=True)
class GatedLayer:
    """down(silu(gate(x)) * up(x)). joined: gate and up as one product."""

    joined: Projection
    down: Projection
    ops: FusedOps

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        """x: (tokens, in). Returns (tokens, out)."""
        parameters = (*self.joined.parameters(), *self.down.parameters())
        apply: Any = _GatedLayer.apply
        result: Tensor = apply(x, self, training, *parameters)
        return result


class _GatedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GatedLayer, training: bool, *parameters: Tensor) -> Tensor:
        count = len(layer.joined.parameters())
        both, joined_lora = layer.joined.forward(x, training, parameters[:count])
        gated = layer.ops.swiglu(both)
        y, down_lora = layer.down.forward(gated, training, parameters[count:])
        joined_saved, down_saved = (lora.tensors() if lora else [] for lora in (joined_lora, down_lora))
        ctx.layer, ctx.split = layer, len(joined_saved)
        inputs = x if joined_lora else None, gated if down_lora else None
        ctx.save_for_backward(both, *inputs, *joined_saved, *down_saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layer, (both, x, gated, *saved) = ctx.layer, ctx.saved_tensors
        parts = saved[: ctx.split], saved[ctx.split :]
        joined_lora, down_lora = (SavedLora.of(part) if part else None for part in parts)
        dgated, down_gradients = layer.down.backward(dy, gated, down_lora, needs_dx=True)
        dboth = layer.ops.swiglu_backward(dgated, both)
        dx, joined_gradients = layer.joined.backward(dboth, x, joined_lora, needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, *joined_gradients, *down_gradients


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, ops: FusedOps) -> Tensor:
    """`reference.rms_norm` with a frozen weight. x: (..., size); weight: (size,). Returns (..., size)."""
    apply: Any = _RMSNorm.apply
    result: Tensor = apply(x, weight, epsilon, ops)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, ops: FusedOps) -> Tensor:
        y, inverse = ops.rms_norm(x, weight, epsilon)
        ctx.ops = ops
        ctx.save_for_backward(x, weight, inverse)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ctx.ops.rms_norm_backward(dy, *ctx.saved_tensors), None, None, None
