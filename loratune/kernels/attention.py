"""Causal self-attention over packed rows on a CPU: in tiles, and for very long rows by torch's own kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loratune.kernels import upstream
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.layout import Layout, Scoring
from loratune.kernels.lora_linear import Projection

Rows = Sequence[tuple[int, int]]
"""The first token of each row, and the one after its last."""
Pair: TypeAlias = tuple[Tensor, Tensor]
Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]

FEWEST_TOKENS = {torch.float32: 2048}
"""From so many tokens on torch's kernel is faster, by dtype; of other dtypes ours is, whatever the length. So it is for
AVX2 and AVX-512 and for heads of 64, 128 and 256, of which one to four share a head of keys:
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
        """joined: (tokens, sum of columns); columns: how many are of queries, keys and values.

        Returns the same shape, and what `backward` needs.
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
    """A layer of attention.

    Attributes:
        joined: The projections to queries, keys and values as one product.
        out: The projection of the heads' output.
        groups: Heads of keys and values.
        heads: Heads of queries that share each head of keys and values.
        size: The size of every head.
        scoring: How scores are made; there are no sinks.
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
        """How many columns of the joined product are queries, keys and values."""
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
    """The fewest tokens of a row that torch's kernel computes for states like this tensor; None: it computes none.

    The limit is fixed and not measured at run time, so that the same seed gives the same bytes.
    """
    return FEWEST_TOKENS.get(like.dtype)


def attend_whole_rows(rows: Rows, results: Pair, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Compute attention within whole rows by torch's own kernel.

    It takes products from oneDNN and MKL, and with them instructions that ours has not, such as AMX.

    Args:
        rows: Which.
        results: Receives what `reference.attend` returns, of the tokens of these rows.
        query, key, value: See `reference.attend`.
        scale: Of the scores.
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
        rows: Which.
        gradients: Those of query, key and value. That of a query is overwritten; to the others is added, as other
            tokens may attend to the rows too.
        gradient, outputs, inputs: See `reference.attend_backward`.
        scale: Of the scores.
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
