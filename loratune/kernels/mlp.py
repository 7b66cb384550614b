"""Norms and gated feed-forward layers that save little and go over memory once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.lora_linear import Passed, Projection
from loratune.kernels.reference import FusedOps


@dataclass(frozen=True)
class GatedLayer:
    """down(silu(gate(x)) * up(x)). joined: gate and up."""

    joined: Projection
    down: Projection
    passes: FusedOps

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        """x: (tokens, in). Returns (tokens, out)."""
        parameters = (*self.joined.parameters(), *self.down.parameters())
        apply: Any = _GatedLayer.apply
        result: Tensor = apply(x, self, training, *parameters)
        return result


class _GatedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: GatedLayer, training: bool, *parameters: Tensor) -> Tensor:
        count = len(of.joined.parameters())
        both, before = of.joined.forward(x, training, parameters[:count])
        gated = of.passes.swiglu(both)
        y, after = of.down.forward(gated, training, parameters[count:])
        kept = [one.tensors() if one else [] for one in (before, after)]
        ctx.of, ctx.split = of, len(kept[0])
        ctx.save_for_backward(both, x if before else None, gated if after else None, *kept[0], *kept[1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        of, (both, x, gated, *kept) = ctx.of, ctx.saved_tensors
        before, after = (Passed.of(part) if part else None for part in (kept[: ctx.split], kept[ctx.split :]))
        dgated, outer = of.down.backward(dy, gated, after, wanted=True)
        dboth = of.passes.swiglu_backward(dgated, both)
        dx, inner = of.joined.backward(dboth, x, before, wanted=ctx.needs_input_grad[0])
        return dx, None, None, *inner, *outer


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, passes: FusedOps) -> Tensor:
    """`plain.rms_norm` with a weight that is frozen. x: (..., size); weight: (size,)."""
    apply: Any = _RootMeanSquare.apply
    result: Tensor = apply(x, weight, epsilon, passes)
    return result


class _RootMeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, passes: FusedOps) -> Tensor:
        y, inverse = passes.rms_norm(x, weight, epsilon)
        ctx.passes = passes
        ctx.save_for_backward(x, weight, inverse)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ctx.passes.rms_norm_backward(dy, *ctx.saved_tensors), None, None, None
