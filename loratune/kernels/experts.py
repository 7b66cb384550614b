"""A mixture of frozen experts: the tokens of each expert together, without gradients of its weights."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.compiled import reference
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.upstream import is_fake


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
