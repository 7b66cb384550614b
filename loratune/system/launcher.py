"""One process, or several that a launcher started: who they are, and what they can say to each other.

torchrun, and accelerate through it, tell a process by its environment (docs.pytorch.org/docs/stable/elastic/run.html).
`SingleProcess` is a group of one; `training.distributed.join`, which needs torch, makes one of several.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from loratune.errors import Code, Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What ended a process. rank: its number; host: its machine; code: its exit code; gone: it ended without a word, or
    cannot be reached, and another process says so."""

    rank: int
    host: str
    problems: tuple[Problem, ...]
    code: int
    gone: bool = False

    def told(self, rank: int) -> list[Problem]:
        """The problems as the process `rank` tells them: those of another one begin with who that is, unless they say
        that it has gone."""
        if rank == self.rank or self.gone:
            return list(self.problems)
        who = f"process {self.rank} on {self.host}"
        return [replace(one, what=f"{who}: {one.what}") for one in self.problems]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Failure":
        """From plain values."""
        return cls(**values | {"problems": tuple(Problem(Code(one.pop("code")), **one) for one in values["problems"])})


class Group(Protocol):
    """The processes of a run. rank: the number of this one; count: of all. Rank 0 is the main process, the only one
    that writes and tells. All must call the same methods in the same order."""

    rank: int
    count: int

    @property
    def main(self) -> bool:
        """Whether this is the main process."""

    @property
    def leads_machine(self) -> bool:
        """Whether this is the first process of its machine."""

    def broadcast(self, value: T) -> T:
        """What the main process gives, in all of them; it may take its time. Of several processes, values are such as
        JSON has."""

    def all_gather(self, value: T) -> list[T]:
        """What all of them give, by rank; they may take their time. Values are as in `broadcast`."""

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all of them, of numbers that all have at hand."""

    def on_end(self, clear: Callable[[], None]) -> None:
        """What this process clears away when another one ends them all."""

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """This process ends by an error, and so do all. Returns what it is to print, which is nothing if another one
        does, and its exit code."""

    def close(self) -> None:
        """The others are not needed any more; what happens to one no longer matters to another."""


class SingleProcess:
    """The group of a process that was started by itself."""

    rank, count, main, leads_machine = 0, 1, True, True

    def broadcast(self, value: T) -> T:
        """What it gives."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """What it gives, alone in a list."""
        return [value]

    def total(self, values: Sequence[float]) -> list[float]:
        """The numbers."""
        return list(values)

    def on_end(self, clear: Callable[[], None]) -> None:
        """There is no other one."""

    def fail(self, error: BaseException, problems: Sequence[Problem], code: int) -> tuple[list[Problem], int]:
        """All of it is to be printed."""
        return list(problems), code

    def close(self) -> None:
        """There is nobody to part from."""


SINGLE_PROCESS = SingleProcess()


def count() -> int:
    """How many processes the launcher started; 1 without one."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() and "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"]) if count() > 1 and os.environ["RANK"].isdecimal() else 0


def sharding() -> str:
    """By what accelerate spreads the weights of the base over the processes: `fsdp`, `deepspeed`, or nothing.

    It says so in the environment (huggingface.co/docs/accelerate, `accelerate launch --config_file`).
    """
    for name in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    return ""


def host() -> str:
    """The name of this machine."""
    return platform.node()
