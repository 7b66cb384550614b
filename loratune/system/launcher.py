"""One process, or several that a launcher started: their ranks, and how they communicate.

torchrun, and accelerate through it, describe a process in its environment
(docs.pytorch.org/docs/stable/elastic/run.html).
"""

import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from loratune.errors import Problem

T = TypeVar("T")


class Group:
    """The processes of a run, here a single one; `training.processes.join` makes a group of several.

    Rank 0 is the main process, the only one that writes files and prints. All processes must call the same methods in
    the same order.

    Attributes:
        rank: The number of this process.
        count: How many processes there are.
        main: Whether this is the main process.
        leads_machine: Whether this is the first process of its machine.
    """

    rank, count, main, leads_machine = 0, 1, True, True

    def broadcast(self, value: T) -> T:
        """The main process's value, in all processes; they wait for each other as long as it takes. Between several
        processes, a value must be such as JSON has."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Processes wait, and values are, as in `broadcast`."""
        return [value]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes, which must all have theirs within the timeout of a collective."""
        return list(values)

    def connected(self) -> AbstractContextManager[None]:
        """Inside, a collective that fails raises LostError."""
        return nullcontext()

    def set_timeout(self, seconds: int) -> None:
        """Set the timeout of collectives."""

    def fail(self, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """Record that this process ends with an error. Returns the problems that it is to print, and its exit code."""
        return list(problems), code

    def close(self) -> None:
        """Leave the group once all processes call this: from then on the end of one does not end the others."""


SINGLE_PROCESS = Group()


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"]) if world_size() > 1 and os.environ["RANK"].isdecimal() else 0


def sharding() -> str:
    """The method by which accelerate shards the weights of the base: `fsdp`, `deepspeed`, or an empty text.

    Accelerate sets it in the environment (huggingface.co/docs/accelerate, `accelerate launch --config_file`).
    """
    for name in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    return ""


def host() -> str:
    """The name of this machine."""
    return platform.node()
