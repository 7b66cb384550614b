"""Causal self-attention over packed rows: tile by tile on a CPU, by torch's kernel for uneven rows on a GPU."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from loratune.kernels import whole_rows
from loratune.kernels.compiled.reference import FusedOps
from loratune.kernels.lora_linear import Projection
from loratune.kernels.masks import check_known

TILE = 128
"""Queries whose scores are in memory at once."""
LANES = 16
"""Keys of a vector: those that a tile shares are filled up to a multiple of it."""
TILE_COST = 32
"""What a tile costs by itself, in keys that it has."""
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
    """Which tokens attend to which others, in a batch of packed rows or of a tree of them, tile by tile.

    A tile is a part of the queries with the keys that they attend to, in an order of its own, in which a token can
    stand several times. First come the keys that all queries share, then those that they do not. Long rows may be in no
    tile: each is computed by itself, see `whole_rows`.

    Attributes:
        spans: (tokens, 3), int32, each (low, begin, end): of the keys of its tile, a token attends to those from `low`
            on that are shared, and to those from `begin` to `end`, the last of which is itself.
        keys: (any,), int32: the tokens of the keys of all tiles; -1 for none.
        tiles: (count, 6), int64, each (first, end, place, count, shared, repeats): the queries from `first` to `end`,
            and `count` keys from `place` in `keys` on, of which the first `shared` are shared; then there is none up to
            a multiple of LANES. Where `repeats` is 1, a token may stand among the keys several times.
        rows: The first token of each row that is in no tile, and the one after its last.
    """

    spans: Tensor
    keys: Tensor
    tiles: Tensor
    rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, positions: Tensor, window: int | None = None, tile: int = TILE, whole: int | None = None) -> "Layout":
        """The layout of a batch.

        Args:
            positions: (tokens,), of each token in its row. A token follows the last one before it with a lower
                position, and attends to what that attends to. So a row begins where there is none, and rows share a
                prefix where positions go back to one above 0: tokens are those of a tree, depth first.
            window: How many positions each token attends to, its own included.
            tile: The most queries of a tile.
            whole: The fewest tokens of a row that is in no tile, if it is no longer than the window; None: all are.
        """
        of_tokens = positions.numpy()
        spans = np.zeros((len(of_tokens), 3), np.int32)
        keys: list[NDArray[np.integer[Any]]] = [np.empty(0, np.int32)]
        rows, tiles, place = [], list[tuple[int, ...]](), 0

        def is_whole(node: _Node) -> bool:
            length = node.end - node.first
            return whole is not None and not node.before and whole <= length <= (window or length)

        for are_whole, nodes in groupby(_nodes(of_tokens), is_whole):
            if are_whole:
                rows += [(node.first, node.end) for node in nodes]
                continue
            for members in _groups([part for node in nodes for part in node.parts(tile)], tile):
                shared, own = _keys(members, of_tokens, window, spans)
                keys += own
                count = sum(map(len, own))
                least = min(node.depth for node in members)
                repeats = any(node.depth > least for node in members[1:])
                tiles.append((members[0].first, members[-1].end, place, count, shared, repeats))
                place += count
        joined, bounds = np.concatenate(keys, dtype=np.int32), torch.tensor(tiles, dtype=torch.int64).view(-1, 6)
        return cls(torch.from_numpy(spans), torch.from_numpy(joined), bounds, tuple(rows))


@dataclass(frozen=True)
class _Node:
    """Tokens of a tree that follow one another.

    Attributes:
        first: The first one.
        end: The one after the last.
        before: Spans of the tokens that they follow, from the beginning of the row on.
        whole: Whether they are no part of a longer node.
    """

    first: int
    end: int
    before: tuple[tuple[int, int], ...]
    whole: bool = True

    def parts(self, most: int) -> "Iterator[_Node]":
        """The node in equal parts of so many tokens at most."""
        count = -(-(self.end - self.first) // most)
        for part in range(count):
            first, end = (self.first + (self.end - self.first) * number // count for number in (part, part + 1))
            before = (*self.before, (self.first, first)) if part else self.before
            yield _Node(first, end, before, whole=count == 1)

    @property
    def depth(self) -> int:
        """How many tokens they follow."""
        return sum(end - begin for begin, end in self.before)

    @property
    def path(self) -> NDArray[np.integer[Any]]:
        """The tokens that they follow, and themselves."""
        return np.concatenate([np.arange(*span) for span in (*self.before, (self.first, self.end))])


def _nodes(positions: NDArray[np.integer[Any]]) -> Iterator[_Node]:
    """The nodes of a tree, from the positions of its tokens."""
    bounds = [0, *(np.flatnonzero(np.diff(positions) <= 0) + 1).tolist(), len(positions)]
    path: list[tuple[int, int]] = []
    for first, end in pairwise(bounds):
        while path and positions[path[-1][0]] >= positions[first]:
            path.pop()
        if path:
            begin, last = path[-1]
            path[-1] = begin, begin + int(np.searchsorted(positions[begin:last], positions[first]))
        yield _Node(first, end, tuple(path))
        path.append((first, end))


def _groups(nodes: Sequence[_Node], most: int) -> Iterator[Sequence[_Node]]:
    """Put nodes together to tiles of so many queries at most, so that keys are few; parts of nodes stay alone."""
    depths, sizes = [node.depth for node in nodes], [node.end - node.first for node in nodes]
    costs, ends = [0] * (len(nodes) + 1), [0] * len(nodes)
    for start in range(len(nodes) - 1, -1, -1):
        queries, paths, shared, best = 0, 0, depths[start], -1
        for number in range(start, len(nodes)):
            queries, paths = queries + sizes[number], paths + depths[number] + sizes[number]
            if number > start and (queries > most or not (nodes[start].whole and nodes[number].whole)):
                break
            shared = min(shared, depths[number])
            cost = TILE_COST + paths - (number - start) * shared + costs[number + 1]
            if best < 0 or cost <= best:
                best, ends[start] = cost, number + 1
        costs[start] = best
    start = 0
    while start < len(nodes):
        yield nodes[start : ends[start]]
        start = ends[start]


def _keys(
    members: Sequence[_Node], positions: NDArray[np.integer[Any]], window: int | None, spans: NDArray[np.int32]
) -> tuple[int, list[NDArray[np.integer[Any]]]]:
    """How many keys of a tile are shared, and all of them in several arrays. spans: receives those of the tile.

    members: the nodes of the tile.
    """
    reach = window or len(positions) + int(positions.max()) + 1
    common = min(node.depth for node in members) if len(members) > 1 else 0
    shared = members[0].path[:common]
    lowest = min(positions[node.first] for node in members) - reach
    shared = shared[positions[shared] > lowest]
    keys = [shared, np.full(-len(shared) % LANES, -1)]
    begin = sum(map(len, keys))
    for node in members:
        own = node.path[common:]
        own = own[positions[own] > positions[node.first] - reach]
        of_node, span = positions[node.first : node.end], spans[node.first : node.end]
        span[:, 0] = np.searchsorted(positions[shared], of_node - reach, "right")
        span[:, 1] = begin + np.searchsorted(positions[own], of_node - reach, "right")
        keys.append(own)
        begin += len(own)
        span[:, 2] = np.arange(begin - len(of_node), begin) + 1
    return len(shared), keys


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
        scale: Of the scores.
        norms: Norms of the heads of queries and keys.
        cap: The bound that scores approach; 0 for none.
    """

    joined: Projection
    out: Projection
    groups: int
    heads: int
    size: int
    scale: float
    ops: FusedOps
    norms: "HeadNorms | None" = None
    cap: float = 0.0

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
        around = layout.spans, layout.keys, layout.tiles, layer.scale, layer.cap
        result, total = layer.ops.attend(query, key, value, *around)
        whole_rows.attend(layout.rows, (result, total), query, key, value, layer.scale)
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
        layout = ctx.layout
        around = layout.spans, layout.keys, layout.tiles, layer.scale, layer.cap
        attended = result, total, query, key, value
        dheads = layer.ops.attend_backward(dresult, *attended, *around)
        whole_rows.attend_backward(layout.rows, dheads, dresult, *attended, layer.scale)
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
        position_ids: Tensor, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
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
            TypeError, ValueError: The layer needs something that the kernel does not compute.
        """
        check_known(others)
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
