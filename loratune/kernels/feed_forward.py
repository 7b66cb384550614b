"""Feed-forward layers: gated layers, mixtures of frozen experts, and RMS norms."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.compiled import reference
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.lora_linear import Projection
from loratune.kernels.upstream import is_fake


@dataclass(frozen=True)
class GatedLayer:
    """down(silu(gate(x)) * up(x)), or with another activation. joined: gate and up as one product."""

    joined: Projection
    down: Projection
    ops: FusedOps
    activation: tuple[float, float] = reference.SILU

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        """x: (tokens, in). Returns (tokens, out)."""
        parameters = (*self.joined.parameters(), *self.down.parameters())
        apply: Any = _GatedLayerFunction.apply
        result: Tensor = apply(x, self, training, *parameters)
        return result


class _GatedLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GatedLayer, training: bool, *parameters: Tensor) -> Tensor:
        count = len(layer.joined.parameters())
        both, joined_lora = layer.joined.forward(x, training, parameters[:count])
        gated = layer.ops.swiglu(both, *layer.activation)
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
        joined_lora, down_lora = (one.saved(part) for one, part in zip((layer.joined, layer.down), parts, strict=True))
        dgated, down_gradients = layer.down.backward(dy, gated, down_lora, needs_dx=True)
        dboth = layer.ops.swiglu_backward(dgated, both, *layer.activation)
        dx, joined_gradients = layer.joined.backward(dboth, x, joined_lora, needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, *joined_gradients, *down_gradients


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, ops: FusedOps, added: float = 0.0) -> Tensor:
    """`reference.rms_norm` with a frozen weight. x: (..., size); weight: (size,). Returns (..., size)."""
    result: Tensor = _RMSNorm.apply(x, weight, epsilon, ops, added)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, ops: FusedOps, added: float) -> Tensor:
        y, inverse = ops.rms_norm(x, weight, epsilon, added)
        ctx.ops, ctx.added = ops, added
        ctx.save_for_backward(x, weight, inverse)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ctx.ops.rms_norm_backward(dy, *ctx.saved_tensors, ctx.added), None, None, None, None


@dataclass(frozen=True)
class ExpertLayers:
    """Gated feed-forward layers, of which each token takes a few. Shazeer et al. 2017.

    Attributes:
        gate_up: Their projections to gates and values, (experts, 2 * inner, size).
        down: Their projections back, (experts, size, inner).
        activation: See `reference.swiglu`.
    """

    gate_up: Tensor
    down: Tensor
    ops: FusedOps
    activation: tuple[float, float] = reference.SILU

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The sum of what the experts of each token give, weighted.

        Args:
            x: (tokens, size).
            chosen: The numbers of the experts of each token, (tokens, count).
            shares: Their weights, the same shape.
        """
        apply: Any = _ExpertsFunction.apply
        result: Tensor = apply(x, chosen, shares, self)
        return result

    def products(self, x: Tensor, weights: Tensor, ends: list[int]) -> Tensor:
        """The product of each expert with its rows. x: (pairs, in), by expert; weights: (experts, in, out)."""
        result = x.new_empty(len(x), weights.shape[2])
        for expert, (first, end) in enumerate(pairwise([0, *ends])):
            if end > first:
                torch.mm(x[first:end], weights[expert], out=result[first:end])
        return result

    def ends(self, chosen: Tensor) -> list[int]:
        """Where the rows of each expert end, among the pairs of a token and an expert in the order of experts."""
        count = len(self.down)
        if is_fake(chosen):
            return [chosen.numel() * (expert + 1) // count for expert in range(count)]
        ends: list[int] = torch.bincount(chosen.flatten(), minlength=count).cumsum(0).tolist()
        return ends


class _ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, shares: Tensor, experts: ExpertLayers) -> Tensor:
        ctx.experts, ctx.ends = experts, experts.ends(chosen)
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        both = experts.products(x[order // chosen.shape[1]], experts.gate_up.transpose(1, 2), ctx.ends)
        gated = experts.ops.swiglu(both, *experts.activation)
        own = experts.products(gated, experts.down.transpose(1, 2), ctx.ends)[places].view(*chosen.shape, -1)
        ctx.save_for_backward(order, places, shares, both, own)
        return (own.float() * shares.float()[..., None]).sum(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        experts, (order, places, shares, both, own) = ctx.experts, ctx.saved_tensors
        dshares = (own.float() * dy.float()[:, None]).sum(-1).to(shares.dtype) if ctx.needs_input_grad[2] else None
        down = (dy.float()[:, None] * shares.float()[..., None]).to(dy.dtype).flatten(0, 1)[order]
        dgated = experts.products(down, experts.down, ctx.ends)
        dboth = experts.ops.swiglu_backward(dgated, both, *experts.activation)
        dx = experts.products(dboth, experts.gate_up, ctx.ends)[places].view(*shares.shape, -1)
        return dx.float().sum(1).to(dy.dtype), None, dshares, None
