"""Which rows each process takes in each micro-step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from loratune.system.launcher import SINGLE_PROCESS, Group


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch on the CPU, without padding; none of a batch that stands in for no rows, see `Loader`."""
    if not (batch["labels"] >= 0).any():
        return 0
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else int(mask.sum())


class DistributedBatchSampler(Sampler[list[int]]):
    """The batches of one process.

    A micro-step takes the next `size` items for each process, in an order that is drawn again for each epoch. So the
    number of processes, the batch size and the accumulation only share out the same steps in other ways. At the end of
    an epoch fewer items may be left; they are spread evenly, and a process may get none.

    Args:
        items: How many items there are.
        size: Items of a micro-step for each process.
        seed: Of the order; the number of the epoch is added to it.
        group: The processes of the run.
    """

    def __init__(self, items: int, size: int, seed: int, group: Group = SINGLE_PROCESS):
        self.items, self.size, self.seed, self.epoch = items, size, seed, 0
        self.rank, self.processes = group.rank, group.count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch, the same for every process."""
        return -(-self.items // (self.size * self.processes))

    def order(self) -> list[int]:
        """The items in the order of this epoch, for all processes."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's SeedableRandomSampler
        order: list[int] = torch.randperm(self.items, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for start in range(0, self.items, self.size * self.processes):
            yield self._share(order[start : start + self.size * self.processes])

    def _share(self, numbers: list[int]) -> list[int]:
        """The part of a micro-step's items that this process takes."""
        least, more = divmod(len(numbers), self.processes)
        start = self.rank * least + min(self.rank, more)
        return numbers[start : start + least + (self.rank < more)]


class Loader(DataLoader[Any]):
    """Loads the batches of a `DistributedBatchSampler`. Trainer sets its epoch; accelerate shares them out no further.

    A micro-step without items for this process is a batch of the first row in which nothing is supervised, as all
    processes must take every step.
    """

    def __init__(
        self,
        items: Any,
        sampler: DistributedBatchSampler,
        collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        *,
        pin_memory: bool,
    ):
        def batch(selected: Sequence[Any]) -> dict[str, torch.Tensor]:
            if selected:
                return collate(selected)
            idle = collate([items[0]])
            return idle | {"labels": torch.full_like(idle["labels"], -100)}

        self.rows_sampler = sampler
        super().__init__(items, batch_sampler=sampler, collate_fn=batch, pin_memory=pin_memory)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.rows_sampler.set_epoch(epoch)
