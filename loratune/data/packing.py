"""Batching: rows of token ids → tensors, padded or end to end. `BatchLayout` is what the trainer iterates."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.data.rendering import IGNORED

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

    Of the packs with space for a row, the fullest one stays the fullest until it has no more space for one. So it takes
    as many rows of this length as fit, and so do all packs with the same space after it.

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


Packing: TypeAlias = Literal["none", "batch", "full"]
"""As in the configuration."""


class Items(Protocol):
    """A dataset as torch's DataLoader takes it: rows of `input_ids` and `labels`, or packs, which are lists of them."""

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
    """How the rows of a dataset split make batches.

    Attributes:
        items: What the trainer draws: rows, or packs of rows.
        size: How many items make a batch.
        collate: Makes a list of items a dict of tensors. It can be pickled.
        flat: Whether the rows of a batch stand end to end (see `flatten` for what the model must then be given), or are
            padded.
    """

    items: Items
    size: int
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    flat: bool

    def __init__(
        self,
        dataset: Items,
        lengths: NDArray[np.integer[Any]],
        packing: Packing,
        size: int,
        max_length: int,
        pad_id: int,
    ) -> None:
        """Lay out the batches.

        Args:
            dataset: Rows, with `input_ids` and `labels` as lists.
            lengths: (rows,), the tokens of each row, from 1 to max_length.
            packing: `none` pads each batch of `size` rows to its longest; `batch` puts the rows of a batch end to end;
                `full` makes packs of any number of rows, at most size * max_length tokens, and a batch is one pack.
            size: Rows of a batch.
            max_length: The most tokens that a row has.
            pad_id: The id of the padding token.

        Raises:
            ValueError: A length is out of range, with `full`.
        """
        self.flat = packing != "none"
        if packing == "full":
            packs = best_fit(lengths, size * max_length)
            self.items, self.size, self.collate = PackedRows(dataset, packs), 1, flatten_packs
            self._tokens = np.add.reduceat(lengths[packs.order], packs.starts[:-1], dtype=np.int64)
        else:
            self.items, self.size = dataset, size
            self.collate = flatten if self.flat else partial(pad, pad_id=pad_id)
            self._tokens = lengths

    def tokens(self, number: int) -> int:
        """Returns how many tokens item `number` holds, without padding."""
        return int(self._tokens[number])

    def heaviest(self) -> list[int]:
        """Returns the numbers of the items that make the largest possible batch, the largest item first."""
        descending = np.argsort(-self._tokens.astype(np.int64), kind="stable")
        return [int(number) for number in descending[: self.size]]

    def total_tokens(self, most: int) -> NDArray[np.integer[Any]]:
        """The tokens of batches drawn at random.

        Args:
            most: How many batches are drawn at most; 0 or less: as many as one pass over the rows has.

        Returns:
            (batches,), the tokens of each with its padding.
        """
        order = np.random.default_rng(0).permutation(len(self._tokens))
        count = len(order) // self.size
        if most > 0:
            count = min(count, most)
        batches = self._tokens[order[: count * self.size]].reshape(-1, self.size)
        return np.asarray(batches.sum(1) if self.flat else batches.max(1) * self.size)


def flatten(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put rows end to end.

    There is no `attention_mask`: without one, and without a cache, transformers reads from the positions where a row
    begins, and lets a token attend to its own row only (`masking_utils.find_packed_sequence_indices`). So the caller
    must call the model with `use_cache=False` and without a mask; with either, tokens attend to other rows, and there
    is no error. `packing_refusal` finds out whether a model understands the positions.

    Args:
        rows: `input_ids` and `labels`, lists of equal length for each row, at least one token each.

    Returns:
        int64 tensors of shape (1, tokens of all rows): `input_ids`; `labels`, in which the first of each row is -100,
        because the token before it is another row's; `position_ids`, which begin at 0 in each row.
    """
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row["labels"][1:])]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]]),
    }


def flatten_packs(packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Put the rows of all packs end to end, as `flatten` does."""
    return flatten([row for pack in packs for row in pack])


def pad(
    rows: Sequence[dict[str, Any]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them. Padding is masked by position, never by token id.

    Args:
        rows: `input_ids` and optionally `labels`, lists of equal length for each row.
        pad_id: The id of the padding token.
        side: Where the padding stands.

    Returns:
        int64 tensors of shape (rows, longest): `input_ids`, `attention_mask` (1 on tokens, 0 on padding), and `labels`
        (-100 on padding) if the rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        padding = [filler] * (longest - len(values))
        return [*values, *padding] if side == "right" else [*padding, *values]

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([padded(row["labels"], IGNORED) for row in rows])
    return batch
