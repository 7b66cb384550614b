"""Which rows each process takes in each micro-step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from loratune.system.launcher import Group


class DistributedBatchSampler(Sampler[list[int]]):
    """The batches of one process. A micro-step takes the next `size` items for each process, in an order that is drawn
    anew for each epoch; so processes, batch size and accumulation share out the same steps.

    At the end of an epoch fewer items may be left; they are spread evenly, and a process may get none.
    """

    def __init__(self, items: int, size: int, seed: int, group: Group):
        self.items, self.size, self.seed, self.epoch = items, size, seed, 0
        self.rank, self.processes = group.rank, group.count

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch, the same for every process."""
        return -(-self.items // (self.size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's SeedableRandomSampler
        drawn = torch.randperm(self.items, generator=generator).tolist()
        for start in range(0, self.items, self.size * self.processes):
            yield self._share(drawn[start : start + self.size * self.processes])

    def _share(self, numbers: list[int]) -> list[int]:
        least, more = divmod(len(numbers), self.processes)
        start = self.rank * least + min(self.rank, more)
        return numbers[start : start + least + (self.rank < more)]


class Loader(DataLoader[Any]):
    """Batches of a `DistributedBatchSampler`, which Trainer tells the epoch; accelerate shares them out no further."""

    def __init__(
        self,
        items: Any,
        order: DistributedBatchSampler,
        collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        *,
        pinned: bool,
    ):
        self.order = order
        super().__init__(items, batch_sampler=order, collate_fn=_Collator(items, collate), pin_memory=pinned)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is of."""
        self.order.set_epoch(epoch)


class _Collator:
    """Makes batches; one without items is of the first row, of which nothing is learnt: all must take every step."""

    def __init__(self, items: Any, collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]):
        self._items, self._collate = items, collate

    def __call__(self, some: Sequence[Any]) -> dict[str, torch.Tensor]:
        if some:
            return self._collate(some)
        idle = self._collate([self._items[0]])
        return idle | {"labels": torch.full_like(idle["labels"], -100)}
