"""The layout of a batch: which tokens attend to which others. The attention kernels read it."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.kernels.transfer import on_host

TILE = 128
"""The most queries whose scores are in memory at once."""
LANES = 16
"""Keys per vector: the shared keys of a tile are padded to a multiple of it."""
TILE_COST = 32
"""The fixed cost of a tile, in units of keys."""

Value = TypeVar("Value")


class Scoring(NamedTuple):
    """How attention scores are computed.

    Attributes:
        scale: The factor of the product of query and key.
        cap: The bound of tanh soft-capping, as in Gemma 2; 0 for none.
        sinks: For each head, the score of an attention sink without a value, as in GPT-OSS: (groups * heads,), float32.
    """

    scale: float
    cap: float = 0.0
    sinks: Tensor | None = None


class PerBatch(Generic[Value]):
    """Caches values computed from the positions of a batch, for all layers that see the same batch.

    compute: function of positions, (tokens,) on the CPU, and a key.
    """

    def __init__(self, compute: Callable[[Tensor, Any], Value]):
        self._compute = compute
        self._values: dict[Hashable, Value] = {}
        self._batch: tuple[Tensor, torch.Size] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get(self, positions: Tensor, shape: torch.Size, key: Hashable = None) -> Value:
        """The value for a key. positions: (1 or rows, length), of a batch of this shape."""
        if self._batch is None or self._batch[0] is not positions or self._batch[1] != shape:
            self._batch, self._values = (positions, shape), {}
        if key not in self._values:
            self._values[key] = self._compute(_read(positions, shape).expand(shape).reshape(-1), key)
        return self._values[key]


def _read(positions: Tensor, shape: torch.Size) -> Tensor:
    """Positions on the CPU. Those that a model on a GPU has made for padded rows are known without waiting for it."""
    if shape[0] > 1 and len(positions) == 1 and positions.device.type != "cpu":
        return torch.arange(shape[1])
    return on_host(positions)


@dataclass(frozen=True)
class Layout:
    """Which tokens attend to which others, in a batch of packed rows or a tree of rows, tile by tile.

    A tile is a range of queries with the keys that they attend to, in its own order, in which a token can occur several
    times. First come the keys that all queries share, then the others. Long rows may be excluded from tiles and
    computed separately, see `sublayers.attend_whole_rows`.

    Attributes:
        spans: (tokens, 3), int32, each (low, begin, end): among the keys of its tile, a token attends to the shared
            keys from `low` on, and to the keys from `begin` to `end`, the last of which is the token itself.
        keys: (any,), int32: the tokens of the keys of all tiles; -1 for padding.
        tiles: (count, 6), int64, each (first, end, place, count, shared, repeats): the queries from `first` to `end`,
            and `count` keys starting at `place` in `keys`, of which the first `shared` are shared, followed by padding
            to a multiple of LANES. If `repeats` is 1, a token may occur among the keys several times.
        rows: (first, end) of each row that is in no tile.
    """

    spans: Tensor
    keys: Tensor
    tiles: Tensor
    rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, positions: Tensor, window: int | None = None, tile: int = TILE, whole: int | None = None) -> "Layout":
        """The layout of a batch.

        Args:
            positions: (tokens,), the position of each token in its row. The parent of a token is the last token before
                it with a lower position; a token attends to its ancestors and itself. A token without a parent begins a
                row, and rows share a prefix where positions go back to a value above 0 (depth-first order).
            window: The number of positions that each token attends to, including its own.
            tile: The maximum number of queries of a tile.
            whole: A row of at least this many tokens is in no tile, if it is not longer than the window; None: all
                rows are in tiles.
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


def descendants_end(positions: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """(tokens,), the token after the last descendant of each token, in rows or in a tree of rows (`Layout.of`).

    A token attends, within a window, to those tokens before it whose descendants do not end before it.
    """
    ends, limits = np.empty(len(positions), np.int64), np.full(int(positions.max()) + 1, len(positions))
    starts = [*np.flatnonzero(np.diff(positions, prepend=positions[0]) <= 0).tolist(), len(positions)]
    for first, end in reversed([*pairwise(starts)]):
        ends[first:end] = limits[positions[first:end]]
        limits[positions[first] :] = first
    return ends


@dataclass(frozen=True)
class _Node:
    """A node of a tree: consecutive tokens.

    Attributes:
        first: The first token.
        end: The token after the last.
        before: Spans of the preceding tokens of the row, from its beginning on.
        whole: Whether it is a complete node rather than a part of one.
    """

    first: int
    end: int
    before: tuple[tuple[int, int], ...]
    whole: bool = True

    def parts(self, most: int) -> "Iterator[_Node]":
        """The node in equal parts of at most `most` tokens."""
        count = -(-(self.end - self.first) // most)
        for part in range(count):
            first, end = (self.first + (self.end - self.first) * number // count for number in (part, part + 1))
            before = (*self.before, (self.first, first)) if part else self.before
            yield _Node(first, end, before, whole=count == 1)

    @property
    def depth(self) -> int:
        """The number of preceding tokens."""
        return sum(end - begin for begin, end in self.before)

    @property
    def path(self) -> NDArray[np.integer[Any]]:
        """The preceding tokens, and the tokens of the node."""
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
    """Group nodes into tiles of at most `most` queries with as few keys as possible; parts of nodes stay separate."""
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
    """The number of shared keys of a tile, and all its keys in several arrays.

    members: the nodes of the tile. spans: receives the spans of its tokens.
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
