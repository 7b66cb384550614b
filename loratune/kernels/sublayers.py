"""Layers over packed rows on a CPU, as autograd functions: causal self-attention (in tiles, or with torch's kernel for
very long rows), gated feed-forward layers, mixtures of frozen experts, and RMS norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loratune.kernels import upstream
from loratune.kernels.compiled import reference
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.lora_linear import Projection

Rows = Sequence[tuple[int, int]]
"""(first token, token after the last) of each row."""
Pair: TypeAlias = tuple[Tensor, Tensor]
Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]

FEWEST_TOKENS = {torch.float32: 2048}
"""dtype → the number of tokens from which torch's kernel is faster; for other dtypes, ours is always faster. Measured
with AVX2 and AVX-512 for heads of size 64, 128 and 256, one to four per key head:
`python scripts/measure_fallbacks.py --attention` of revision 096b964."""


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of the heads of queries and keys, as in Qwen3.

    Attributes:
        query: The weight, (head size,).
        key: The same.
        epsilon, added: See `reference.rms_norm`.
    """

    query: Tensor
    key: Tensor
    epsilon: float
    added: float

    def forward(self, joined: Tensor, columns: Sequence[int], ops: FusedOps) -> tuple[Tensor, list[Tensor]]:
        """joined: (tokens, sum of columns); columns: the numbers of columns of queries, keys and values.

        Returns the same shape, and the tensors for `backward`.
        """
        query, key, value = torch.split(joined, list(columns), 1)
        saved, normalized = [], []
        for x, weight in ((query, self.query), (key, self.key)):
            heads = x.reshape(-1, len(weight))
            y, inverse = ops.rms_norm(heads, weight, self.epsilon, self.added)
            normalized.append(y.view(x.shape))
            saved += [heads, inverse]
        return torch.cat([*normalized, value], 1), saved

    def backward(self, djoined: Tensor, columns: Sequence[int], saved: Sequence[Tensor], ops: FusedOps) -> Tensor:
        """The gradient of `joined`."""
        query, key, value = torch.split(djoined, list(columns), 1)
        gradients = [
            ops.rms_norm_backward(dy.reshape(x.shape), x, weight, inverse, self.added).view(dy.shape)
            for dy, weight, x, inverse in ((query, self.query, *saved[:2]), (key, self.key, *saved[2:]))
        ]
        return torch.cat([*gradients, value], 1)


@dataclass(frozen=True)
class SelfAttention:
    """An attention layer.

    Attributes:
        joined: The projections to queries, keys and values as one product.
        out: The projection of the heads' output.
        groups: The number of key and value heads.
        heads: The number of query heads per key head.
        size: The size of every head.
        scoring: How scores are computed; there are no sinks.
        norms: Norms of the heads of queries and keys.
    """

    joined: Projection
    out: Projection
    groups: int
    heads: int
    size: int
    scoring: Scoring
    ops: FusedOps
    norms: "HeadNorms | None" = None

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, layout: Layout, *, training: bool) -> Tensor:
        """x: (tokens, in); cosine, sine: (tokens, size) float32. Returns (tokens, out)."""
        parameters = (*self.joined.parameters(), *self.out.parameters())
        apply: Any = _SelfAttentionFunction.apply
        result: Tensor = apply(x, cosine, sine, layout, self, training, *parameters)
        return result

    @property
    def columns(self) -> list[int]:
        """The numbers of columns of queries, keys and values in the joined product."""
        return [self.size * count for count in (self.groups * self.heads, self.groups, self.groups)]


