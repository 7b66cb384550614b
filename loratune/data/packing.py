"""Batches of rows: best-fit packing, and trees of shared prefixes. The trainer iterates over a `BatchLayout`."""

import copy
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.data.batches import Put, flatten, pad, put_rows
from loratune.data.formats import common_prefix

LEAST_SHARED = 8
"""The fewest tokens that a branch of the tree must save, as branches are computed a little less efficiently."""

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PrefixTree:
    """Rows of token ids as a tree.

    The tokens of the tree are in depth-first order. The parent of a token is the last token before it with a lower
    position, so positions alone determine which tokens each token attends to.

    Attributes:
        ids: (tokens of the tree,), token ids.
        positions: (tokens of the tree,), the position of each token in the rows that contain it.
        places: For each row, (tokens of the row,): the indices of its tokens in the tree.
    """

    ids: Numbers
    positions: Numbers
    places: list[Numbers]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], limits: Sequence[int] = ()) -> "PrefixTree":
        """The tree of some rows of at least one token each. It does not depend on the order of the rows.

        limits: see `kernels.length_limits`; rows on both sides of one share no prefix, as it is computed otherwise.
        """
        sides = np.searchsorted(limits, [*map(len, rows)])
        order = sorted(range(len(rows)), key=lambda number: (sides[number], list(rows[number])))
        places: list[Numbers] = [np.empty(0, np.int64)] * len(rows)
        ids, positions = [], []
        previous, path, branches, total = np.empty(0, np.int64), np.empty(0, np.int64), [0], 0
        for before, number in zip([order[0], *order], order, strict=False):
            row = np.asarray(rows[number], np.int64)
            if sides[number] != sides[before]:
                previous = np.empty(0, np.int64)
            depth = _branch(row, previous, branches)
            path = np.concatenate([path[:depth], np.arange(total, total + len(row) - depth)])
            ids.append(row[depth:])
            positions.append(np.arange(depth, len(row)))
            places[number], previous, total = path, row, total + len(row) - depth
        return cls(np.concatenate(ids), np.concatenate(positions), places)


def _branch(row: Numbers, previous: Numbers, branches: list[int]) -> int:
    """The number of tokens that a row shares with the row before it.

    branches: the depths of the branching points on the path of the row before it, ascending from 0; updated in place.
    """
    least, common = min(len(row), len(previous)), common_prefix(row, previous)
    while branches[-1] > common:
        branches.pop()
    if common < least and common - branches[-1] < LEAST_SHARED:
        return branches[-1]
    if common > branches[-1]:
        branches.append(common)
    return common


# Packs


@dataclass(frozen=True)
class Packs:
    """A partition of row numbers into packs; `packs[i]` is the array of the row numbers of pack i.

    Attributes:
        order: The row numbers, pack by pack, ascending within a pack.
        starts: (packs + 1,), the start of each pack in `order`, and the end of `order`.
    """

    order: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Numbers:
        if not -len(self) <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        number %= len(self)
        return self.order[self.starts[number] : self.starts[number + 1]]

    def of(self, each: int) -> "Packs":
        """The packs of rows, if the packed numbers are numbers of groups of `each` consecutive rows."""
        return Packs((self.order[:, None] * each + np.arange(each)).reshape(-1), self.starts * each)


def best_fit(lengths: Numbers, budget: int) -> Packs:
    """Pack rows by best-fit decreasing: the longest row first, each into the fullest pack that still has room for it.

    Every row is in exactly one pack, no pack exceeds the budget, and the result is deterministic. The number of packs
    is at most 11/9 of the optimum plus four (Johnson et al. 1974, doi.org/10.1137/0203025).

    Rows of one length are placed together, so only array operations take time in proportion to the rows; memory is
    about three times that of `lengths` as int64.

    Args:
        lengths: (rows,), tokens of each row, from 1 to budget.
        budget: The maximum number of tokens of a pack.

    Raises:
        ValueError: A length is out of range.
    """
    rows = len(lengths)
    if rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= budget:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit 1 to {budget}")
    budget = min(budget, int(lengths.sum()))  # arrays have its size
    counts = np.bincount(lengths, minlength=budget + 1)
    pack_numbers, packs = _place(counts, budget)
    pack_of = np.empty(rows, pack_numbers.dtype)
    pack_of[_ordered_by(lengths.max(initial=0) - lengths)] = pack_numbers
    sizes = np.bincount(pack_of, minlength=packs)
    del pack_numbers
    return Packs(_ordered_by(pack_of), np.concatenate([[0], np.cumsum(sizes)]))


def _ordered_by(keys: Numbers) -> Numbers:
    """Returns the numbers of the rows, ordered by key and then by number: a stable argsort that sorts in place."""
    combined = keys.astype(np.int64)
    combined *= len(keys)
    combined += np.arange(len(keys))
    combined.sort()
    combined %= max(len(keys), 1)
    return combined.astype(np.min_scalar_type(len(keys)))


