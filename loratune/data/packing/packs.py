"""Bin packing: the lengths of rows → packs of rows that fill a budget of tokens."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Packs:
    """A partition of row numbers into packs; `packs[i]` is the array of the row numbers of pack i.

    Attributes:
        order: The row numbers, pack by pack, ascending within a pack.
        starts: Where each pack begins in `order`, and last where `order` ends.
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


def best_fit(lengths: Numbers, budget: int) -> Packs:
    """Pack rows by best-fit decreasing: the longest row first, each into the fullest pack that still has room for it.

    Every row stands in exactly one pack, no pack holds more than the budget, and equal input gives equal packs. There
    are at most 11/9 of the fewest packs possible, and four more (Johnson et al. 1974, doi.org/10.1137/0203025).

    Rows of one length are placed together, so only array operations take time in proportion to the rows; memory is
    about three times that of `lengths` as int64.

    Args:
        lengths: (rows,), tokens of each row, from 1 to budget.
        budget: The most tokens of a pack.

    Raises:
        ValueError: A length is out of range.
    """
    rows = len(lengths)
    if rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= budget:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit 1 to {budget}")
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

    The fullest pack with room for a row stays the fullest until it has no more room. So it takes as many rows of this
    length as fit, and so do all packs of equal room after it.

    Args:
        counts: (budget + 1,), how many rows have each length.
        budget: The most tokens of a pack.

    Returns:
        The pack of each row, for rows in the order of falling length, and the number of packs.
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