class _SelfAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, layout: Layout, layer: SelfAttention, training: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(layer.joined.parameters())
        joined, joined_lora = layer.joined.forward(x, training, parameters[:count])
        norms_saved: list[Tensor] = []
        if layer.norms is not None:
            joined, norms_saved = layer.norms.forward(joined, layer.columns, layer.ops)
        query, key, value = layer.ops.split_heads(joined, cosine, sine, layer.groups, layer.heads)
        result, total = layer.ops.attend(query, key, value, layout, layer.scoring)
        attend_whole_rows(layout.rows, (result, total), query, key, value, layer.scoring.scale)
        y, out_lora = layer.out.forward(result, training, parameters[count:])
        ctx.layer, ctx.layout = layer, layout
        parts = [norms_saved, *(lora.tensors() if lora else [] for lora in (joined_lora, out_lora))]
        ctx.sizes = [len(part) for part in parts]
        saved = [tensor for part in parts for tensor in part]
        ctx.save_for_backward(x if joined_lora else None, cosine, sine, query, key, value, result, total, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layer, (x, cosine, sine, query, key, value, result, total, *saved) = ctx.layer, ctx.saved_tensors
        ends = accumulate(ctx.sizes)
        norms_saved, *loras = (saved[end - size : end] for size, end in zip(ctx.sizes, ends, strict=True))
        joined_lora, out_lora = (one.saved(part) for one, part in zip((layer.joined, layer.out), loras, strict=True))
        dresult, out_gradients = layer.out.backward(dy, result, out_lora, needs_dx=True)
        outputs, inputs = (result, total), (query, key, value)
        dheads = layer.ops.attend_backward(dresult, outputs, inputs, ctx.layout, layer.scoring)
        attend_whole_rows_backward(ctx.layout.rows, dheads, dresult, outputs, inputs, layer.scoring.scale)
        djoined = layer.ops.join_heads(*dheads, cosine, sine)
        if layer.norms is not None:
            djoined = layer.norms.backward(djoined, layer.columns, norms_saved, layer.ops)
        dx, joined_gradients = layer.joined.backward(djoined, x, joined_lora, needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, None, None, None, *joined_gradients, *out_gradients


def fewest_tokens(like: Tensor) -> int | None:
    """The fewest tokens of a row for which torch's kernel is used with states like this tensor; None: it is never used.

    The limit is fixed rather than measured at run time, so that results are reproducible.
    """
    return FEWEST_TOKENS.get(like.dtype)


def attend_whole_rows(rows: Rows, results: Pair, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Compute attention within whole rows by torch's own kernel.

    It uses matrix products of oneDNN and MKL, with instructions that ours lacks, such as AMX.

    Args:
        rows: The rows.
        results: Receives the results of `reference.attend` for the tokens of these rows.
        query, key, value: See `reference.attend`.
        scale: The factor of the scores.
    """
    groups, tokens, heads, size = query.shape
    result, total = results[0].view(tokens, groups, heads, size), results[1]
    for first, end in rows:
        output, totals = upstream.attend_to_rows(*_row(query, key, value, first, end), scale)
        result[first:end] = output.permute(2, 0, 1, 3)
        total[:, first:end] = totals.transpose(1, 2)


def attend_whole_rows_backward(
    rows: Rows, gradients: Triple, gradient: Tensor, outputs: Pair, inputs: Triple, scale: float
) -> None:
    """Compute the gradients of attention within whole rows.

    Args:
        rows: The rows.
        gradients: The gradients of query, key and value. The first is overwritten; the others are added to, as other
            tokens may attend to the rows too.
        gradient, outputs, inputs: See `reference.attend_backward`.
        scale: The factor of the scores.
    """
    (result, total), (query, key, value) = outputs, inputs
    groups, tokens, heads, size = query.shape
    dquery, dkey, dvalue = gradients
    for first, end in rows:
        by_head = (x.reshape(tokens, groups, heads, size)[first:end].permute(1, 2, 0, 3) for x in (gradient, result))
        outer, output = by_head
        attended = (*_row(query, key, value, first, end), output, total[:, first:end].transpose(1, 2))
        queries, keys, values = upstream.attend_to_rows_backward(outer, *attended, scale=scale)
        dquery[:, first:end] = queries.transpose(1, 2)
        for sums, parts in ((dkey, keys), (dvalue, values)):
            sums[:, first:end] += parts.sum(1, dtype=torch.float32)


def _row(query: Tensor, key: Tensor, value: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a row, (groups, heads, length, size) each; the heads of a group share its keys."""
    heads = query.shape[2]
    keys, values = (x[:, None, first:end].expand(-1, heads, -1, -1) for x in (key, value))
    return query[:, first:end].transpose(1, 2), keys, values


# Feed-forward layers and norms


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
    """A mixture of experts: gated feed-forward layers, a few of which each token uses. Shazeer et al. 2017.

    Attributes:
        gate_up: The projections to gates and values, (experts, 2 * inner, size).
        down: The output projections, (experts, size, inner).
        activation: See `reference.swiglu`.
    """

    gate_up: Tensor
    down: Tensor
    ops: FusedOps
    activation: tuple[float, float] = reference.SILU

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of the outputs of the experts of each token.

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
        """The end of the rows of each expert among the (token, expert) pairs sorted by expert."""
        count = len(self.down)
        if upstream.is_fake(chosen):
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