def _place(counts: Numbers, budget: int) -> tuple[Numbers, int]:
    """Place rows in packs.

    The fullest pack with space for a row stays the fullest until it has no space for another one. So it takes as many
    rows of this length as fit, and the other packs with the same space follow.

    Args:
        counts: (budget + 1,), the number of rows of each length.
        budget: The maximum number of tokens of a pack.

    Returns:
        The pack of each row, for rows by descending length, and the number of packs.
    """
    pack_numbers: Numbers = np.empty(int(counts.sum()), np.int32 if counts.sum() < 2**31 else np.int64)
    rooms: list[int] = []  # those that some pack has, ascending
    packs_of: dict[int, list[Numbers]] = {}  # room → numbers of the packs that have it, in several arrays
    packs = placed = 0

    def put_back(room: int, numbers: Numbers) -> None:
        if len(numbers) and room:
            if room not in packs_of:
                insort(rooms, room)
            packs_of.setdefault(room, []).append(numbers)

    for length in np.flatnonzero(counts)[::-1].tolist():
        unplaced = int(counts[length])
        while unplaced:
            place = bisect_left(rooms, length)
            room = rooms.pop(place) if place < len(rooms) else budget
            per_pack = room // length
            needed = -(-unplaced // per_pack)
            if room < budget:
                numbers = np.concatenate(packs_of.pop(room))
            else:
                numbers = np.arange(packs, packs + needed, dtype=pack_numbers.dtype)
                packs += needed
            numbers, unused = numbers[:needed], numbers[needed:]
            put_back(room, unused)
            count = min(unplaced, len(numbers) * per_pack)
            pack_numbers[placed : placed + count] = np.repeat(numbers, per_pack)[:count]
            placed, unplaced = placed + count, unplaced - count
            filled = count // per_pack  # the last pack may have taken fewer rows than it could
            put_back(room - per_pack * length, numbers[:filled])
            put_back(room - count % per_pack * length, numbers[filled:])
    return pack_numbers, packs


_SAMPLED_BATCHES = 64
"""How many batches are sampled to estimate what shared prefixes save."""
_CANDIDATES, _CANDIDATES_PER_ROW, _CANDIDATE_TOKENS = 64, 4, 1 << 19
"""Candidates for the largest batch if rows share prefixes: at least this many of the longest items, or this many per
row of a batch; and a random sample of all items with about this many tokens."""

Packing: TypeAlias = Literal["none", "batch", "full"]
"""As in the configuration."""


class Items(Protocol):
    """A map-style dataset for torch's DataLoader: rows of `input_ids` and `labels`, or packs (lists of rows)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class PackedRows:
    """A dataset of packs: item i is the list of the rows of pack i."""

    rows: Items
    packs: Packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int, /) -> list[dict[str, Any]]:
        return [self.rows[int(row)] for row in self.packs[number]]


class BatchLayout:
    """How the rows of a dataset split are batched.

    Attributes:
        items: What the trainer draws: rows, or packs of rows.
        size: The number of items of a batch.
        put: Collates a list of rows into a dict of tensors.
        collate: Collates a list of items. It can be pickled.
        flat: Whether the rows of a batch are concatenated (see `flatten` for how to call the model), or padded.
        saved: The approximate share of tokens saved by shared prefixes; None if rows do not share prefixes.
    """

    items: Items
    size: int
    put: Put
    flat: bool
    saved: float | None = None

    def __init__(
        self,
        dataset: Items,
        lengths: NDArray[np.integer[Any]],
        packing: Packing,
        size: int,
        max_length: int,
        pad_id: int,
        rows_per_example: int = 0,
    ) -> None:
        """Define the batches.

        Args:
            dataset: Rows, with `input_ids` and `labels` as lists.
            lengths: (rows,), the tokens of each row, from 1 to max_length.
            packing: `none` pads each batch of `size` rows to its longest; `batch` concatenates the rows of a batch;
                `full` makes packs of any number of rows, at most size * max_length tokens, and a batch is one pack.
            size: Rows, or pairs of rows, per batch.
            max_length: The maximum number of tokens of a row.
            pad_id: The id of the padding token.
            rows_per_example: The number of consecutive rows per item: 2 for preference pairs, 1 for unpaired
                preferences, 0 if the rows are not preference data.

        Raises:
            ValueError: A length is out of range, with `full`.
        """
        self.flat = packing != "none"
        self.put = flatten if self.flat else partial(pad, pad_id=pad_id)
        each = max(rows_per_example, 1)
        whole = lengths.astype(np.int64).reshape(-1, each).sum(1) if rows_per_example else lengths
        if packing == "full":
            packs = best_fit(whole, size * max_length * each)
            self._tokens = np.add.reduceat(whole[packs.order], packs.starts[:-1], dtype=np.int64)
            self.items, self.size = PackedRows(dataset, packs.of(each) if each > 1 else packs), 1
        elif rows_per_example:
            every = Packs(np.arange(len(lengths)), np.arange(0, len(lengths) + 1, each))
            self.items, self.size = PackedRows(dataset, every), size
            self._tokens = whole if self.flat else each * lengths.reshape(-1, each).max(1)
        else:
            self.items, self.size, self._tokens = dataset, size, lengths

    @property
    def collate(self) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
        """Collates a list of items into a dict of tensors."""
        return partial(_put_packs if isinstance(self.items, PackedRows) else put_rows, self.put)

    def tokens(self, number: int) -> int:
        """Returns the number of tokens of item `number`, as counted for batches."""
        return int(self._tokens[number])

    def sharing(self, saved: float, limits: Sequence[int] = ()) -> "BatchLayout":
        """The same batches with shared prefixes, see `share_prefixes`. saved: the result of `saving`."""
        layout = copy.copy(self)
        layout.put, layout.saved = partial(share_prefixes, limits=limits), saved
        return layout

    def saving(self, size: int | None = None) -> float:
        """The share of tokens that shared prefixes save, estimated from a sample of batches. size: items of a batch, by
        default that of the layout."""
        order, size = np.random.default_rng(0).permutation(len(self.items)), size or self.size
        batches = [order[start : start + size] for start in range(0, len(order), size)][:_SAMPLED_BATCHES]
        if not self.flat or not batches:
            return 0.0
        trees = [PrefixTree.of([row["input_ids"] for row in self.rows(numbers)]) for numbers in batches]
        return 1 - sum(len(tree.ids) for tree in trees) / sum(sum(map(len, tree.places)) for tree in trees)

    def rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The rows of some items."""
        items = [self.items[int(number)] for number in numbers]
        return [row for item in items for row in item] if isinstance(self.items, PackedRows) else items

    def heaviest(self) -> list[int]:
        """Returns the numbers of the items that make the largest possible batch, the largest item first.

        If rows share prefixes, the result is approximate: from the longest items and a random sample, the item that
        adds the most tokens is chosen greedily.
        """
        descending = np.argsort(-self._tokens.astype(np.int64), kind="stable")
        if self.saved is None or not len(descending):
            return [int(number) for number in descending[: self.size]]
        longest = descending[: max(_CANDIDATES, _CANDIDATES_PER_ROW * self.size)]
        drawn = np.random.default_rng(0).permutation(len(descending))[: int(_CANDIDATE_TOKENS / self._tokens.mean())]
        rows = {int(number): [row["input_ids"] for row in self.rows([number])] for number in [*longest, *drawn]}
        # What an item adds decreases as others are chosen, so it is updated only when it may be the maximum.
        most = [(-len(PrefixTree.of(item).ids), order, number) for order, (number, item) in enumerate(rows.items())]
        alone = {number: added for added, _, number in most}
        heapify(most)
        chosen, compared = list[int](), dict.fromkeys(rows, 0)
        while len(chosen) < min(self.size, len(rows)):
            added, order, number = heappop(most)
            if compared[number] == len(chosen):
                chosen.append(number)
                continue
            for other in chosen[compared[number] :]:  # both rows of a pair share a prefix; a pack is a batch by itself.
                added = max(added, alone[number] + common_prefix(rows[number][0], rows[other][0]))
            compared[number] = len(chosen)
            heappush(most, (added, order, number))
        return chosen

    def total_tokens(self, most: int) -> NDArray[np.integer[Any]]:
        """The tokens of batches drawn at random.

        Args:
            most: The maximum number of batches; 0 or less: one pass over the rows.

        Returns:
            (batches,), the tokens of each batch including padding.
        """
        order = np.random.default_rng(0).permutation(len(self._tokens))
        count = len(order) // self.size
        if most > 0:
            count = min(count, most)
        batches = self._tokens[order[: count * self.size]].reshape(-1, self.size)
        return np.asarray(batches.sum(1) if self.flat else batches.max(1) * self.size)


def share_prefixes(rows: Sequence[dict[str, Any]], limits: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Collate rows into a prefix tree.

    The model must have all attention layers replaced by loratune's, which derive from positions what each token attends
    to (`kernels.sublayers`), and compute its loss with `kernels.LossHead`.

    Args:
        rows: `input_ids` and `labels`, lists of equal length for each row, at least one token each.
        limits: See `PrefixTree.of`.

    Returns:
        int64 tensors: `input_ids` and `position_ids` of the tree, (1, tokens of the tree); `labels` of the rows, as in
        `flatten`, and `places`, the indices of their tokens in the tree, both (1, tokens of all rows).
    """
    tree = PrefixTree.of([row["input_ids"] for row in rows], limits)
    return {
        "input_ids": torch.from_numpy(tree.ids)[None],
        "labels": flatten(rows)["labels"],
        "position_ids": torch.from_numpy(tree.positions)[None],
        "places": torch.from_numpy(np.concatenate(tree.places))[None],
    }


def _put_packs(put: Put, packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Collate the rows of all packs into one batch."""
    return put_rows(put, [row for pack in packs for row in pack])
