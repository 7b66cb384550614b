"""What the trainer iterates: the items of a set, how many of them make a batch, and how they become tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.data.packing.flat import flatten, flatten_packs
from loratune.data.packing.packs import Packs, best_fit
from loratune.data.packing.padding import pad

Packing: TypeAlias = Literal["none", "batch", "full"]
"""As in the configuration."""


class Items(Protocol):
    """A set as torch's DataLoader takes it: rows of `input_ids` and `labels`, or packs, which are lists of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class PackedRows:
    """A set of packs: item i is the list of the rows of pack i."""

    rows: Items
    packs: Packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int, /) -> list[dict[str, Any]]:
        return [self.rows[int(row)] for row in self.packs[number]]


class Batches:
    """A set of rows as the trainer takes it.

    items: what it draws, one row each, or one pack of rows. size: how many items make a batch. collate: makes a list of
    items a dict of tensors; it can be pickled. flat: whether rows stand end to end in a batch (see `flatten` for what
    the model must then be given), or are padded.
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

        dataset: rows, `input_ids` and `labels` as lists; lengths: (rows,), tokens of each, from 1 to max_length.
        packing: `none` pads each batch of `size` rows to its longest; `batch` puts the rows of a batch end to end;
        `full` makes packs of any number of rows, at most size * max_length tokens, and a batch is one pack.
        Raises ValueError for lengths out of range, with `full`.
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
        """How many tokens item `number` holds, without padding."""
        return int(self._tokens[number])

    def heaviest(self) -> list[int]:
        """The numbers of the items that make the largest batch of all that can be drawn, the largest item first."""
        falling = np.argsort(-self._tokens.astype(np.int64), kind="stable")
        return [int(number) for number in falling[: self.size]]
