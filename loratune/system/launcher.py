"""One process, or several that a launcher started: their ranks, and how they communicate.

torchrun, and accelerate through it, describe a process in its environment
(docs.pytorch.org/docs/stable/elastic/run.html). `SingleProcess` is a group of one; `training.distributed.join`, which
needs torch, makes a group of several.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from loratune.codes import Code
from loratune.errors import Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a process ended.

    Attributes:
        rank: The number of the process.
        host: The name of its machine.
        problems: What it reported.
        code: Its exit code.
        lost: It ended without a report, or cannot be reached, and another process reports that.
    """

    rank: int
    host: str
    problems: tuple[Problem, ...]
    code: int
    lost: bool = False

    def problems_for(self, rank: int) -> list[Problem]:
        """The problems as the process `rank` prints them: those of another one begin with its name, unless they say
        that it is lost."""
        if rank == self.rank or self.lost:
            return list(self.problems)
        who = f"process {self.rank} on {self.host}"
        return [replace(problem, what=f"{who}: {problem.what}") for problem in self.problems]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Failure":
        """From plain values."""
        problems = tuple(Problem(**fields | {"code": Code(fields["code"])}) for fields in values["problems"])
        return cls(**values | {"problems": problems})


class Group(Protocol):
    """The processes of a run. Rank 0 is the main process, the only one that writes files and prints.

    All processes must call the same methods in the same order.

    Attributes:
        rank: The number of this process.
        count: How many processes there are.
    """

    rank: int
    count: int

    @property
    def main(self) -> bool:
        """Whether this is the main process."""

    @property
    def leads_machine(self) -> bool:
        """Whether this is the first process of its machine."""

    def broadcast(self, value: T) -> T:
        """The main process's value, in all processes; the others wait for it as long as it takes. Between several
        processes, a value must be such as JSON has."""

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; each waits for the others. Values are as in `broadcast`."""

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes, each of which must have its own numbers by now."""

    def on_end(self, clean_up: Callable[[], None]) -> None:
        """Set what this process cleans up when another one ends them all."""

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """End all processes because of an error in this one. Returns the problems that this process is to print, which
        are none if another one prints them, and its exit code."""

    def close(self) -> None:
        """Leave the group once all processes call this: from then on the end of one does not end the others."""


class SingleProcess:
    """The group of a process that was started alone."""

    rank, count, main, leads_machine = 0, 1, True, True

    def broadcast(self, value: T) -> T:
        """The value itself."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """The value, alone in a list."""
        return [value]

    def total(self, values: Sequence[float]) -> list[float]:
        """The numbers themselves."""
        return list(values)

    def on_end(self, clean_up: Callable[[], None]) -> None:
        """Nothing: there is no other process."""

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """All problems are to be printed."""
        return list(problems), code

    def close(self) -> None:
        """Nothing: there is no other process."""


SINGLE_PROCESS = SingleProcess()


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"]) if world_size() > 1 and os.environ["RANK"].isdecimal() else 0


def sharding() -> str:
    """By what accelerate shards the weights of the base over the processes: `fsdp`, `deepspeed`, or an empty text.

    Accelerate says so in the environment (huggingface.co/docs/accelerate, `accelerate launch --config_file`).
    """
    for name in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    return ""


def host() -> str:
    """The name of this machine."""
    return platform.node()
