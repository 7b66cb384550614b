"""Causal self-attention over rows that stand end to end, tile by tile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.lora_linear import Passed, Projection
from loratune.kernels.reference import FusedOps

TILE = 128
"""Queries whose scores are held at once."""


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch stand. starts: (tokens,) int32, the first token that each one sees; the last is itself.

    tiles: (count, 3) int64, each (first, end, begin): the queries from `first` to `end` see nothing before `begin`.
    """

    starts: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, positions: Tensor, window: int | None = None, tile: int = TILE) -> "Layout":
        """positions: (tokens,), 0 where a row begins; window: how many tokens each one sees at most, with itself."""
        places = torch.arange(len(positions))
        starts = torch.where(positions == 0, places, 0)
        begins = [0, *(torch.nonzero(positions[1:] == 0)[:, 0] + 1).tolist()]
        starts = starts.cummax(0).values
        if window is not None:
            starts = torch.maximum(starts, places - window + 1)
        spans = _spans([*begins, len(positions)], tile)
        tiles = torch.tensor([(first, end, int(starts[first])) for first, end in spans])
        return cls(starts.to(torch.int32), tiles)


def _spans(bounds: Sequence[int], tile: int) -> Iterator[tuple[int, int]]:
    """Whole rows together up to a tile, longer ones in equal parts. bounds: where rows begin, and the end."""
    first = 0
    for begin, end in pairwise(bounds):
        if first < begin and end - first > tile:
            yield first, begin
            first = begin
        if end - begin > tile:
            parts = -(-(end - begin) // tile)
            cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
            yield from pairwise(cuts)
            first = end
    if first < bounds[-1]:
        yield first, bounds[-1]


@dataclass(frozen=True)
class HeadNorms:
    """Root mean square norms of the heads of queries and keys, as in Qwen3. query, key: weights, (size of a head,)."""

    query: Tensor
    key: Tensor
    epsilon: float

    def forward(self, joined: Tensor, columns: Sequence[int], passes: FusedOps) -> tuple[Tensor, list[Tensor]]:
        """joined: (tokens, sum of columns), the columns of queries, keys and values. Returns the like, and what
        `backward` needs."""
        query, key, value = torch.split(joined, list(columns), 1)
        kept, normed = [], []
        for x, weight in ((query, self.query), (key, self.key)):
            heads = x.reshape(-1, len(weight))
            y, inverse = passes.rms_norm(heads, weight, self.epsilon)
            normed.append(y.view(x.shape))
            kept += [heads, inverse]
        return torch.cat([*normed, value], 1), kept

    def backward(self, djoined: Tensor, columns: Sequence[int], kept: Sequence[Tensor], passes: FusedOps) -> Tensor:
        """The gradient of what went in."""
        query, key, value = torch.split(djoined, list(columns), 1)
        passed = [
            passes.rms_norm_backward(dy.reshape(x.shape), x, weight, inverse).view(dy.shape)
            for dy, weight, x, inverse in ((query, self.query, *kept[:2]), (key, self.key, *kept[2:]))
        ]
        return torch.cat([*passed, value], 1)


@dataclass(frozen=True)
class SelfAttention:
    """A layer of attention. joined: queries, keys and values; out: what becomes of the heads; norms: of each head.

    `heads` heads of queries share each of `groups` heads of keys and values, all of them of `size`.
    """

    joined: Projection
    out: Projection
    groups: int
    heads: int
    size: int
    scale: float
    passes: FusedOps
    norms: "HeadNorms | None" = None

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, layout: Layout, *, training: bool) -> Tensor:
        """x: (tokens, in); cosine, sine: (tokens, size) float32. Returns (tokens, out)."""
        parameters = (*self.joined.parameters(), *self.out.parameters())
        apply: Any = _SelfAttention.apply
        result: Tensor = apply(x, cosine, sine, layout, self, training, *parameters)
        return result

    @property
    def columns(self) -> list[int]:
        """Of queries, keys and values in their joined product."""
        return [self.size * count for count in (self.groups * self.heads, self.groups, self.groups)]


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, layout: Layout, of: SelfAttention, training: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(of.joined.parameters())
        joined, before = of.joined.forward(x, training, parameters[:count])
        norms: list[Tensor] = []
        if of.norms is not None:
            joined, norms = of.norms.forward(joined, of.columns, of.passes)
        query, key, value = of.passes.split_heads(joined, cosine, sine, of.groups, of.heads)
        result, total = of.passes.attend(query, key, value, layout.starts, layout.tiles, of.scale)
        y, after = of.out.forward(result, training, parameters[count:])
        ctx.of, ctx.layout = of, layout
        parts = [norms, *(one.tensors() if one else [] for one in (before, after))]
        ctx.ends = [len(part) for part in parts]
        saved = [tensor for part in parts for tensor in part]
        ctx.save_for_backward(x if before else None, cosine, sine, query, key, value, result, total, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        of, (x, cosine, sine, query, key, value, result, total, *kept) = ctx.of, ctx.saved_tensors
        norms, *around = (kept[end - size : end] for size, end in zip(ctx.ends, accumulate(ctx.ends), strict=True))
        before, after = (Passed.of(part) if part else None for part in around)
        dresult, outer = of.out.backward(dy, result, after, wanted=True)
        layout = ctx.layout
        kept_heads = (result, total, query, key, value, layout.starts, layout.tiles)
        heads = of.passes.attend_backward(dresult, *kept_heads, of.scale)
        djoined = of.passes.join_heads(*heads, cosine, sine)
        if of.norms is not None:
            djoined = of.norms.backward(djoined, of.columns, norms, of.passes)
        dx, inner = of.joined.backward(djoined, x, before, wanted=ctx.needs_input_grad[0])
        return dx, None, None, None, None, None, *inner, *outer
