"""Causal self-attention over packed rows: tile by tile on a CPU, by torch's kernel for uneven rows on a GPU."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from loratune.kernels.lora_linear import Projection, SavedLora
from loratune.kernels.reference import FusedOps

TILE = 128
"""Queries whose scores are in memory at once."""
VARLEN = "loratune-varlen"
"""The name that the attention function for a GPU is registered under."""

Value = TypeVar("Value")


class PerBatch(Generic[Value]):
    """Caches what is computed from the positions of a batch, for all layers that see the same batch.

    compute: takes positions, (tokens,), and a key.
    """

    def __init__(self, compute: Callable[[Tensor, Any], Value]):
        self._compute = compute
        self._values: dict[Hashable, Value] = {}
        self._batch: tuple[Tensor, torch.Size] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get(self, positions: Tensor, shape: torch.Size, key: Hashable = None) -> Value:
        """positions: (1 or rows, length), of a batch of this shape."""
        if self._batch is None or self._batch[0] is not positions or self._batch[1] != shape:
            self._batch, self._values = (positions, shape), {}
        if key not in self._values:
            self._values[key] = self._compute(positions.expand(shape).reshape(-1), key)
        return self._values[key]


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed batch are.

    Attributes:
        starts: (tokens,), int32: the first token that each token attends to. The last one is itself.
        tiles: (count, 3), int64, each (first, end, begin): the queries from `first` to `end` attend to nothing before
            `begin`.
    """

    starts: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, positions: Tensor, window: int | None = None, tile: int = TILE) -> "Layout":
        """The layout of a batch.

        Args:
            positions: (tokens,), 0 where a row begins.
            window: How many tokens each one attends to at most, itself included.
            tile: The most queries of a tile.
        """
        indices = torch.arange(len(positions))
        starts = torch.where(positions == 0, indices, 0)
        begins = [0, *(torch.nonzero(positions[1:] == 0)[:, 0] + 1).tolist()]
        starts = starts.cummax(0).values
        if window is not None:
            starts = torch.maximum(starts, indices - window + 1)
        spans = _spans([*begins, len(positions)], tile)
        tiles = torch.tensor([(first, end, int(starts[first])) for first, end in spans])
        return cls(starts.to(torch.int32), tiles)


def _spans(bounds: Sequence[int], tile: int) -> Iterator[tuple[int, int]]:
    """Tiles of several whole rows, and longer rows in equal parts. bounds: the first token of each row, and the end."""
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
    """RMS norms of the heads of queries and keys, as in Qwen3. query, key: the weights, (head size,)."""

    query: Tensor
    key: Tensor
    epsilon: float

    def forward(self, joined: Tensor, columns: Sequence[int], ops: FusedOps) -> tuple[Tensor, list[Tensor]]:
        """joined: (tokens, sum of columns); columns: how many are of queries, keys and values.

        Returns the same shape, and what `backward` needs.
        """
        query, key, value = torch.split(joined, list(columns), 1)
        saved, normalized = [], []
        for x, weight in ((query, self.query), (key, self.key)):
            heads = x.reshape(-1, len(weight))
            y, inverse = ops.rms_norm(heads, weight, self.epsilon)
            normalized.append(y.view(x.shape))
            saved += [heads, inverse]
        return torch.cat([*normalized, value], 1), saved

    def backward(self, djoined: Tensor, columns: Sequence[int], saved: Sequence[Tensor], ops: FusedOps) -> Tensor:
        """The gradient of `joined`."""
        query, key, value = torch.split(djoined, list(columns), 1)
        gradients = [
            ops.rms_norm_backward(dy.reshape(x.shape), x, weight, inverse).view(dy.shape)
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
        scale: Of the scores.
        norms: Norms of the heads of queries and keys.
    """

    joined: Projection
    out: Projection
    groups: int
    heads: int
    size: int
    scale: float
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
        result, total = layer.ops.attend(query, key, value, layout.starts, layout.tiles, layer.scale)
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
        joined_lora, out_lora = (SavedLora.of(part) if part else None for part in loras)
        dresult, out_gradients = layer.out.backward(dy, result, out_lora, needs_dx=True)
        layout = ctx.layout
        attended = (result, total, query, key, value, layout.starts, layout.tiles)
        dheads = layer.ops.attend_backward(dresult, *attended, layer.scale)
        djoined = layer.ops.join_heads(*dheads, cosine, sine)
        if layer.norms is not None:
            djoined = layer.norms.backward(djoined, layer.columns, norms_saved, layer.ops)
        dx, joined_gradients = layer.joined.backward(djoined, x, joined_lora, needs_dx=ctx.needs_input_grad[0])
        return dx, None, None, None, None, None, *joined_gradients, *out_gradients


@dataclass(frozen=True)
class RowBounds:
    """Where the rows of a batch end.

    Attributes:
        cumulative: (rows + 1,), int32, from 0 to the number of tokens.
        longest: Tokens of the longest row.
    """

    cumulative: Tensor
    longest: int

    @classmethod
    def of(cls, positions: Tensor, _: None = None) -> "RowBounds":
        """positions: (tokens,), 0 where a row begins."""
        begins = torch.nonzero(positions[1:] == 0)[:, 0] + 1
        bounds = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), len(positions))])
        return cls(bounds.to(torch.int32), int(bounds.diff().max()))


class VarlenAttention:
    """An attention function of transformers for a GPU.

    Batches come without a cache, and padded at the end of rows, if at all.

    Attributes:
        windowed: Whether a layer has asked for a window.
    """

    def __init__(self) -> None:
        self.windowed = False
        self._bounds = PerBatch(RowBounds.of)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
        scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
        position_ids: Tensor, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend within each row.

        Args:
            module: The layer of attention.
            query: (rows, heads, length, size).
            key: The same, with as many heads or fewer.
            value: The same as `key`.

        Returns:
            (rows, length, heads, size), and no weights.

        Raises:
            ValueError: The layer needs something that the kernel does not compute.
        """
        if softcap is not None or s_aux is not None or dropout or attention_mask is not None:
            raise ValueError("the kernel has no caps, sinks, dropout or masks")
        self.windowed |= sliding_window is not None
        rows, heads, length, size = query.shape
        bounds = self._bounds.get(position_ids, torch.Size((rows, length)))
        queries, keys, values = (x.transpose(1, 2).reshape(rows * length, -1, size) for x in (query, key, value))
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        result: Any = varlen_attn(
            queries, keys, values, bounds.cumulative, bounds.cumulative, bounds.longest, bounds.longest, scale=scaling,
            window_size=window, enable_gqa=True,
        )  # fmt: skip
        return result.view(rows, length, heads, size), None
